#pragma once

#include "selectors/selector.h"
#include "tools/replay/exact_attention.h"

#include <cstdint>
#include <vector>

namespace kvtier {

/// The best choice of blocks that a selector could have made at one step: what the oracle attends.
class BestChoice {
 public:
  explicit BestChoice(const SelectorShape& shape) : shape_(shape) {}

  /// Spans of positions for each head group, ascending, sinks and window included.
  const std::vector<std::vector<TokenSpan>>& choose(const ExactAttention& exact,
                                                    std::uint32_t budget_tokens);

 private:
  void choose_group(const ExactAttention& exact, std::uint32_t group, std::uint32_t budget_tokens);

  SelectorShape shape_;
  std::vector<float> scores_;
  std::vector<std::uint32_t> order_;
  GroupSelection selection_;
  std::vector<std::vector<TokenSpan>> spans_;
};

}  // namespace kvtier
