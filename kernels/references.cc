#include "kernels/gather_blocks.h"
#include "kernels/merge_states.h"
#include "kernels/score_rows.h"
#include "kernels/top_k.h"
#include "kernels/weighted_rows.h"
#include "memory/dtype.h"

#include <algorithm>
#include <cmath>
#include <numeric>

// The obvious version of each kernel, in float64 where there is arithmetic; for tests.

namespace kvtier {

void gather_blocks_reference(std::span<const CopySpan> spans) {
  for (const CopySpan& span : spans) {
    for (std::size_t i = 0; i < span.bytes; ++i) span.target[i] = span.source[i];
  }
}

void merge_states_reference(StatesView target, StatesView source, std::size_t rows,
                            std::uint32_t value_dim) {
  for (std::size_t row = 0; row < rows; ++row) {
    const double a = double{target.lse[row]};
    const double b = double{source.lse[row]};
    const double top = std::max(a, b);
    if (std::isinf(top)) continue;
    const double weight_a = std::exp(a - top);
    const double weight_b = std::exp(b - top);
    for (std::size_t i = row * value_dim; i < (row + 1) * value_dim; ++i) {
      target.out[i] =
          static_cast<float>((weight_a * double{target.out[i]} + weight_b * double{source.out[i]}) /
                             (weight_a + weight_b));
    }
    target.lse[row] = static_cast<float>(top + std::log(weight_a + weight_b));
  }
}

void apply_sink_logits_reference(StatesView target, std::span<const float> sink_logits,
                                 std::uint32_t value_dim) {
  for (std::size_t row = 0; row < sink_logits.size(); ++row) {
    const double lse = double{target.lse[row]};
    const double sink = double{sink_logits[row]};
    const double top = std::max(lse, sink);
    if (std::isinf(top)) continue;
    const double with_sink = top + std::log(std::exp(lse - top) + std::exp(sink - top));
    for (std::size_t i = row * value_dim; i < (row + 1) * value_dim; ++i) {
      target.out[i] = static_cast<float>(std::exp(lse - with_sink) * double{target.out[i]});
    }
    target.lse[row] = static_cast<float>(with_sink);
  }
}

void score_rows_reference(const SoftmaxOptions& softmax, const ScoreTask& task) {
  for (std::size_t q = 0; q < task.query_count; ++q) {
    for (std::size_t r = 0; r < task.row_count(); ++r) {
      const std::byte* row = task.rows.row(task.listed.empty() ? r : task.listed[r]);
      double dot = 0.0;
      for (std::uint32_t i = 0; i < task.rows.dim; ++i) {
        dot += double{task.queries[q * task.query_stride + i]} *
               double{load_element(row, task.rows.dtype, i)};
      }
      double logit = double{softmax.scale} * dot;
      if (softmax.logit_cap > 0.0f) {
        logit = double{softmax.logit_cap} * std::tanh(logit / double{softmax.logit_cap});
      }
      task.logits[q * task.logit_stride + r] = static_cast<float>(logit);
    }
  }
}

void sum_weighted_rows_reference(const WeightedRows& task) {
  for (std::size_t s = 0; s < task.sums; ++s) {
    for (std::size_t i = 0; i < task.rows.dim; ++i) {
      double sum = 0.0;
      for (std::size_t r = 0; r < task.rows.rows; ++r) {
        sum += double{task.weights[s * task.weight_stride + r]} *
               double{load_element(task.rows.row(r), task.rows.dtype, i)};
      }
      task.target[s * task.target_stride + i] = static_cast<float>(sum);
    }
  }
}

std::span<std::uint32_t> top_k_reference(std::span<const float> scores, std::size_t k,
                                         std::span<std::uint32_t> order) {
  const std::span<std::uint32_t> all = order.first(scores.size());
  std::iota(all.begin(), all.end(), 0u);
  std::stable_sort(all.begin(), all.end(),
                   [scores](std::uint32_t a, std::uint32_t b) { return scores[a] > scores[b]; });
  return all.first(std::min(k, all.size()));
}

}  // namespace kvtier
