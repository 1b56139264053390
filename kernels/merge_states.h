#pragma once

#include "kernels/gpu.h"
#include "memory/dtype.h"
#include "memory/status.h"
#include "memory/stream_ref.h"

#include <cstddef>
#include <cstdint>
#include <span>

namespace kvtier {

/// Partial results of attention over disjoint sets of tokens: rows of [value_dim] and one lse each.
struct StatesView {
  float* out = nullptr;  ///< [rows, value_dim], contiguous.
  float* lse = nullptr;  ///< [rows], natural log; `kEmptyLse` for an empty set.
};

/// Folds `source` into `target`: afterwards `target` is the attention over both sets.
/// out = (e^lseA outA + e^lseB outB) / (e^lseA + e^lseB), lse = log(e^lseA + e^lseB), computed from
/// the larger lse, so nothing overflows. An empty side leaves the other bit for bit.
/// (Cascade inference, FlashInfer; the same recurrence as FlashAttention's blocks.)
void merge_states(StatesView target, StatesView source, std::size_t rows, std::uint32_t value_dim);

/// Adds one logit per row to the denominator only: a "sink" that takes weight and gives no value
/// (GPT-OSS). Applied once, to the merged state. `sink_logits` is [rows].
void apply_sink_logits(StatesView target, std::span<const float> sink_logits,
                       std::uint32_t value_dim);

/// Most parts that one call on the GPU merges: hits, misses, what the CPU attended, an estimate.
inline constexpr std::uint32_t kMaxMergeParts = 4;

/// Merging on the GPU: several parts at once, sinks, and the engine's dtype. Device memory.
struct MergeStatesParams {
  StatesView parts[kMaxMergeParts];  ///< Read only.
  std::uint32_t part_count = 0;
  std::size_t rows = 0;
  std::uint32_t value_dim = 0;  ///< A multiple of 4.
  /// [sink_heads], applied to the merged state: row r takes that of head r % sink_heads. Optional.
  const float* sink_logits = nullptr;
  std::uint32_t sink_heads = 0;
  /// [rows, value_dim]; may be one of the parts when it is float32.
  void* out = nullptr;
  DType out_dtype = DType::kF32;
  float* lse = nullptr;  ///< [rows]; optional, may be one of the parts'.
};

/// Enqueues the merge; the same mathematics as above, in float32, parts in their order. NaN in any
/// part's lse makes the row NaN. Allocates nothing, waits for nothing.
Status merge_states(const Gpu& gpu, const MergeStatesParams& params, StreamRef stream);

/// Obvious float64 versions for tests.
void merge_states_reference(StatesView target, StatesView source, std::size_t rows,
                            std::uint32_t value_dim);
void apply_sink_logits_reference(StatesView target, std::span<const float> sink_logits,
                                 std::uint32_t value_dim);

}  // namespace kvtier
