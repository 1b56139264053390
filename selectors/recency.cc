#include "selectors/families.h"
#include "selectors/place_scores.h"

#include <numeric>

namespace kvtier {
namespace {

/// The newest blocks before the window: what a model with a plain sliding window would attend.
/// The line under every selector: what looks no better than this does not look back.
struct NewestFirst {
  void operator()(const SelectRequest&, std::size_t, std::uint32_t first_block,
                  std::span<float> scores) const {
    // Block numbers stay below 2^24, so float holds each of them.
    std::iota(scores.begin(), scores.end(), static_cast<float>(first_block));
  }
};

}  // namespace

const SelectorFamily& recency_family() {
  static const SelectorFamily kFamily = {
      .name = "recency",
      .summary = "the newest blocks before the window (baseline)",
      .metadata = "0",
      .build_cost = "0",
      .step_cost = "O(blocks)",
      .make = make_place_scores<NewestFirst>};
  return kFamily;
}

}  // namespace kvtier
