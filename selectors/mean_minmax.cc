#include "selectors/box_digest.h"
#include "selectors/families.h"

namespace kvtier {

/// Half mean key, half page bound: ours. The logit of the mean key (ShadowKV, 2410.21465) misses a
/// single token that stands out of its group, the bound of the box (Quest, 2406.10774) is loose
/// where keys after RoPE fill it; their average ranked better than each alone on our recordings.
/// Neither a bound nor an estimate of mass. Groups are as large as Quest's page; it was measured at
/// this size.
const SelectorFamily& mean_minmax_family() {
  static constexpr std::string_view kParameters[] = {"tokens"};
  static const SelectorFamily kFamily = {
      .name = "mean-minmax",
      .summary = "average of a group's mean-key logit and its page bound",
      .source = "ours, from ShadowKV and Quest",
      .parameters = kParameters,
      .metadata = "6 head_dim / tokens B, and the window's keys",
      .build_cost = "O(head_dim)",
      .step_cost = "O(context / tokens * head_dim)",
      .make = BoxDigest::make</*kWithMean=*/true>};
  return kFamily;
}

}  // namespace kvtier
