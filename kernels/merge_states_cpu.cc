#include "kernels/merge_states.h"

#include "kernels/kv_view.h"
#include "memory/check.h"

#include <algorithm>
#include <cmath>

// Plain loops: a merge touches a few KiB per step and head group, so one instruction set serves.

namespace kvtier {

void merge_states(StatesView target, StatesView source, std::size_t rows, std::uint32_t value_dim) {
  for (std::size_t row = 0; row < rows; ++row) {
    float* out = target.out + row * value_dim;
    const float* other = source.out + row * value_dim;
    const float a = target.lse[row];
    const float b = source.lse[row];
    if (b == kEmptyLse) continue;
    if (a == kEmptyLse) {
      std::copy_n(other, value_dim, out);
      target.lse[row] = b;
      continue;
    }
    const double top = double{std::max(a, b)};
    const double weight_a = std::exp(double{a} - top);
    const double weight_b = std::exp(double{b} - top);
    const auto share_a = static_cast<float>(weight_a / (weight_a + weight_b));
    const auto share_b = static_cast<float>(weight_b / (weight_a + weight_b));
    for (std::uint32_t i = 0; i < value_dim; ++i) out[i] = share_a * out[i] + share_b * other[i];
    target.lse[row] = static_cast<float>(top + std::log(weight_a + weight_b));
  }
}

void apply_sink_logits(StatesView target, std::span<const float> sink_logits,
                       std::uint32_t value_dim) {
  for (std::size_t row = 0; row < sink_logits.size(); ++row) {
    const float sink = sink_logits[row];
    KVTIER_CHECK(!std::isnan(sink), "sink logit {} is not a number", row);
    if (sink == kEmptyLse) continue;
    const float lse = target.lse[row];
    if (lse == kEmptyLse) {
      // Nothing but the sink: it has all the weight, and the values' share stays zero.
      target.lse[row] = sink;
      continue;
    }
    const double top = double{std::max(lse, sink)};
    const double weight = std::exp(double{lse} - top);
    const double sum = weight + std::exp(double{sink} - top);
    const auto share = static_cast<float>(weight / sum);
    float* out = target.out + row * value_dim;
    for (std::uint32_t i = 0; i < value_dim; ++i) out[i] *= share;
    target.lse[row] = static_cast<float>(top + std::log(sum));
  }
}

}  // namespace kvtier
