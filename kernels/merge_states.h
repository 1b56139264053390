#pragma once

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

/// Obvious float64 versions for tests.
void merge_states_reference(StatesView target, StatesView source, std::size_t rows,
                            std::uint32_t value_dim);
void apply_sink_logits_reference(StatesView target, std::span<const float> sink_logits,
                                 std::uint32_t value_dim);

}  // namespace kvtier
