#include "selectors/coarse_logits.h"

#include "kernels/score_bounds.h"

#include <algorithm>
#include <cmath>

namespace kvtier {
namespace {

/// For dots without the cap, since bounds and means are averaged before it.
SelectorShape uncapped(SelectorShape shape, std::uint32_t vectors_per_row) {
  shape.softmax.logit_cap = 0.0f;
  shape.head_dim *= vectors_per_row;
  return shape;
}

}  // namespace

CoarseLogits::CoarseLogits(const SelectorShape& shape, const Options& options)
    : shape_(shape),
      options_(options),
      groups_max_(shape.tokens_max / options.group_tokens + 1),
      means_(uncapped(shape, 1), shape.kv_heads, groups_max_),
      views_(shape.kv_heads) {
  const bool boxes = options.rule != Rule::kMean;
  KVTIER_CHECK(!boxes || options.mean_bits == 0, "boxes beside means of {} bits",
               options.mean_bits);
  if (options.mean_bits != 0) {
    coded_.emplace(shape, options.group_tokens, options.mean_bits);
  } else {
    rows_.emplace(shape, GroupRows::Options{.group_tokens = options.group_tokens, .boxes = boxes});
  }
  if (boxes) bounds_.emplace(uncapped(shape, 2), shape.kv_heads, groups_max_);
}

void CoarseLogits::append(const NewTokens& tokens) {
  return coded_ ? coded_->append(tokens) : rows_->append(tokens);
}
void CoarseLogits::truncate(std::uint32_t position) {
  return coded_ ? coded_->truncate(position) : rows_->truncate(position);
}
std::uint32_t CoarseLogits::truncate_floor(std::uint32_t position) const {
  return coded_ ? coded_->truncate_floor(position) : rows_->truncate_floor(position);
}
void CoarseLogits::save(StateWriter& writer) const {
  return coded_ ? coded_->save(writer) : rows_->save(writer);
}
Status CoarseLogits::restore(StateReader& reader) {
  return coded_ ? coded_->restore(reader) : rows_->restore(reader);
}
std::size_t CoarseLogits::metadata_bytes() const {
  return coded_ ? coded_->metadata_bytes() : rows_->metadata_bytes();
}

Status CoarseLogits::compute(const SelectRequest& request, std::uint32_t visible,
                             WorkerPool& pool) {
  if (coded_) return coded_->score(request, visible, means_, pool);
  const std::uint32_t groups = (visible - 1) / options_.group_tokens + 1;
  rows_->record_open_group(visible);
  for (std::uint32_t head = 0; head < shape_.kv_heads; ++head) {
    views_[head] = rows_->means(head, 0, groups);
  }
  KVTIER_RETURN_IF_ERROR(means_.compute(request, 0, views_, pool));
  return bounds_ ? compute_bounds(request, groups, pool) : Status();
}

/// sum_i max(q_i high_i, q_i low_i) is one dot: of the query's positive elements with the upper
/// corner and of its negative ones with the lower.
Status CoarseLogits::compute_bounds(const SelectRequest& request, std::uint32_t groups,
                                    WorkerPool& pool) {
  const std::size_t dim = shape_.head_dim;
  const std::size_t stride = 2 * dim * shape_.query_heads();
  split_.resize(std::max(split_.size(), stride * request.query_count));
  for (std::uint32_t q = 0; q < request.query_count; ++q) {
    const float* from = request.queries + q * request.query_stride;
    float* target = split_.data() + q * stride;
    for (std::uint32_t head = 0; head < shape_.query_heads(); ++head) {
      split_by_sign(std::span(from + head * dim, dim), 1.0f, target + 2 * head * dim);
    }
  }
  for (std::uint32_t head = 0; head < shape_.kv_heads; ++head) {
    views_[head] = rows_->boxes(head, 0, groups);
  }
  SelectRequest split = request;
  split.queries = split_.data();
  split.query_stride = stride;
  return bounds_->compute(split, 0, views_, pool);
}

bool CoarseLogits::finish(std::uint32_t head, std::uint32_t row, std::uint32_t first,
                          std::uint32_t count) {
  const std::span<float> means = means_.row(head, row, first + count).subspan(first);
  bool finite = all_finite(means);
  std::span<float> bounds;
  if (bounds_) {
    bounds = bounds_->row(head, row, first + count).subspan(first);
    const float of_mean = options_.rule == Rule::kMeanMinMax ? 0.5f : 0.0f;
    for (std::size_t g = 0; g < bounds.size(); ++g) {
      bounds[g] = of_mean * means[g] + (1.0f - of_mean) * bounds[g];
    }
    finite = finite && all_finite(bounds);
  }
  const float cap = shape_.softmax.logit_cap;
  if (cap > 0.0f) {
    for (float& logit : means) logit = cap * std::tanh(logit / cap);
    for (float& logit : bounds) logit = cap * std::tanh(logit / cap);
  }
  return finite;
}

}  // namespace kvtier
