/* kvtier: a tiered (device, host, disk) KV cache with selection, for inference engines.
 *
 * C11 and C++. Every call that can fail returns a `kvtier_status`; `kvtier_last_error` has the
 * sentence that goes with the calling thread's last failure. No exception and no abort crosses this
 * header for anything a caller may pass, except pointers that do not point to what they must.
 *
 * Threads. A runtime and its sequences take one call at a time, from any thread; a call that meets
 * another under way changes nothing and returns `KVTIER_BUSY`. Different runtimes are independent.
 * There is no global state.
 *
 * Memory. Pointers handed in are read or written during the call only, unless said otherwise.
 * Options and results are structs that begin with their size, so that a library of another version
 * knows what the caller knows. What goes in is prepared by its `_init` function; of what comes out,
 * set `struct_size` yourself (`kvtier_stats stats = {sizeof stats};`). A shorter struct means the
 * defaults of what is missing, or that much of the result; a longer one is accepted while what is
 * behind our end is zero, and what is returned there is zero.
 *
 * All strings are UTF-8. All memory that is written is the caller's; strings that are returned live
 * until the next call on the same thread (`kvtier_last_error`), as long as the runtime, or for
 * ever, as said.
 */
#ifndef KVTIER_H
#define KVTIER_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define KVTIER_API __attribute__((visibility("default")))
#else
#define KVTIER_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* ---- The library ---------------------------------------------------------------------------- */

/** 10000 * major + 100 * minor + patch of the library that is linked. */
KVTIER_API uint32_t kvtier_version(void);
/** The same as text, "0.1.0". Lives for ever. */
KVTIER_API const char* kvtier_version_string(void);
/** Whether the library has a feature: "cuda", "disk", "exact-attention", "fork", "resolve",
 *  "prefix-store".
 *  Unknown names are features that it has not. Whether the machine has it shows at open. */
KVTIER_API int kvtier_has_feature(const char* name);

/** Size of a struct of this header as the library that is loaded knows it ("kvtier_options", ...),
 * for bindings of other languages to compare their own layout with; 0: unknown. */
KVTIER_API size_t kvtier_struct_size(const char* name);

/** What a call came to; what to do next, not which function failed. */
typedef enum kvtier_status {
  KVTIER_OK = 0,
  KVTIER_NOT_FOUND = 1, /**< Nothing by that name or id. */
  KVTIER_NO_SPACE = 2,  /**< A bound is reached; the message has the figures. */
  KVTIER_BUSY = 3,      /**< Another call is under way, or something is still open. */
  KVTIER_CANCELLED = 4,
  KVTIER_IO_ERROR = 5,
  KVTIER_CORRUPT = 6, /**< Blocks that were wanted are damaged beyond repair. */
  KVTIER_UNSUPPORTED = 7,
  KVTIER_INVALID_ARGUMENT = 8, /**< The message names the argument and what would be accepted. */
  KVTIER_INTERNAL =
      9 /**< No memory, or a defect of this library: the runtime is lost, and its memory with it. */
} kvtier_status;

/** "ok", "no_space", ... Lives for ever. */
KVTIER_API const char* kvtier_status_name(kvtier_status status);
/** One line about the last call of this thread that did not return KVTIER_OK; "" before any. */
KVTIER_API const char* kvtier_last_error(void);

/** Writes what there is to select by, as a JSON array of objects (name, summary, source, needs,
 *  parameters, decorates), at most `capacity` bytes with the closing zero, and the bytes needed to
 *  `*needed`. KVTIER_NO_SPACE, and nothing is written, when it does not fit. */
KVTIER_API kvtier_status kvtier_list_selectors(char* text, size_t capacity, size_t* needed);

/* ---- A runtime ------------------------------------------------------------------------------ */

typedef enum kvtier_dtype { KVTIER_F16 = 0, KVTIER_BF16 = 1, KVTIER_F32 = 2 } kvtier_dtype;

/** How logits of the query heads that share a KV head become one score. */
typedef enum kvtier_reduction {
  KVTIER_REDUCE_MAX = 0,
  KVTIER_REDUCE_SUM = 1,
  KVTIER_REDUCE_MEAN = 2
} kvtier_reduction;

/** What becomes of the tokens that a step does not attend. */
typedef enum kvtier_rest {
  KVTIER_REST_MEASURED = 0, /**< Estimated in the heads where samples show that it helps. */
  KVTIER_REST_ALWAYS = 1,
  KVTIER_REST_NEVER = 2 /**< Left out: softmax over the attended tokens. */
} kvtier_rest;

typedef enum kvtier_verify {
  KVTIER_VERIFY_ARRIVALS = 0, /**< Whenever bytes come from disk. */
  KVTIER_VERIFY_ALL = 1       /**< Also after each copy between host and device. */
} kvtier_verify;

/** Where pointers that are handed in point to. */
typedef enum kvtier_memory {
  KVTIER_MEMORY_HOST = 0,
  KVTIER_MEMORY_DEVICE = 1 /**< KVTIER_UNSUPPORTED until the library has the feature "cuda". */
} kvtier_memory;

/** Takes and returns memory for a tier: of `bytes`, aligned to 4096, or NULL. Called from
 *  `kvtier_runtime_open` and `kvtier_runtime_close` only. */
typedef struct kvtier_allocator {
  void* (*allocate)(void* context, size_t bytes);
  void (*release)(void* context, void* memory, size_t bytes);
  void* context;
} kvtier_allocator;

/** Hears of things that are no failure but worth knowing (a backend refused, pages not locked). One
 *  line without a newline; called on the thread of the call that it is about. */
typedef void (*kvtier_logger)(void* context, const char* message);

/** One group of layers with one layout. A model whose layers differ opens one runtime per group. */
typedef struct kvtier_options {
  size_t struct_size;

  /* The model. */
  kvtier_dtype dtype;   /**< Of keys and values, default f16. */
  uint32_t layers;      /**< Default 1. */
  uint32_t query_heads; /**< A multiple of kv_heads. */
  uint32_t kv_heads;
  uint32_t head_dim;        /**< Of keys and queries. */
  uint32_t value_dim;       /**< 0: as head_dim. */
  float softmax_scale;      /**< 0: 1 / sqrt(head_dim). */
  float logit_cap;          /**< Soft-capping, cap * tanh(logit / cap); 0: off. */
  const float* sink_logits; /**< [layers, query_heads], or NULL; copied. */
  double rope_theta;        /**< For selectors that un-rotate keys; 0: unknown. */
  uint32_t rope_dims;       /**< 0: the whole head. */

  /* Blocks: what is selected, moved and verified. */
  uint32_t tokens_per_block;   /**< 1 to 64, default 8. */
  uint32_t kv_heads_per_block; /**< 1, or a divisor of kv_heads; default 1. */
  size_t extent_bytes;         /**< Of one disk read or write; default 128 KiB. */

  /* What is attended. */
  const char* selector;       /**< "scan", "refresh(interval=4)/mean", ...; NULL: the default. */
  kvtier_reduction reduction; /**< Default sum. */
  uint32_t sinks;             /**< First tokens, always attended; default 4. */
  uint32_t window;            /**< Last tokens, always attended; default 64. */
  kvtier_rest rest;           /**< Default measured. */

  /* How it moves. */
  const char* eviction;      /**< "lrfu" (NULL) or "lru". */
  uint64_t look_ahead_bytes; /**< Promoted from disk to host per step; 0 (default): none. */
  kvtier_verify verify;      /**< Default arrivals. */
  int deterministic;         /**< Bit-identical results whatever is resident; default 0. */
  uint64_t seed;
  uint32_t threads; /**< For attention and selection; 0: all the process may use. */

  /* How much. */
  uint32_t tokens_max;    /**< Longest sequence. */
  uint32_t sequences_max; /**< Open at a time, default 1. */
  uint64_t device_capacity_bytes;
  uint64_t host_capacity_bytes;
  uint64_t disk_capacity_bytes; /**< 0: no disk tier. */
  const char* disk_path;        /**< Directory for a nameless scratch file; with a disk tier. */

  /* Hooks; all optional. */
  const kvtier_allocator* device_allocator; /**< For the slots of the device tier. */
  const kvtier_allocator* host_allocator;   /**< For the frames of the host tier. */
  kvtier_logger logger;
  void* logger_context;
  uint32_t timeline_events;  /**< Events kept for `kvtier_write_timeline`; 0: none. */
  uint32_t measure_interval; /**< Most steps of a layer between measurements of `rest`; 0: 256. */
} kvtier_options;

/** Defaults, and the size of the struct as this header has it. */
#define KVTIER_OPTIONS_INIT(options) kvtier_options_init((options), sizeof(kvtier_options))
KVTIER_API kvtier_status kvtier_options_init(kvtier_options* options, size_t struct_size);

/** The least that a runtime with given options needs; see `kvtier_runtime_needs`. */
typedef struct kvtier_needs {
  size_t struct_size;
  uint64_t device_bytes; /**< For one step. */
  uint64_t host_bytes;   /**< For one step. */
  /** With a disk tier, host and disk together must exceed extent_bytes_total by this. */
  uint64_t host_reserve_bytes;
  uint64_t extent_bytes_total; /**< All sequences at full length. */
  uint64_t device_bytes_all;   /**< At which everything stays on the device. */
} kvtier_needs;

/** What `kvtier_runtime_open` would insist on; the capacities in `options` are ignored. */
KVTIER_API kvtier_status kvtier_runtime_needs(const kvtier_options* options, kvtier_needs* needs);

/** Owned by whoever opened it. A pointer that was closed must not be used again: unlike a freed
 *  sequence, that cannot be noticed. */
typedef struct kvtier_runtime kvtier_runtime;

/** Takes all memory and disk space at once. KVTIER_INVALID_ARGUMENT names the option, and the least
 *  bytes that would do where a capacity is too small; KVTIER_NO_SPACE when the machine has not that
 *  much. `*runtime` is NULL after a failure. */
KVTIER_API kvtier_status kvtier_runtime_open(const kvtier_options* options,
                                             kvtier_runtime** runtime);
/** Frees all sequences, ends all transfers, frees the runtime whatever it returns: the first disk
 *  write that failed and could not be mended, say. Not while another call is under way, then
 *  KVTIER_BUSY and nothing is freed; nor after a call that returned KVTIER_INTERNAL, which leaves
 *  nothing that could be freed safely. NULL is KVTIER_OK. */
KVTIER_API kvtier_status kvtier_runtime_close(kvtier_runtime* runtime);

/* ---- Sequences ------------------------------------------------------------------------------ */

/** Names a sequence of one runtime; 0 names none. A freed one is never mistaken for a later one. */
typedef uint64_t kvtier_sequence;

/** Starts an empty sequence. KVTIER_NO_SPACE when `sequences_max` are open. */
KVTIER_API kvtier_status kvtier_sequence_create(kvtier_runtime* runtime, kvtier_sequence* sequence);
/** Starts a sequence with the first `tokens` tokens of `parent` in every layer: another beam, a
 *  second question to one document. Complete extents are shared, neither copied nor fetched twice;
 *  each of the two goes on, and is freed, by itself. KVTIER_INVALID_ARGUMENT when a layer of
 *  `parent` has fewer tokens. */
KVTIER_API kvtier_status kvtier_sequence_fork(kvtier_runtime* runtime, kvtier_sequence parent,
                                              uint32_t tokens, kvtier_sequence* sequence);
/** Gives back everything that no other sequence shares. 0 is KVTIER_OK. */
KVTIER_API kvtier_status kvtier_sequence_free(kvtier_runtime* runtime, kvtier_sequence sequence);
/** Tokens appended to a layer so far. */
KVTIER_API kvtier_status kvtier_sequence_tokens(kvtier_runtime* runtime, kvtier_sequence sequence,
                                                uint32_t layer, uint32_t* tokens);

/** Keys and values of new tokens, in the runtime's dtype. Strides are in bytes. */
typedef struct kvtier_rows {
  size_t struct_size;
  const void* keys; /**< Token t, KV head h: keys + t * key_token_stride + ... */
  const void* values;
  size_t key_token_stride;
  size_t key_head_stride;
  size_t value_token_stride;
  size_t value_head_stride;
  uint32_t tokens;
  const uint8_t* marks; /**< [tokens] bits of `kvtier_mark`, or NULL. */
  kvtier_memory memory; /**< Of keys and values; default host. */
  uint32_t reserved;    /**< 0. */
  void* stream;         /**< With device memory: the CUDA stream; else NULL. */
} kvtier_rows;
/** What is known of a token besides; the same in every layer. */
typedef enum kvtier_mark { KVTIER_ENDS_SENTENCE = 1, KVTIER_IS_LANDMARK = 2 } kvtier_mark;

/** Appends to one layer. Any chunking gives the same state; copies; allocates nothing.
 *  KVTIER_INVALID_ARGUMENT beyond `tokens_max`; KVTIER_NO_SPACE when host and disk are full
 *  (`kvtier_sequence_tokens` says how many were appended), KVTIER_CORRUPT when a block did not
 *  reach the host intact (all are appended; the block is served from the device while it is there).
 */
KVTIER_API kvtier_status kvtier_append(kvtier_runtime* runtime, kvtier_sequence sequence,
                                       uint32_t layer, const kvtier_rows* rows);
/** Forgets the tokens from `tokens` on in every layer: a rejected draft. */
KVTIER_API kvtier_status kvtier_truncate(kvtier_runtime* runtime, kvtier_sequence sequence,
                                         uint32_t tokens);
/** Shows the selector what prompt tokens looked for: `queries` [count, query_heads, head_dim]
 *  float32 at ascending `positions` [count], of tokens already appended. */
KVTIER_API kvtier_status kvtier_observe_prompt(kvtier_runtime* runtime, kvtier_sequence sequence,
                                               uint32_t layer, const float* queries,
                                               const uint32_t* positions, uint32_t count);

/* ---- Attention ------------------------------------------------------------------------------ */

/** One layer's question: attention of the last `query_count` tokens. Query i belongs to token
 *  tokens - query_count + i and sees every token up to and including its own. */
typedef struct kvtier_query {
  size_t struct_size;
  uint32_t layer;
  uint32_t query_count; /**< Default 1. */
  const void* queries;  /**< [query_count, query_heads, head_dim], contiguous, after RoPE. */
  void* out;            /**< [query_count, query_heads, value_dim]; NaN after a failure. */
  float* lse;           /**< [query_count, query_heads], natural log, or NULL. */
  kvtier_dtype dtype;   /**< Of queries and out; default f32. */

  /* For steps, not for `kvtier_attend_exact`. */
  uint32_t budget_tokens; /**< Attended per KV head group, sinks and window included. */
  int own_selection;      /**< Each query selects for itself; default 0: one for all. */
  /** [head groups or 1, external_tokens] scores by somebody else (an indexer), for `external`. */
  const float* external_scores;
  size_t external_stride; /**< Elements from group to group; 0: one row for all. */
  uint32_t external_tokens;
  kvtier_memory memory; /**< Of queries, out and lse; default host. */
  void* stream;         /**< As in `kvtier_rows`. */
} kvtier_query;
#define KVTIER_QUERY_INIT(query) kvtier_query_init((query), sizeof(kvtier_query))
KVTIER_API kvtier_status kvtier_query_init(kvtier_query* query, size_t struct_size);
#define KVTIER_ROWS_INIT(rows) kvtier_rows_init((rows), sizeof(kvtier_rows))
KVTIER_API kvtier_status kvtier_rows_init(kvtier_rows* rows, size_t struct_size);

/** What a step did. Durations in seconds. */
typedef struct kvtier_report {
  size_t struct_size;
  uint32_t attended_tokens_max;   /**< Of the head group with most. */
  uint64_t attended_tokens_total; /**< Over the head groups. */
  uint64_t metadata_bytes;        /**< Of this layer's selector. */
  uint32_t rows_estimated;        /**< Rows of out with an estimate of the rest. */
  uint32_t failures;              /**< Blocks that could not be had; see `kvtier_failure_text`. */
  uint32_t waits;                 /**< Transfers that were not in when they were needed. */
  double select_s, resolve_s, fetch_s, attend_s, merge_s, rest_s, look_ahead_s, total_s;
} kvtier_report;

/** Selects within the budget, fetches, attends: exact attention over what is attended, and in the
 *  heads where that was measured to help, an estimate of the rest. Waits for what is not resident.
 *  `report` may be NULL.
 *  KVTIER_CORRUPT or KVTIER_IO_ERROR when a wanted block could not be had: out and lse are NaN, and
 *  the sequence goes on. KVTIER_NO_SPACE says how much one step needs. */
KVTIER_API kvtier_status kvtier_step(kvtier_runtime* runtime, kvtier_sequence sequence,
                                     const kvtier_query* query, kvtier_report* report);
/** Exact causal attention over every token, for chunks of a prompt (`query_count` up to the tokens
 *  that are there). Blocks that are not resident stream through. Fails like `kvtier_step`. */
KVTIER_API kvtier_status kvtier_attend_exact(kvtier_runtime* runtime, kvtier_sequence sequence,
                                             const kvtier_query* query, kvtier_report* report);
/** Promotes from disk to host what the layer would select for `guess`; changes no later answer. */
KVTIER_API kvtier_status kvtier_hint(kvtier_runtime* runtime, kvtier_sequence sequence,
                                     const kvtier_query* guess);

/** Tokens of one block. */
typedef struct kvtier_range {
  uint32_t head_group;
  uint32_t block;       /**< Of the sequence. */
  uint32_t first_token; /**< Within the block. */
  uint32_t tokens;
  uint32_t slot;  /**< Its block begins at slab + slot * slot_stride; resolve only. */
  uint32_t query; /**< Which query attended it; UINT32_MAX: every one. */
} kvtier_range;

/** Where a step's blocks are; see `kvtier_resolve`. */
typedef struct kvtier_slots {
  size_t struct_size;
  const void* slab;           /**< Blocks of `[K: heads, tokens, head_dim][V: ..., value_dim]`. */
  size_t slot_stride;         /**< Bytes. */
  size_t values_offset;       /**< Of V within a block, bytes. */
  const kvtier_range* ranges; /**< By head group, then position. */
  uint32_t range_count;
  uint32_t tokens_max; /**< Of the head group with most. */
} kvtier_slots;

/** Selects and fetches like a step, and leaves attending to an engine with a paged attention of its
 *  own. `slots`, and what it points to, hold until the next call on the runtime.
 *  KVTIER_NO_SPACE says how much the device tier lacks. */
KVTIER_API kvtier_status kvtier_resolve(kvtier_runtime* runtime, kvtier_sequence sequence,
                                        const kvtier_query* query, kvtier_slots* slots);

/** What the last call on this runtime attended, if it was a `kvtier_step`: at most `capacity`
 *  ranges, and how many there are. For recall statistics and tests. Statistics and failures may be
 *  asked for in between. */
KVTIER_API kvtier_status kvtier_attended(kvtier_runtime* runtime, kvtier_range* ranges,
                                         uint32_t capacity, uint32_t* count);
/** One line on a block that the last call of this runtime could not have: tier, identity, expected,
 *  found. NULL when there is no failure of that number. Lives until the next call; what was said of
 *  `kvtier_attended` holds here. */
KVTIER_API const char* kvtier_failure_text(kvtier_runtime* runtime, uint32_t number);

/* ---- Prefixes that outlive the process --------------------------------------------------------
 */

/** What a save promises once it has returned KVTIER_OK. */
typedef enum kvtier_durability {
  KVTIER_DURABLE_NONE = 0,  /**< Gone with the process. */
  KVTIER_DURABLE_CLEAN = 1, /**< There after a clean close. */
  KVTIER_DURABLE_CRASH = 2, /**< There after the process is killed. */
  KVTIER_DURABLE_POWER = 3  /**< There after a power failure. */
} kvtier_durability;

typedef struct kvtier_store_options {
  size_t struct_size;
  const char* path;        /**< Directory; made where there is none, for its owner alone. */
  uint64_t capacity_bytes; /**< Of all files together, taken when the store is made. 0: as found. */
  uint64_t free_bytes_min; /**< What the file system must keep free besides; default 1 GiB. */
  kvtier_durability durability; /**< Default crash. */
  const char* model;       /**< Names model, weights, group of layers and whatever else KV depends
                                on. Not NULL. Two runtimes that share a name share prefixes. */
  const char* tenant_salt; /**< A secret of the tenant, or NULL. */
  const char* key_file;    /**< 64 bytes for AES-256-XTS, or NULL: not encrypted. */
  int read_only;
} kvtier_store_options;
#define KVTIER_STORE_OPTIONS_INIT(options) \
  kvtier_store_options_init((options), sizeof(kvtier_store_options))
KVTIER_API kvtier_status kvtier_store_options_init(kvtier_store_options* options,
                                                   size_t struct_size);

/** Opens the runtime's prefix store, or makes one. At most one per runtime, and one process per
 *  path: KVTIER_BUSY names the holder. KVTIER_NO_SPACE has the figures. What was found amiss and
 *  mended (an index that was rebuilt) goes to the logger. */
KVTIER_API kvtier_status kvtier_store_open(kvtier_runtime* runtime,
                                           const kvtier_store_options* options);
/** Ends it cleanly; `kvtier_runtime_close` does so too. KVTIER_OK when none is open. */
KVTIER_API kvtier_status kvtier_store_close(kvtier_runtime* runtime);

/** Saves the whole runs of the first `count` tokens, whose ids these are, with the state of the
 *  selectors. `*saved` (or NULL) is how many tokens those are. Runs that are stored already are
 *  shared and keep their value. `value`, a finite number: larger stays longer.
 *  KVTIER_INVALID_ARGUMENT when there is no whole run or a layer has fewer tokens. */
KVTIER_API kvtier_status kvtier_sequence_save(kvtier_runtime* runtime, kvtier_sequence sequence,
                                              const uint32_t* token_ids, uint32_t count,
                                              double value, uint32_t* saved);
/** A sequence that begins with the longest stored prefix of `token_ids`; `*tokens` is its length, 0
 *  when nothing was found. Every block is verified; damage ends the prefix before it and is dropped
 *  from the store, so that the next save writes it anew. */
KVTIER_API kvtier_status kvtier_sequence_restore(kvtier_runtime* runtime, const uint32_t* token_ids,
                                                 uint32_t count, kvtier_sequence* sequence,
                                                 uint32_t* tokens);
/** Gives up one save of these tokens. KVTIER_NOT_FOUND when they are not stored. */
KVTIER_API kvtier_status kvtier_store_forget(kvtier_runtime* runtime, const uint32_t* token_ids,
                                             uint32_t count);

typedef struct kvtier_store_stats {
  size_t struct_size;
  uint32_t tokens_per_run;
  uint64_t items, capacity_bytes, data_bytes, free_bytes;
  uint64_t written_bytes, read_bytes, evicted_items, blocks_verified, blocks_corrupt;
  uint64_t read_failures, write_failures;
} kvtier_store_stats;
/** KVTIER_INVALID_ARGUMENT when no store is open. */
KVTIER_API kvtier_status kvtier_get_store_stats(kvtier_runtime* runtime, kvtier_store_stats* stats);

/* ---- Statistics ----------------------------------------------------------------------------- */

typedef struct kvtier_tier_stats {
  uint64_t capacity_bytes, used_bytes, peak_bytes;
  uint64_t hits;      /**< Attended blocks found here. */
  uint64_t held_hits; /**< Sinks and window. */
  uint64_t evictions;
} kvtier_tier_stats;

/** Counters since open. */
typedef struct kvtier_stats {
  size_t struct_size;
  kvtier_tier_stats device, host, disk;
  uint64_t disk_to_host_bytes, host_to_device_bytes, device_to_host_bytes, host_to_disk_bytes;
  uint64_t blocks_verified, blocks_mismatched, blocks_recovered, blocks_failed;
  uint64_t prefetch_issued_bytes, prefetch_useful_bytes, prefetch_wasted_bytes, prefetch_late;
  uint64_t metadata_bytes; /**< Of all selectors, at its peak. */
  uint64_t steps, exact_steps, steps_measured;
} kvtier_stats;

KVTIER_API kvtier_status kvtier_get_stats(kvtier_runtime* runtime, kvtier_stats* stats);
/** The same and more as a JSON object; as `kvtier_list_selectors`. */
KVTIER_API kvtier_status kvtier_get_stats_json(kvtier_runtime* runtime, char* text, size_t capacity,
                                               size_t* needed);

/** What one sequence occupies; what it shares counts in full. */
typedef struct kvtier_sequence_stats {
  size_t struct_size;
  uint64_t blocks, blocks_resident;
  uint64_t device_bytes, host_bytes, disk_bytes, shared_bytes, metadata_bytes;
} kvtier_sequence_stats;
KVTIER_API kvtier_status kvtier_get_sequence_stats(kvtier_runtime* runtime,
                                                   kvtier_sequence sequence,
                                                   kvtier_sequence_stats* stats);

/** Writes what happened so far as Chrome trace events (opens in Perfetto). Needs
 *  `timeline_events`. */
KVTIER_API kvtier_status kvtier_write_timeline(kvtier_runtime* runtime, const char* path);

#ifdef __cplusplus
}
#endif

#endif /* KVTIER_H */
