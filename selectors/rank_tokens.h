#pragma once

#include "selectors/selector.h"

#include <cstddef>
#include <cstdint>
#include <span>

namespace kvtier {

/// Turns one score per token of the far region into a ranked, budgeted selection whose units are
/// single tokens (`partial_blocks`): the last part of every selector that ranks tokens.
/// `scores[i]` belongs to token `region.begin + i`; ties go to the earlier token. `order` is
/// scratch of at least scores.size() elements. No allocation once `result.ranked` has its capacity,
/// which `reserve_selection(shape, selection, shape.tokens_max)` gives it.
struct RankTokensInput {
  std::span<const float> scores;
  FarRegion region;
  std::uint32_t tokens_per_block = 8;
  std::uint32_t far_budget_tokens = 0;
  std::uint32_t band_tokens = 0;
};
void rank_tokens(const RankTokensInput& input, std::span<std::uint32_t> order,
                 GroupSelection& result);

}  // namespace kvtier
