// The estimate of what is not chosen, from the weights that token_scores.cc left per cell.

#include "kernels/weighted_rows.h"
#include "selectors/token_scores.h"

#include <algorithm>
#include <cmath>

namespace kvtier {

void TokenScores::mark_chosen(std::uint32_t group, const GroupSelection& selection) {
  std::vector<std::uint8_t>& chosen = chosen_[group];
  std::ranges::fill(chosen, std::uint8_t{0});
  for (std::uint32_t i = 0; i < selection.chosen; ++i) {
    const SelectedUnit& unit = selection.ranked[i];
    const std::uint32_t begin = unit.block.value * shape_.tokens_per_block + unit.first_token;
    const std::uint32_t end = begin + unit.tokens;
    std::fill(chosen.begin() + begin / cell_tokens_,
              chosen.begin() + ((end - 1) / cell_tokens_ + 1), std::uint8_t{1});
  }
}

/// Sums the weights of cells that are not chosen per value group; returns their sum.
double TokenScores::rest_of_row(std::uint32_t head, std::uint32_t row) {
  const float* weights = cells(head, row);
  const float* scales = slice_scales(head, row);
  const std::vector<std::uint8_t>& chosen = chosen_[head / shape_.heads_per_group];
  float* rest = rest_.data() + row_index(head, row) * groups_max_;
  const std::uint32_t per_group = options_.value_tokens / cell_tokens_;
  const std::uint32_t end = (region_.end - 1) / cell_tokens_ + 1;
  double sum = 0.0;
  for (std::uint32_t cell = region_.begin / cell_tokens_; cell < end;) {
    const std::uint32_t group = cell / per_group;
    const std::uint32_t group_end = std::min(end, (group + 1) * per_group);
    float of_group = 0.0f;
    for (; cell < group_end; ++cell) of_group += chosen[cell] != 0 ? 0.0f : weights[cell];
    of_group *= scales[group * options_.value_tokens / kSliceTokens];
    rest[group] = of_group;
    sum += double{of_group};
  }
  return sum;
}

void TokenScores::estimate_head(const SelectRequest& request, const GroupRows& values,
                                StatesView target, std::uint32_t head) {
  const std::uint32_t first = region_.begin / options_.value_tokens;
  const std::uint32_t count = (region_.end - 1) / options_.value_tokens + 1 - first;
  const std::uint32_t heads = shape_.queries_per_kv_head;
  for (std::uint32_t q = 0; q < request.query_count; ++q) {
    const std::size_t target_row =
        std::size_t{q} * shape_.query_heads() + std::size_t{head} * heads;
    for (std::uint32_t h = 0; h < heads; ++h) {
      const std::uint32_t row = q * heads + h;
      const double sum = rest_of_row(head, row);
      const std::span rest(rest_.data() + row_index(head, row) * groups_max_ + first, count);
      // Too little for float32 is nothing.
      const float share = sum > 0.0 ? static_cast<float>(1.0 / sum) : 0.0f;
      const bool empty = !(share > 0.0f && std::isfinite(share));
      for (float& weight : rest) weight = empty ? 0.0f : weight * share;
      target.lse[target_row + h] =
          empty ? kEmptyLse
                : static_cast<float>(double{lse_[row_index(head, row)]} + std::log(sum));
    }
    sum_weighted_rows({.rows = values.means(head, first, count),
                       .weights = rest_.data() + row_index(head, q * heads) * groups_max_ + first,
                       .weight_stride = groups_max_,
                       .sums = heads,
                       .target = target.out + target_row * shape_.value_dim,
                       .target_stride = shape_.value_dim});
  }
}

void TokenScores::estimate_rest(const SelectRequest& request,
                                std::span<const GroupSelection> selection, GroupRows& values,
                                StatesView target, WorkerPool& pool) {
  const std::size_t rows = std::size_t{request.query_count} * shape_.query_heads();
  const FarRegion region = FarRegion::of(shape_, request.first_position);
  if (region.tokens() == 0) {
    std::fill_n(target.out, rows * shape_.value_dim, 0.0f);
    std::fill_n(target.lse, rows, kEmptyLse);
    return;
  }
  KVTIER_CHECK(region.begin == region_.begin && region.end == region_.end &&
                   rows_ == request.query_count * shape_.queries_per_kv_head,
               "an estimate for the far tokens [{}, {}), scored were [{}, {})", region.begin,
               region.end, region_.begin, region_.end);
  values.record_open_group(region.end);
  for (std::uint32_t i = 0; i < selection.size(); ++i) mark_chosen(i, selection[i]);
  struct Job {
    const SelectRequest& request;
    const GroupRows& values;
    StatesView target;
  } job{request, values, target};
  pool.run(shape_.kv_heads, [this, &job](std::size_t head) {
    estimate_head(job.request, job.values, job.target, static_cast<std::uint32_t>(head));
  });
}

}  // namespace kvtier
