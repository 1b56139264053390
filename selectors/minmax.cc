#include "kernels/score_bounds.h"
#include "selectors/digest_selector.h"
#include "selectors/families.h"

#include <memory>

namespace kvtier {
namespace {

/// Page bounds (Quest, 2406.10774): the elementwise largest and smallest key of a page, and as
/// score of a query sum_i max(q_i min_i, q_i max_i), which no logit of the page exceeds (up to the
/// rounding of float32 sums; corners are elements of the keys, so storing them rounds nothing).
///
/// Where it leaves the paper. Quest ranks pages per query head, with keys repeated under GQA; here
/// the heads that share a KV head choose together: the softmax over the page bounds of each head,
/// reduced as the shape says (a softmax keeps each head's own order and gives heads of unlike scale
/// one voice). Pages of the first two layers are chosen like all others; Quest attends those layers
/// densely. The last, partial page is bounded by the tokens it has.
class MinMaxDigest final : public GroupDigest {
 public:
  explicit MinMaxDigest(std::uint32_t head_dim) : head_dim_(head_dim) {}

  std::uint32_t row_dim() const override { return 2 * head_dim_; }
  void write_row(const RowsView& keys, std::uint32_t, std::byte* row) override {
    box_rows(keys, static_cast<std::uint32_t>(keys.rows), row);
  }
  void write_question(std::span<const float> query, std::uint32_t, float* question) override {
    split_by_sign(query, 1.0f, question);
  }
  std::unique_ptr<GroupDigest> clone() const override {
    return std::make_unique<MinMaxDigest>(*this);
  }

 private:
  std::uint32_t head_dim_;
};

}  // namespace

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
      .make = [](const SelectorRecipe& recipe, SelectorFactory& factory) -> Status {
        // Quest's page.
        KVTIER_ASSIGN_OR_RETURN(const std::uint32_t tokens,
                                recipe.parameters.integer("tokens", 16, 1, 1024));
        factory.make = [tokens](const SelectorShape& shape, LayerIndex) {
          return Result<std::unique_ptr<Selector>>(
              make_digest_selector(shape, tokens, std::make_unique<MinMaxDigest>(shape.head_dim)));
        };
        return {};
      }};
  return kFamily;
}

}  // namespace kvtier
