#pragma once

#include "memory/clock.h"
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

/// Tokens that were attended: of one head group and one block.
struct AttendedRange {
  HeadGroup head_group;
  BlockIndex block;
  std::uint32_t first_token = 0;  ///< Within the block.
  std::uint32_t tokens = 0;
  static constexpr std::uint32_t kEveryQuery = 0xFFFFFFFF;
  std::uint32_t query = kEveryQuery;  ///< Which of the step's queries attended it.
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

class Sequence;

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
  /// the same tokens. `no_space` when `sequences_max` are open.
  Result<std::unique_ptr<Sequence>> create_sequence(Origin origin);

  /// Counters so far; cheap, and still there after `close`. Functions of the calls alone, but for
  /// the routes: of their counters only `submitted_bytes` is, the others follow the transfers.
  RuntimeStats stats() const;

  /// Ends all transfers and writes, closes the transfer engine. Every sequence is closed before.
  /// Returns the first failure of a disk write that repeating did not mend, whether or not `append`
  /// has told of it.
  Status close();

 private:
  friend class Sequence;
  struct State;
  explicit Runtime(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

/// One request's tokens. Made by a runtime, closed before it; one thread at a time.
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
  /// nearer to exact attention over everything, the selector's estimate of the rest. Residency
  /// changes only here and in `append`, as a function of the calls. Waits for bytes that are on
  /// their way.
  ///
  /// `corrupt` or `io_error` when a wanted block could not be had from any tier: `report->failures`
  /// names each one, out and lse are NaN, and the sequence goes on. `invalid_argument`: a query
  /// that is not finite, a budget below sinks + window, more queries than tokens.
  Status step(const StepRequest& request, StepReport* report);

  /// Gives every block, frame and place back; waits for transfers that still use them.
  Status close();

 private:
  friend class Runtime;
  struct State;
  explicit Sequence(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace kvtier
