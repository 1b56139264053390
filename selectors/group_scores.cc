#include "selectors/group_scores.h"

#include "kernels/score_rows.h"
#include "selectors/step_logits.h"

#include <algorithm>
#include <limits>

namespace kvtier {
namespace {

/// The scores of one query head: added over the step's queries.
bool weigh_query_head(const SelectorShape& shape, const GroupLogits& group, std::size_t head,
                      std::uint32_t query_head, std::span<float> target) {
  bool finite = true;
  for (std::uint32_t q = 0; q < group.query_count; ++q) {
    const std::size_t r = q * shape.queries_per_kv_head + query_head;
    const std::span row(group.logits + head * group.head_stride + r * group.row_stride,
                        target.size());
    finite = finite && all_finite(row);
    if (shape.reduction != GroupReduction::kMean) {
      // exp() of it is zero; not infinite, so that a row of these only still has a maximum.
      for (std::uint32_t i : group.left_out) {
        row[i - group.first] = std::numeric_limits<float>::lowest();
      }
      softmax_row(row);
    }
    if (q == 0) {
      std::ranges::copy(row, target.begin());
    } else {
      for (std::size_t i = 0; i < target.size(); ++i) target[i] += row[i];
    }
  }
  return finite;
}

}  // namespace

bool reduce_logits(const SelectorShape& shape, const GroupLogits& group, std::span<float> scratch,
                   std::span<float> scores) {
  const std::span head_scores = scratch.first(scores.size());
  bool finite = true;
  std::ranges::fill(scores, 0.0f);
  for (std::uint32_t head = 0; head < shape.heads_per_group; ++head) {
    for (std::uint32_t h = 0; h < shape.queries_per_kv_head; ++h) {
      finite = weigh_query_head(shape, group, head, h, head_scores) && finite;
      if (shape.reduction == GroupReduction::kMax) {
        for (std::size_t i = 0; i < scores.size(); ++i) {
          scores[i] = scores[i] < head_scores[i] ? head_scores[i] : scores[i];
        }
      } else {
        for (std::size_t i = 0; i < scores.size(); ++i) scores[i] += head_scores[i];
      }
    }
  }
  if (shape.reduction == GroupReduction::kMean) {
    const auto rows =
        static_cast<float>(group.query_count * shape.queries_per_kv_head * shape.heads_per_group);
    for (float& score : scores) score /= rows;
  }
  return finite;
}

}  // namespace kvtier
