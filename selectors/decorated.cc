#include "selectors/decorated.h"

#include <algorithm>

namespace kvtier {

std::uint32_t shorten_selection(std::uint32_t budget_tokens, std::uint32_t band_tokens,
                                GroupSelection& selection) {
  std::uint64_t tokens = 0;
  std::uint32_t chosen = 0;
  const auto size = static_cast<std::uint32_t>(selection.ranked.size());
  while (chosen < size && tokens + selection.ranked[chosen].tokens <= budget_tokens) {
    tokens += selection.ranked[chosen++].tokens;
  }
  const auto chosen_tokens = static_cast<std::uint32_t>(tokens);
  std::uint32_t kept = chosen;
  if (chosen >= selection.held) {
    // What the choice left of the budget is the band's, as in `rank_blocks`.
    const std::uint64_t limit = std::uint64_t{budget_tokens} + band_tokens;
    while (kept < size && tokens + selection.ranked[kept].tokens <= limit) {
      tokens += selection.ranked[kept++].tokens;
    }
  }
  selection.ranked.resize(kept);
  selection.chosen = chosen;
  selection.held = std::min(selection.held, chosen);
  return chosen_tokens;
}

}  // namespace kvtier
