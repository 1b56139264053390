#include "selectors/step_logits.h"

#include <algorithm>
#include <bit>

namespace kvtier {
namespace {

constexpr std::uint32_t kExponent = 0x7f800000;

}  // namespace

void StepLogits::reserve(std::size_t queries) {
  queries_ = queries;
  if (queries <= queries_max_) return;
  logits_ = FixedArray<float>(tasks_.size() * queries * row_stride_);
  queries_max_ = queries;
}

Status StepLogits::compute(const SelectRequest& request, std::uint32_t first_head,
                           std::span<const RowsView> rows, WorkerPool& pool) {
  KVTIER_CHECK(rows.size() <= tasks_.size(), "{} heads at once, at most {}", rows.size(),
               tasks_.size());
  const std::size_t per_query = shape_.queries_per_kv_head;
  const std::size_t dim = shape_.head_dim;
  reserve(request.query_count * per_query);
  if (queries_ > packed_max_) {
    packed_ = FixedArray<float>(tasks_.size() * queries_ * dim);
    packed_max_ = queries_;
  }
  for (std::size_t i = 0; i < rows.size(); ++i) {
    // Together they are scored in one pass over the rows, so the steps' queries of a head must be
    // evenly spaced, which they are not in the request: other heads lie between them.
    float* packed = packed_.data() + i * queries_ * dim;
    for (std::size_t q = 0; q < request.query_count; ++q) {
      const float* source =
          request.queries + q * request.query_stride + (first_head + i) * per_query * dim;
      std::copy_n(source, per_query * dim, packed + q * per_query * dim);
    }
    tasks_[i] = {.rows = rows[i],
                 .queries = packed,
                 .query_stride = dim,
                 .query_count = static_cast<std::uint32_t>(queries_),
                 .logits = all_rows(i).data(),
                 .logit_stride = row_stride_};
  }
  return score_rows(shape_.softmax, std::span(tasks_.data(), rows.size()), pool);
}

bool all_finite(std::span<const float> values) {
  // All exponent bits set means infinite or NaN; integers, so that the loop vectorises.
  std::uint32_t bad = 0;
  for (float value : values) {
    bad |=
        static_cast<std::uint32_t>((std::bit_cast<std::uint32_t>(value) & kExponent) == kExponent);
  }
  return bad == 0;
}

}  // namespace kvtier
