#pragma once

#include "kernels/worker_pool.h"
#include "memory/status.h"
#include "tools/trace/attention_trace.h"

#include <cstdint>
#include <span>
#include <vector>

namespace kvtier {

/// Exact attention of the recorded queries over every token they see: what a replay is measured by.
///
/// Reads the trace alone and shares nothing with the runtime but the dot product of `score_rows`.
/// Works on one step of one layer at a time; several threads may read, one at a time may move on.
/// Memory: values of one layer as float32, and 12 bytes per token and query head.
class ExactAttention {
 public:
  /// Both outlive it.
  ExactAttention(const AttentionTrace& trace, WorkerPool& pool);

  /// Moves to `trace.layers()[index]`; call `move_to_step` next.
  void move_to_layer(std::size_t index);
  /// Computes the weights of a step. `corrupt` when a logit overflows float32.
  Status move_to_step(std::uint32_t step);

  std::uint32_t visible() const { return visible_; }
  /// Softmax over the visible tokens, of one query head; sink logits do not take part.
  std::span<const float> weights(std::uint32_t head) const {
    return {weights_.data() + head * row_stride_, visible_};
  }
  /// Weights of consecutive query heads lie this many elements apart.
  std::size_t row_stride() const { return row_stride_; }
  /// Weight on positions [begin, end).
  double mass(std::uint32_t head, std::uint32_t begin, std::uint32_t end) const {
    const double* sums = sums_.data() + head * (row_stride_ + 1);
    return sums[end] - sums[begin];
  }

  /// One query as the trace has it: [head_dim].
  std::span<const float> query(std::uint32_t head) const {
    return std::span(queries_).subspan(head * queries_.size() / lse_.size(),
                                       queries_.size() / lse_.size());
  }
  /// Log of the sum that the weights of a query head are relative to.
  float lse(std::uint32_t head) const { return lse_[head]; }

  /// Attention over the tokens of `spans` alone, from the weights: [value_dim]. False, and `out` is
  /// left alone, when their weights are too small to tell (next to nothing of the mass).
  bool attend(std::uint32_t head, std::span<const TokenSpan> spans, std::span<float> out) const;
  /// The same with other weights, [visible] on the same scale.
  bool attend_weighted(std::uint32_t head, std::span<const TokenSpan> spans,
                       std::span<const float> weights, std::span<float> out) const;
  /// Attention over everything: the trace's own `out`, or in float64 where it has none.
  void exact_out(std::uint32_t head, std::span<float> out) const;

 private:
  std::uint32_t kv_head(std::uint32_t head) const { return head / queries_per_kv_head_; }
  float sink_weight(std::uint32_t head, double mass) const;
  bool attend_total(std::uint32_t head, std::span<const TokenSpan> spans,
                    std::span<const float> weights, double total, std::span<float> out) const;
  void load_rows(std::span<const std::byte> source, std::uint32_t dim, std::vector<float>& target);
  void exact_out_from_rows(std::uint32_t head, std::span<float> out) const;

  const AttentionTrace& trace_;
  WorkerPool& pool_;
  const TraceLayer* layer_ = nullptr;
  std::uint32_t queries_per_kv_head_;
  std::size_t row_stride_;
  std::uint32_t step_ = 0;
  std::uint32_t visible_ = 0;
  std::vector<float> keys_;     ///< [kv_heads, tokens, head_dim]; empty when the trace has `out`.
  std::vector<float> values_;   ///< [kv_heads, tokens, value_dim]
  std::vector<float> queries_;  ///< [query_heads, head_dim]
  std::vector<float> weights_;  ///< [query_heads, row_stride]
  std::vector<float> lse_;      ///< [query_heads]
  std::vector<double> sums_;    ///< [query_heads, row_stride + 1]: weights before each token.
};

/// Reads `count` elements of `dtype` as float32.
void load_floats(std::span<const std::byte> source, DType dtype, std::span<float> target);

/// Distance of `out` from `reference`, relative to the length of `reference`. A reference of zeros
/// has no length: then 0 for equal and 1 for different.
double relative_error(std::span<const float> out, std::span<const float> reference);

}  // namespace kvtier
