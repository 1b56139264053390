#include "selectors/rank_tokens.h"

#include "selectors/rank_blocks.h"

namespace kvtier {

void rank_tokens(const RankTokensInput& input, std::span<std::uint32_t> order,
                 GroupSelection& result) {
  // A token is a block of one; only the names of the units differ.
  rank_blocks({.scores = input.scores,
               .always = {},
               .region = input.region,
               .tokens_per_block = 1,
               .far_budget_tokens = input.far_budget_tokens,
               .band_tokens = input.band_tokens},
              order, result);
  for (SelectedUnit& unit : result.ranked) {
    const std::uint32_t token = unit.block.value;
    unit.block = BlockIndex(token / input.tokens_per_block);
    unit.first_token = token % input.tokens_per_block;
  }
}

}  // namespace kvtier
