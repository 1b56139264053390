#include "tools/replay/best_choice.h"

#include "selectors/rank_blocks.h"

#include <algorithm>

namespace kvtier {

const std::vector<std::vector<TokenSpan>>& BestChoice::choose(const ExactAttention& exact,
                                                              std::uint32_t budget_tokens) {
  spans_.resize(shape_.head_groups());
  for (std::uint32_t group = 0; group < shape_.head_groups(); ++group) {
    choose_group(exact, group, budget_tokens);
  }
  return spans_;
}

void BestChoice::choose_group(const ExactAttention& exact, std::uint32_t group,
                              std::uint32_t budget_tokens) {
  const std::uint32_t position = exact.visible() - 1;
  const FarRegion region = FarRegion::of(shape_, position);
  const std::uint32_t blocks = block_count(region, shape_.tokens_per_block);
  const std::uint32_t heads = shape_.heads_per_group * shape_.queries_per_kv_head;
  scores_.resize(blocks);
  order_.resize(blocks);
  const std::span<const float> weights(exact.weights(group * heads).data(),
                                       (heads - 1) * exact.row_stride() + exact.visible());
  reduce_token_weights(weights, heads, exact.row_stride(), region, shape_.tokens_per_block,
                       shape_.reduction, scores_, 1);
  SelectRequest request;
  request.first_position = position;
  request.budget_tokens = budget_tokens;
  rank_blocks({.scores = scores_,
               .always = {},
               .region = region,
               .tokens_per_block = shape_.tokens_per_block,
               .far_budget_tokens = far_budget_tokens(shape_, request),
               .band_tokens = 0},
              order_, selection_);
  std::vector<TokenSpan>& spans = spans_[group];
  spans.clear();
  if (region.begin > 0) spans.push_back({0, region.begin});
  for (const SelectedUnit& unit : std::span(selection_.ranked).first(selection_.chosen)) {
    const std::uint32_t begin = unit.block.value * shape_.tokens_per_block + unit.first_token;
    spans.push_back({begin, begin + unit.tokens});
  }
  if (region.end < exact.visible()) spans.push_back({region.end, exact.visible()});
  std::ranges::sort(spans, {}, &TokenSpan::begin);
  // Neighbours are joined, so that equal choices have equal spans and equal sums.
  std::size_t kept = 0;
  for (std::size_t i = 1; i < spans.size(); ++i) {
    if (spans[i].begin == spans[kept].end) {
      spans[kept].end = spans[i].end;
    } else {
      spans[++kept] = spans[i];
    }
  }
  if (!spans.empty()) spans.resize(kept + 1);
}

}  // namespace kvtier
