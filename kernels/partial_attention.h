#pragma once

#include "kernels/kv_view.h"
#include "kernels/worker_pool.h"
#include "memory/status.h"

#include <cstdint>
#include <memory>
#include <span>

namespace kvtier {

/// Largest number of queries of one step: a token, or a draft to verify. Tasks with more are
/// prompts, for which each key and value is converted once for many queries.
inline constexpr std::uint32_t kMaxStepQueries = 8;
/// Tokens whose logits are computed before the running maximum is updated once.
inline constexpr std::uint32_t kAttentionTileTokens = 64;
/// Tokens of a task that are attended from an empty state before they are merged: what one worker
/// takes. Attending sub-lists of whole chunks one by one and merging them in order is repeatable.
inline constexpr std::uint32_t kAttentionChunkTokens = 8 * kAttentionTileTokens;
/// Largest head and value dimensions, and query heads per KV head.
inline constexpr std::uint32_t kMaxAttentionDim = 576;
inline constexpr std::uint32_t kMaxGroupQueries = 16;

/// Attention of one head group's query heads over a list of blocks.
///
/// `G = query heads per KV head`, `H = layout.heads_per_block()`. All numbers are float32, log is
/// natural. Views: everything outlives the call.
struct AttentionTask {
  /// [queries, H * G, head_dim]; query head h of the group attends KV head h / G of the block.
  const float* queries = nullptr;
  /// Elements from one query to the next; H * G * head_dim when they are contiguous.
  std::size_t query_stride = 0;
  std::uint32_t query_count = 1;
  /// Position of each query, ascending: tokens behind it are masked. Empty: nothing is masked.
  std::span<const std::uint32_t> query_positions;
  std::span<const BlockRange> blocks;
  /// [queries, H * G, value_dim]: softmax-weighted mean of the values, zeros when nothing is
  /// attended.
  float* out = nullptr;
  std::size_t out_stride = 0;  ///< Elements from one query's out to the next's.
  /// [queries, H * G]: log of the sum of exp(logit), `kEmptyLse` when nothing is attended.
  float* lse = nullptr;
  std::size_t lse_stride = 0;
};

struct AttentionParams {
  const BlockLayout* layout = nullptr;
  std::uint32_t queries_per_kv_head = 1;  ///< G, 1 to 16.
  SoftmaxOptions softmax;
};

class AttentionWorkspace;

/// Attends every task. Works in tiles of `kAttentionTileTokens` whose order and grouping depend on
/// the task alone, so a result does not depend on the number of workers. Splits long lists over the
/// workers in chunks; a pool of one runs on the calling thread.
///
/// A task of more than `kMaxStepQueries` queries is split over the workers by rows instead, and its
/// tiles are multiplied as small matrices; tiles that no query of a piece sees cost nothing. Its
/// states are summed tile by tile in float32.
///
/// Returns `unsupported` for head or value dims that are not multiples of 8 or above 576, no query
/// at all, or G above 16; `invalid_argument` never: wrong views are bugs.
/// Allocates nothing after `workspace` has grown to the task sizes seen.
Status partial_attention(const AttentionParams& params, std::span<const AttentionTask> tasks,
                         AttentionWorkspace& workspace, WorkerPool& pool);

/// Scratch memory of `partial_attention`: one per caller, not thread-safe, grows and never shrinks.
class AttentionWorkspace {
 public:
  AttentionWorkspace();
  ~AttentionWorkspace();
  AttentionWorkspace(AttentionWorkspace&&) noexcept;
  AttentionWorkspace& operator=(AttentionWorkspace&&) noexcept;

  struct State;
  State& state() { return *state_; }

 private:
  std::unique_ptr<State> state_;
};

/// The obvious loops in float64 over the same task; for tests and tools.
void partial_attention_reference(const AttentionParams& params, const AttentionTask& task);

}  // namespace kvtier
