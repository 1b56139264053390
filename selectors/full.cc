#include "selectors/families.h"
#include "selectors/place_scores.h"

namespace kvtier {
namespace {

/// The whole context, block after block from its start: what every other selector is compared with
/// when the budget covers the context, and what a runtime without selection would attend.
///
/// The budget rules here as everywhere: below the size of the context this is the beginning of it
/// (with the sinks and the window), and says nothing about attention. Ask for a budget of 100 %.
struct FromTheStart {
  void operator()(const SelectRequest&, std::size_t, std::uint32_t first_block,
                  std::span<float> scores) const {
    // Block numbers stay below 2^24, so float holds each of them.
    for (std::size_t i = 0; i < scores.size(); ++i) {
      scores[i] = -static_cast<float>(first_block) - static_cast<float>(i);
    }
  }
};

}  // namespace

const SelectorFamily& full_family() {
  static const SelectorFamily kFamily = {
      .name = "full",
      .summary = "everything, from the start as far as the budget goes (baseline: budget 100 %)",
      .metadata = "0",
      .build_cost = "0",
      .step_cost = "O(blocks)",
      .make = make_place_scores<FromTheStart>};
  return kFamily;
}

}  // namespace kvtier
