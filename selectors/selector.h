#pragma once

#include "kernels/kv_view.h"
#include "kernels/worker_pool.h"
#include "memory/ids.h"
#include "memory/status.h"

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace kvtier {

/// How the query heads that share a KV head (and the queries of one step) become one score.
enum class GroupReduction : unsigned char {
  kMax,   ///< Largest softmax weight over the heads (ShadowKV).
  kSum,   ///< Sum of softmax weights (RetroInfer, TokenSelect): the mass that all heads put there.
  kMean,  ///< Mean of raw logits, no softmax (ArkVale).
};

/// What a selector must know of the layer it selects for.
struct SelectorShape {
  DType dtype = DType::kF16;
  std::uint32_t kv_heads = 1;
  /// KV heads that share one selection: `BlockLayout::heads_per_block`.
  std::uint32_t heads_per_group = 1;
  std::uint32_t queries_per_kv_head = 1;
  std::uint32_t head_dim = 64;
  std::uint32_t tokens_per_block = 8;
  /// First and last tokens of the context that are always attended; never selected, never ranked.
  std::uint32_t sinks = 4;
  std::uint32_t window = 64;
  SoftmaxOptions softmax;
  GroupReduction reduction = GroupReduction::kSum;
  std::uint64_t seed = 0;
  /// Most tokens the context can grow to: what `open` reserves for, so that steps allocate nothing.
  std::uint32_t tokens_max = 0;

  std::uint32_t head_groups() const { return kv_heads / heads_per_group; }
  std::uint32_t query_heads() const { return kv_heads * queries_per_kv_head; }
};

/// Keys of consecutive tokens, as the model attends them (after RoPE). View.
struct TokenKeys {
  /// Row of token t, KV head h: data + t * token_stride_bytes + h * head_stride_bytes.
  const std::byte* data = nullptr;
  std::uint32_t first_position = 0;
  std::uint32_t tokens = 0;
  std::size_t token_stride_bytes = 0;
  std::size_t head_stride_bytes = 0;
};

/// One step's question.
struct SelectRequest {
  /// [query_count, query_heads, head_dim], float32, after RoPE.
  const float* queries = nullptr;
  std::size_t query_stride = 0;  ///< Elements from one query to the next.
  std::uint32_t query_count = 1;
  /// Position of the first query; the others follow it token by token.
  std::uint32_t first_position = 0;
  /// Tokens attended per head group, sinks and window included.
  std::uint32_t budget_tokens = 0;
  /// How many tokens beyond the budget the ranking goes on: candidates for look-ahead.
  std::uint32_t band_tokens = 0;
};

/// The tokens that are ranked: behind the sinks, before the window of the step's first query.
/// A block that straddles an edge takes part with the tokens inside.
struct FarRegion {
  std::uint32_t begin = 0;
  std::uint32_t end = 0;  ///< At least `begin`.

  static FarRegion of(const SelectorShape& shape, std::uint32_t first_position);
  std::uint32_t tokens() const { return end - begin; }
};

/// A selected piece: tokens of one block.
struct SelectedUnit {
  BlockIndex block;
  std::uint32_t first_token = 0;  ///< Within the block.
  std::uint32_t tokens = 0;
  float score = 0.0f;

  friend bool operator==(const SelectedUnit&, const SelectedUnit&) = default;
};

/// The answer for one head group: units best first, each block at most once.
struct GroupSelection {
  std::vector<SelectedUnit> ranked;
  /// ranked[0, chosen) are within the budget; the rest is the band below the cut.
  std::uint32_t chosen = 0;
  /// ranked[0, held) are wanted at every step and stay on the device (outliers).
  std::uint32_t held = 0;
};

/// Decides which blocks one layer of one sequence must attend. Decisions only: no I/O, no clock;
/// the same calls give the same answers.
///
/// One selector per (sequence, layer); one thread at a time. `append` may allocate until
/// `SelectorShape::tokens_max` is reached if the implementation says so; `select` allocates in its
/// first call, and when a step has more queries than any step before.
class Selector {
 public:
  virtual ~Selector() = default;

  /// Takes note of new tokens. `keys.first_position` is the number of tokens seen so far.
  /// Any chunking of the same tokens leads to the same state.
  virtual void append(const TokenKeys& keys) = 0;

  /// Forgets every token at or behind `position`, as if never appended. `position` is one that
  /// `truncate_floor` returns unchanged.
  virtual void truncate(std::uint32_t position) = 0;

  /// Where a cut at `position` must really be made, at or before it: a selector that keeps one
  /// vector for several tokens cannot take some of them back. The caller truncates there and
  /// appends the keys of [floor, position) again, which it has in its blocks:
  ///   `floor = s.truncate_floor(p); s.truncate(floor); if (floor < p) s.append(keys of [floor,
  ///   p));`
  /// The newest keys are kept as they came, so that a rejected draft needs none again: after a
  /// window of appends, the floor of a cut within the window is `position` itself.
  virtual std::uint32_t truncate_floor(std::uint32_t position) const { return position; }

  /// Ranks blocks for the step's queries into `selection`, one entry per head group. Never chooses
  /// more tokens of a group than the budget leaves beside sinks and the windows of all queries;
  /// chooses to within one block of it when enough tokens are there. `invalid_argument` when a
  /// query is not finite or the budget does not cover sinks and window.
  virtual Status select(const SelectRequest& request, std::span<GroupSelection> selection,
                        WorkerPool& pool) = 0;

  /// Bytes of what is kept for the tokens seen, and of fixed state: what a GPU would have to hold.
  virtual std::size_t metadata_bytes() const = 0;
};

}  // namespace kvtier
