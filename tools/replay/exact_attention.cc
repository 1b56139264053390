#include "tools/replay/exact_attention.h"

#include "kernels/score_rows.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

namespace kvtier {
namespace {

/// Below this share of the mass, float32 weights are too coarse to renormalise.
constexpr double kLeastMass = 1e-30;
/// Elements that are summed side by side: the inner loops have this fixed length, so that compilers
/// vectorise them. Value dims are multiples of it.
constexpr std::uint32_t kLanes = 8;

/// sum += weight[t] * values[t][lanes] over tokens [begin, end).
void add_weighted(std::span<const float> weights, const float* values, std::size_t stride,
                  TokenSpan span, std::array<double, kLanes>& sum) {
  // float32 within a tile and float64 across tiles: as fast as one and nearly as good as the other.
  constexpr std::uint32_t kTile = 64;
  for (std::uint32_t begin = span.begin; begin < span.end; begin += kTile) {
    const std::uint32_t end = std::min(span.end, begin + kTile);
    std::array<float, kLanes> tile{};
    for (std::uint32_t t = begin; t < end; ++t) {
      const float* row = values + t * stride;
      for (std::uint32_t i = 0; i < kLanes; ++i) tile[i] += weights[t] * row[i];
    }
    for (std::uint32_t i = 0; i < kLanes; ++i) sum[i] += tile[i];
  }
}

}  // namespace

void load_floats(std::span<const std::byte> source, DType dtype, std::span<float> target) {
  for (std::size_t i = 0; i < target.size(); ++i) {
    target[i] = load_element(source.data(), dtype, i);
  }
}

double relative_error(std::span<const float> out, std::span<const float> reference) {
  double difference = 0;
  double length = 0;
  for (std::size_t i = 0; i < out.size(); ++i) {
    const double delta = double{out[i]} - double{reference[i]};
    difference += delta * delta;
    length += double{reference[i]} * double{reference[i]};
  }
  if (length == 0) return difference == 0 ? 0 : 1;
  const double error = std::sqrt(difference / length);
  return std::isfinite(error) ? error : std::numeric_limits<double>::infinity();
}

ExactAttention::ExactAttention(const AttentionTrace& trace, WorkerPool& pool)
    : trace_(trace),
      pool_(pool),
      queries_per_kv_head_(trace.manifest().model.query_heads / trace.manifest().model.kv_heads),
      row_stride_(trace.manifest().tokens) {
  const TraceModel& model = trace.manifest().model;
  queries_.resize(std::size_t{model.query_heads} * model.head_dim);
  weights_.resize(model.query_heads * row_stride_);
  lse_.resize(model.query_heads);
  sums_.resize(model.query_heads * (row_stride_ + 1));
}

void ExactAttention::load_rows(std::span<const std::byte> source, std::uint32_t dim,
                               std::vector<float>& target) {
  const std::uint32_t heads = trace_.manifest().model.kv_heads;
  const DType dtype = trace_.manifest().dtype;
  const std::size_t tokens = trace_.manifest().tokens;
  const std::size_t row_bytes = dim * size_of(dtype);
  target.resize(heads * tokens * dim);
  pool_.run(tokens, [&](std::size_t token) {
    for (std::uint32_t head = 0; head < heads; ++head) {
      load_floats(source.subspan((token * heads + head) * row_bytes, row_bytes), dtype,
                  std::span(target).subspan((head * tokens + token) * dim, dim));
    }
  });
}

void ExactAttention::move_to_layer(std::size_t index) {
  layer_ = &trace_.layers()[index];
  visible_ = 0;
  const TraceModel& model = trace_.manifest().model;
  load_rows(layer_->values, model.value_dim, values_);
  if (layer_->out.empty()) load_rows(layer_->keys, model.head_dim, keys_);
}

Status ExactAttention::move_to_step(std::uint32_t step) {
  const TraceManifest& manifest = trace_.manifest();
  const TraceModel& model = manifest.model;
  step_ = step;
  visible_ = trace_.query_positions()[step] + 1;
  const std::size_t query_bytes = queries_.size() * size_of(manifest.dtype);
  load_floats(layer_->queries.subspan(step * query_bytes, query_bytes), manifest.dtype, queries_);

  const std::size_t row_bytes = model.head_dim * size_of(manifest.dtype);
  std::vector<ScoreTask> tasks;
  for (std::uint32_t head = 0; head < model.kv_heads; ++head) {
    const std::size_t first = std::size_t{head} * queries_per_kv_head_;
    tasks.push_back({.rows = {layer_->keys.data() + head * row_bytes, visible_, model.head_dim,
                              model.kv_heads * row_bytes, manifest.dtype},
                     .queries = queries_.data() + first * model.head_dim,
                     .query_stride = model.head_dim,
                     .query_count = queries_per_kv_head_,
                     .logits = weights_.data() + first * row_stride_,
                     .logit_stride = row_stride_});
  }
  const SoftmaxOptions softmax{.scale = static_cast<float>(manifest.softmax_scale),
                               .logit_cap = static_cast<float>(manifest.logit_cap)};
  KVTIER_RETURN_IF_ERROR(score_rows(softmax, tasks, pool_));
  pool_.run(model.query_heads, [&](std::size_t head) {
    const std::span<float> row(weights_.data() + head * row_stride_, visible_);
    lse_[head] = softmax_row(row);
    double* sums = sums_.data() + head * (row_stride_ + 1);
    double sum = 0;
    for (std::size_t t = 0; t < row.size(); ++t) {
      sums[t] = sum;
      sum += double{row[t]};
    }
    sums[row.size()] = sum;
  });
  for (std::uint32_t head = 0; head < model.query_heads; ++head) {
    if (std::isfinite(lse_[head])) continue;
    return corrupt(fmt::format("{}: layer {}, step {}, head {}: logits overflow float32",
                               trace_.manifest_path(), layer_->number, step, head));
  }
  return {};
}

float ExactAttention::sink_weight(std::uint32_t head, double mass) const {
  if (layer_->sink_logits.empty()) return 0;
  // Relative to the attended tokens' own sum of exponentials.
  const double lse = double{lse_[head]} + std::log(mass);
  return static_cast<float>(std::exp(double{layer_->sink_logits[head]} - lse));
}

bool ExactAttention::attend(std::uint32_t head, std::span<const TokenSpan> spans,
                            std::span<float> out) const {
  double total = 0;
  for (const TokenSpan& span : spans) total += mass(head, span.begin, span.end);
  return attend_total(head, spans, weights(head), total, out);
}

bool ExactAttention::attend_weighted(std::uint32_t head, std::span<const TokenSpan> spans,
                                     std::span<const float> weights, std::span<float> out) const {
  double total = 0;
  for (const TokenSpan& span : spans) {
    for (std::uint32_t t = span.begin; t < span.end; ++t) total += double{weights[t]};
  }
  return attend_total(head, spans, weights, total, out);
}

bool ExactAttention::attend_total(std::uint32_t head, std::span<const TokenSpan> spans,
                                  std::span<const float> weights, double total,
                                  std::span<float> out) const {
  if (!(total > kLeastMass)) return false;
  const double scale = 1.0 / (total * (1.0 + double{sink_weight(head, total)}));
  const std::uint32_t dim = static_cast<std::uint32_t>(out.size());
  const float* values = values_.data() + kv_head(head) * row_stride_ * dim;
  for (std::uint32_t first = 0; first < dim; first += kLanes) {
    std::array<double, kLanes> sum{};
    for (const TokenSpan& span : spans) {
      add_weighted(weights, values + first, dim, span, sum);
    }
    for (std::uint32_t i = 0; i < kLanes; ++i) out[first + i] = static_cast<float>(sum[i] * scale);
  }
  return true;
}

void ExactAttention::exact_out(std::uint32_t head, std::span<float> out) const {
  if (layer_->out.empty()) return exact_out_from_rows(head, out);
  const std::size_t heads = trace_.manifest().model.query_heads;
  std::ranges::copy(layer_->out.subspan((step_ * heads + head) * out.size(), out.size()),
                    out.begin());
  // What a trace records is attention without sink logits.
  const float scale = 1.0f / (1.0f + sink_weight(head, 1.0));
  for (float& value : out) value *= scale;
}

void ExactAttention::exact_out_from_rows(std::uint32_t head, std::span<float> out) const {
  const TraceManifest& manifest = trace_.manifest();
  const std::uint32_t dim = manifest.model.head_dim;
  const float* query = queries_.data() + std::size_t{head} * dim;
  const float* keys = keys_.data() + kv_head(head) * row_stride_ * dim;
  std::vector<double> logits(visible_);
  double largest = -std::numeric_limits<double>::infinity();
  for (std::uint32_t t = 0; t < visible_; ++t) {
    double dot = 0;
    for (std::uint32_t i = 0; i < dim; ++i) {
      dot += double{query[i]} * double{keys[std::size_t{t} * dim + i]};
    }
    logits[t] = dot * manifest.softmax_scale;
    if (manifest.logit_cap > 0) {
      logits[t] = manifest.logit_cap * std::tanh(logits[t] / manifest.logit_cap);
    }
    largest = std::max(largest, logits[t]);
  }
  std::vector<double> sum(out.size());
  double total = 0;
  if (!layer_->sink_logits.empty()) total = std::exp(double{layer_->sink_logits[head]} - largest);
  const float* values = values_.data() + kv_head(head) * row_stride_ * out.size();
  for (std::uint32_t t = 0; t < visible_; ++t) {
    const double weight = std::exp(logits[t] - largest);
    total += weight;
    for (std::size_t i = 0; i < out.size(); ++i)
      sum[i] += weight * double{values[t * out.size() + i]};
  }
  for (std::size_t i = 0; i < out.size(); ++i) out[i] = static_cast<float>(sum[i] / total);
}

}  // namespace kvtier
