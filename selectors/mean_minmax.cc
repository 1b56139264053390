#include "kernels/score_bounds.h"
#include "selectors/digest_selector.h"
#include "selectors/families.h"

#include <algorithm>
#include <memory>

namespace kvtier {
namespace {

/// Half mean key, half page bound: ours. The logit of the mean key (ShadowKV, 2410.21465) misses a
/// single token that stands out of its group, the bound of the box (Quest, 2406.10774) is loose
/// where keys after RoPE fill it; their average ranked better than each alone on our recordings.
///
/// A row is [mean, high corner, low corner] and a question half of [query, query split by sign], so
/// one dot product is the average of both. Means are rounded to the keys' type, corners are exact.
/// Neither a bound nor an estimate of mass.
class MeanMinMaxDigest final : public GroupDigest {
 public:
  MeanMinMaxDigest(std::uint32_t head_dim, DType dtype)
      : head_dim_(head_dim), vector_bytes_(head_dim * size_of(dtype)) {}

  std::uint32_t row_dim() const override { return 3 * head_dim_; }
  void write_row(const RowsView& keys, std::uint32_t, std::byte* row) override {
    const auto all = static_cast<std::uint32_t>(keys.rows);
    mean_rows(keys, all, row);
    box_rows(keys, all, row + vector_bytes_);
  }
  void write_question(std::span<const float> query, std::uint32_t, float* question) override {
    std::ranges::transform(query, question, [](float q) { return 0.5f * q; });
    split_by_sign(query, 0.5f, question + head_dim_);
  }
  std::unique_ptr<GroupDigest> clone() const override {
    return std::make_unique<MeanMinMaxDigest>(*this);
  }

 private:
  std::uint32_t head_dim_;
  std::size_t vector_bytes_;
};

}  // namespace

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
      .make = [](const SelectorRecipe& recipe, SelectorFactory& factory) -> Status {
        // As large as Quest's page; it was measured at this size.
        KVTIER_ASSIGN_OR_RETURN(const std::uint32_t tokens,
                                recipe.parameters.integer("tokens", 16, 1, 1024));
        factory.make = [tokens](const SelectorShape& shape, LayerIndex) {
          return Result<std::unique_ptr<Selector>>(make_digest_selector(
              shape, tokens, std::make_unique<MeanMinMaxDigest>(shape.head_dim, shape.dtype)));
        };
        return {};
      }};
  return kFamily;
}

}  // namespace kvtier
