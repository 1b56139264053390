#include "selectors/box_digest.h"
#include "selectors/families.h"

namespace kvtier {

/// Page bounds (Quest, 2406.10774): the elementwise largest and smallest key of a page, and as
/// score of a query sum_i max(q_i min_i, q_i max_i), which no logit of the page exceeds (up to the
/// rounding of float32 sums; corners are elements of the keys, so storing them rounds nothing).
///
/// Where it leaves the paper. Quest ranks pages per query head, with keys repeated under GQA; here
/// the heads that share a KV head choose together: the softmax over the page bounds of each head,
/// reduced as the shape says (a softmax keeps each head's own order and gives heads of unlike scale
/// one voice). Pages of the first two layers are chosen like all others; Quest attends those layers
/// densely. The last, partial page is bounded by the tokens it has.
const SelectorFamily& minmax_family() {
  static constexpr std::string_view kParameters[] = {"tokens"};
  static const SelectorFamily kFamily = {
      .name = "minmax",
      .summary = "upper bound of every logit in a page, from the box around its keys",
      .source = "Quest, 2406.10774",
      .parameters = kParameters,
      .metadata = "4 head_dim / tokens B, and the window's keys",
      .build_cost = "O(head_dim)",
      .step_cost = "O(context / tokens * head_dim)",
      .make = BoxDigest::make</*kWithMean=*/false>};
  return kFamily;
}

}  // namespace kvtier
