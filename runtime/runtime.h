#pragma once

#include "memory/clock.h"
#include "memory/ids.h"
#include "memory/timeline.h"
#include "runtime/block_failure.h"
#include "runtime/device.h"
#include "runtime/options.h"
#include "runtime/stats.h"
#include "transfer/file.h"
#include "transfer/link.h"

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace kvtier {

/// The world a runtime runs in: real, simulated or faulty. Everything outlives the runtime; whoever
/// opened the file closes it, after the runtime.
struct Environment {
  const Clock* clock = nullptr;
  Device* device = nullptr;
  Link* link = nullptr;
  File* disk = nullptr;  ///< Null when `disk_capacity_bytes` is 0.
  Timeline* timeline = nullptr;
};

/// Keys and values of consecutive new tokens of one layer, in the runtime's dtype. View.
struct TokenRows {
  /// Key of token t, KV head h: keys + t * key_token_stride + h * key_head_stride (bytes).
  const std::byte* keys = nullptr;
  const std::byte* values = nullptr;
  std::size_t key_token_stride = 0;
  std::size_t key_head_stride = 0;
  std::size_t value_token_stride = 0;
  std::size_t value_head_stride = 0;
  std::uint32_t tokens = 0;
  /// [tokens] bits of `kEndsSentence` and `kIsLandmark`, or null; the same in every layer.
  const std::uint8_t* marks = nullptr;
};

/// Whose blocks the queries of one step attend.
enum class QuerySelection : unsigned char {
  kShared,  ///< One selection for all: a draft that is verified, a question's tokens.
  kOwn,     ///< Each query selects for itself, as if they were asked one by one.
};

/// One layer's question: attention of the last `query_count` tokens over what is selected.
struct StepRequest {
  LayerIndex layer;
  /// [query_count, query_heads, head_dim], float32, contiguous. Query i belongs to token
  /// `tokens - query_count + i` and sees every token up to and including its own.
  const float* queries = nullptr;
  std::uint32_t query_count = 1;
  QuerySelection selection = QuerySelection::kShared;
  /// Tokens attended per head group (and query, where each has its own selection): sinks, window
  /// and selected ones.
  std::uint32_t budget_tokens = 0;
  /// For selectors that rank by somebody else's scores.
  ExternalScores external;
  float* out = nullptr;  ///< [query_count, query_heads, value_dim]; NaN after a failed step.
  float* lse = nullptr;  ///< [query_count, query_heads], natural log; NaN after a failed step.
};

/// One layer's question that is answered exactly: causal attention of the last `query_count` tokens
/// over every token of the layer.
struct ExactRequest {
  LayerIndex layer;
  /// [query_count, query_heads, head_dim], float32, contiguous. Query i belongs to token
  /// `tokens - query_count + i` and sees every token up to and including its own.
  const float* queries = nullptr;
  std::uint32_t query_count = 1;  ///< 1 to the layer's tokens: a chunk of a prompt.
  float* out = nullptr;           ///< [query_count, query_heads, value_dim]; NaN after a failure.
  float* lse = nullptr;           ///< [query_count, query_heads], natural log; NaN after a failure.
};

/// Tokens that were attended: of one head group and one block.
struct AttendedRange {
  HeadGroup head_group;
  BlockIndex block;
  std::uint32_t first_token = 0;  ///< Within the block.
  std::uint32_t tokens = 0;
  static constexpr std::uint32_t kEveryQuery = 0xFFFFFFFF;
  std::uint32_t query = kEveryQuery;  ///< Which of the step's queries attended it.
  /// With the keys that the selector keeps of it, instead of the block's own.
  bool kept_keys = false;
};

/// What a step did. Views into the sequence, valid until its next call.
struct StepReport {
  std::span<const AttendedRange> attended;  ///< By query, head group, then block.
  std::span<const BlockFailure> failures;   ///< Empty when the step succeeded.
  std::uint32_t attended_tokens_max = 0;    ///< Largest head group.
  std::uint64_t attended_tokens_total = 0;  ///< Over the head groups.
  std::uint64_t metadata_bytes = 0;         ///< Of this layer's selector.
  /// Rows of `out` (a query in a query head) that hold an estimate of what was not attended.
  std::uint32_t rows_estimated = 0;
  /// A sample of what was not chosen was attended too, to measure whether estimates help.
  bool measured_rest = false;
  /// [query_count, query_heads, value_dim]: attention over the attended tokens alone; the step's
  /// `out` itself where nothing was estimated.
  const float* attended_out = nullptr;
  StepTiming timing;
};

/// Tokens of one block that an engine's own attention is to attend, and where they are.
struct ResolvedRange {
  HeadGroup head_group;
  SlotId slot;                    ///< Its block begins at `slab + slot * slot_stride_bytes`.
  BlockIndex block;               ///< Of the sequence.
  std::uint32_t first_token = 0;  ///< Within the block.
  std::uint32_t tokens = 0;
  std::uint32_t position = 0;  ///< In the sequence, of `first_token`.
};

/// Where a step's blocks are on the device. Views into the runtime, and the blocks themselves are
/// held, until the next call on the runtime or one of its sequences (`stats`, `tokens` and `layout`
/// do not count).
struct ResolvedBlocks {
  const std::byte* slab = nullptr;        ///< Device memory; blocks are laid out by `layout()`.
  std::size_t slot_stride_bytes = 0;      ///< `layout().block_bytes()`.
  std::span<const ResolvedRange> ranges;  ///< By head group, then position.
  /// [head groups + 1]: those of head group g are ranges[group_begins[g], group_begins[g + 1]).
  std::span<const std::uint32_t> group_begins;
  std::uint32_t tokens_max = 0;            ///< Of the head group with most.
  std::span<const BlockFailure> failures;  ///< Empty when the call succeeded.
  StepTiming timing;
};

class Sequence;
class PrefixStore;

/// A sequence that begins with what a prefix store had of its tokens.
struct RestoredSequence {
  std::unique_ptr<Sequence> sequence;
  /// In every layer; a multiple of a run, 0 when nothing was found.
  std::uint32_t tokens = 0;
  /// The selectors' states were not there, or of other options: every key was read again.
  bool selectors_rebuilt = false;
  /// More was found, but a run of it could not be read intact. It was dropped from the store, so
  /// that saving the tokens again writes it anew.
  bool damaged = false;
};

/// Decodes over KV blocks that live on three tiers.
///
/// Owns the slab, the frames, the tables and the transfer engine; borrows the environment. All of
/// the tiers' memory is taken by `open`; lists of a step's work grow to the largest step and stay,
/// so that decoding allocates nothing in the long run. One thread at a time for the runtime and all
/// its sequences.
class Runtime {
 public:
  /// `invalid_argument` names the option that is wrong, and the least bytes that would do where a
  /// capacity is too small; `no_space` when the system has not the memory.
  static Result<std::unique_ptr<Runtime>> open(const RuntimeOptions& options,
                                               const Environment& environment);
  /// What `open` would insist on for these options; capacities in them are ignored.
  static Result<RuntimeNeeds> needs(const RuntimeOptions& options);

  ~Runtime();
  Runtime(const Runtime&) = delete;
  Runtime& operator=(const Runtime&) = delete;

  const BlockLayout& layout() const;

  /// Starts an empty sequence. `origin` names its content: two sequences with one origin must have
  /// the same tokens. `no_space` when `sequences_max` are open, `invalid_argument` after `close`.
  Result<std::unique_ptr<Sequence>> create_sequence(Origin origin);

  /// A sequence with the longest saved prefix of `token_ids`; what is behind it is appended as
  /// usual. Every block is verified on its way; a run that cannot be had intact ends the prefix
  /// before it. Steps answer as they would have when it was saved, but for what estimates of the
  /// rest have been measured to be worth, which is measured anew.
  ///
  /// Cost: a read from the store, a checksum and (with a disk tier) a write of every extent; where
  /// `selectors_rebuilt`, appending all tokens to the selectors once more. `origin` names what is
  /// appended behind, as in `create_sequence`. `no_space` when the tiers cannot hold the prefix.
  Result<RestoredSequence> restore_sequence(PrefixStore& store,
                                            std::span<const std::uint32_t> token_ids,
                                            Origin origin);

  /// Counters so far; cheap, and still there after `close`. Functions of the calls alone, but for
  /// the routes: of their counters only `submitted_bytes` is, the others follow the transfers.
  RuntimeStats stats() const;

  /// Ends all transfers and writes, closes the transfer engine. `busy`, and nothing has changed,
  /// while a sequence is open; `invalid_argument` when closed before. Otherwise closed afterwards,
  /// and returns the first failure of a disk write that repeating did not mend, whether or not
  /// `append` has told of it.
  Status close();

 private:
  friend class Sequence;
  struct State;
  explicit Runtime(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

/// One request's tokens. Made by a runtime, closed before it; one thread at a time for all
/// sequences of a runtime, in any order: an engine loops over its sequences within a layer or
/// within a token as it likes, and every answer is that of the sequence alone.
///
/// After `close` every call but `tokens` and `stats` returns `invalid_argument`, as does a layer
/// that the runtime does not have, and a null pointer where something is to be read or written.
class Sequence {
 public:
  ~Sequence();
  Sequence(const Sequence&) = delete;
  Sequence& operator=(const Sequence&) = delete;

  /// Tokens appended to a layer so far.
  std::uint32_t tokens(LayerIndex layer) const;

  /// Appends to the open tail block of a layer; each block that fills is sealed: checksummed and
  /// written through to its host frame, and to disk once its extent is complete. Any chunking gives
  /// the same state. Copies the rows; no allocation.
  /// `invalid_argument` beyond `tokens_max`; `no_space` when host and disk are full (nothing of
  /// what was sealed is lost, the tokens before the refused block stay appended: `tokens` says how
  /// many). `corrupt` when a sealed block did not reach its frame intact: all tokens are appended,
  /// and the block is served from the device until it leaves, then named by the step that wants it.
  Status append(LayerIndex layer, const TokenRows& rows);

  /// Forgets the tokens from `tokens` on in every layer: a rejected draft, a retry. A sealed block
  /// that is cut is reopened under its next generation; it is fetched first where it is not
  /// resident, and the call fails like a step if it cannot be had.
  Status truncate(std::uint32_t tokens);

  /// A new sequence with the first `tokens` tokens of this one in every layer, which from then on
  /// lives by itself: another beam, another answer to one prompt, a branch of a draft. Its steps
  /// answer bit for bit (with `deterministic`) as a copy made by appending the same tokens would,
  /// but for what selectors learn from questions, which it inherits.
  ///
  /// `origin` names what the fork appends and must never have named other tokens; that of this
  /// sequence is refused. Complete extents are shared: stored, fetched and resident once, under the
  /// identity that they were sealed under, until the last sequence lets go. What lies behind them
  /// (at most one extent per layer and head group) is copied, each block verified against its
  /// checksum; one that is damaged for good is named by the step that wants it. When a truncation
  /// of either sequence cuts into a shared extent, that sequence copies what it keeps of it first.
  ///
  /// Cost: per layer and head group up to an extent of copying and hashing, a read where the
  /// partial extent is on disk alone, and a copy of every layer's selector, which grows with the
  /// tokens; nothing else does. Allocates. A fork at fewer tokens than are appended costs a
  /// truncation on top. To reorder beams: close those without a successor, keep each parent as its
  /// own first successor, fork the others.
  ///
  /// `no_space` when `sequences_max` are open or no frame or slot is left; `invalid_argument` when
  /// a layer has fewer than `tokens` tokens; `corrupt` or `io_error` when a block that is cut
  /// cannot be had. Nothing has changed then.
  Result<std::unique_ptr<Sequence>> fork(std::uint32_t tokens, Origin origin) const;

  /// Tells the layer's selector what prompt tokens looked for; before the steps that profit by it.
  /// Positions ascend and are of tokens already appended. `invalid_argument` otherwise, or when a
  /// query is not finite.
  Status observe_prompt(LayerIndex layer, const PromptQueries& queries);

  /// Guesses what a layer will ask: its selection for `guess` is promoted from disk to host within
  /// the look-ahead budget of the step before. `out` and `lse` are not used; nothing is attended,
  /// and no later answer changes. Does nothing without look-ahead.
  Status hint(const StepRequest& guess);

  /// Selects, resolves, fetches and attends: `request.out` and `request.lse` hold exact attention
  /// over the attended tokens, and, in the query heads where that has been measured to bring it
  /// nearer to exact attention over everything, the selector's estimate of the rest. Where the
  /// selector keeps the keys of what it chooses (`scan(fetch=values)`), these are attended instead
  /// of the blocks' own and values alone are fetched; a block that is on the device whole is used
  /// whole, unless the runtime is `deterministic`. Residency changes only here and in `append`, as
  /// a function of the calls. Waits for bytes that are on their way.
  ///
  /// `corrupt` or `io_error` when a wanted block could not be had from any tier: `report->failures`
  /// names each one, out and lse are NaN, and the sequence goes on. `invalid_argument`: a query
  /// that is not finite, a budget below sinks + window, more queries than tokens. `no_space` names
  /// the bytes that are missing, where a tier is so full of what cannot leave that not even one
  /// chunk of blocks can be brought in.
  Status step(const StepRequest& request, StepReport* report);

  /// Exact causal attention: for a chunk of a prompt after it was appended (the first chunk too,
  /// when nothing but itself is there), or to decode without selecting.
  ///
  /// Blocks that are not resident stream through the device in waves, verified like a step's, and
  /// are the first to leave again: of the device's slots no more than one in eight is taken from
  /// what steps use (and never fewer than one chunk of blocks), of the host's frames likewise. What
  /// it finds and moves is in the routes and in `attends`, not in the hits; selectors learn
  /// nothing. Keys and values are converted once for all queries, so that a chunk costs far less
  /// than its queries one by one. With `deterministic` the result does not depend on what is
  /// resident.
  ///
  /// Fails like `step`; of `report`, `attended` stays empty (it would name every block), the counts
  /// of tokens, `failures` and `timing` are filled in.
  Status attend(const ExactRequest& request, StepReport* report);

  /// What `step` would attend, brought to the device and held there for an engine that attends it
  /// by itself: selects, resolves and fetches by the same plan, counts as a step and looks ahead
  /// like one. `out` and `lse` are not used; nothing is estimated; blocks come whole, whatever keys
  /// the selector keeps, since the engine reads keys in their slots. The open tail block is among
  /// the ranges; causality among several queries is the engine's.
  ///
  /// `no_space` names the bytes when the selection does not fit beside what is held on the device;
  /// `unsupported` for several queries that each select for themselves; otherwise fails like
  /// `step`, with `resolved->failures`. Nothing is held after a failure.
  Status resolve(const StepRequest& request, ResolvedBlocks* resolved);

  /// Saves the whole runs of the first `token_ids.size()` tokens, whose ids these are, so that
  /// `Runtime::restore_sequence` finds them, in this process or a later one, with the selectors'
  /// states as of the last run's end. Returns how many tokens those are. Runs that the store has
  /// already are shared. Durable, when this returns, as the store promises; the sequence goes on.
  /// Extents that are on disk alone are read. `value`, a finite number: larger stays longer; runs
  /// that the store has already keep theirs. Selectors' states of more than some GiB together are
  /// left out: a restore then shows the selectors every key again.
  ///
  /// `invalid_argument` when there is no whole run (`PrefixStore::tokens_per_run`), or a layer has
  /// fewer tokens; `corrupt` when a block is damaged for good; the store's errors. After a failure
  /// nothing is visible.
  Result<std::uint32_t> save(PrefixStore& store, std::span<const std::uint32_t> token_ids,
                             double value = 0.0);

  /// What this sequence occupies. Cost: linear in its blocks.
  SequenceStats stats() const;

  /// Gives every block, frame and place back that no other sequence shares; waits for transfers
  /// that still use them. Closed afterwards, whatever it returns.
  Status close();

 private:
  friend class Runtime;
  struct State;
  explicit Sequence(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace kvtier
