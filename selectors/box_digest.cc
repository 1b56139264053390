#include "selectors/box_digest.h"

#include "kernels/score_bounds.h"
#include "kernels/score_rows.h"

#include <algorithm>

namespace kvtier {

void BoxDigest::write_row(const RowsView& keys, std::uint32_t, std::byte* row) {
  const auto all = static_cast<std::uint32_t>(keys.rows);
  if (with_mean_) {
    mean_rows(keys, all, row);
    row += vector_bytes_;
  }
  box_rows(keys, all, row);
}

void BoxDigest::write_question(std::span<const float> query, std::uint32_t, float* question) {
  if (!with_mean_) return split_by_sign(query, 1.0f, question);
  std::ranges::transform(query, question, [](float q) { return 0.5f * q; });
  split_by_sign(query, 0.5f, question + head_dim_);
}

}  // namespace kvtier
