#include "selectors/families.h"
#include "selectors/rank_blocks.h"
#include "selectors/seen_tokens.h"

#include <memory>

namespace kvtier {
namespace {

/// The whole context, block after block from its start: what every other selector is compared with
/// when the budget covers the context, and what a runtime without selection would attend.
///
/// The budget rules here as everywhere: below the size of the context this is the beginning of it
/// (with the sinks and the window), and says nothing about attention. Ask for a budget of 100 %.
class Full final : public Selector {
 public:
  explicit Full(const SelectorShape& shape)
      : shape_(shape),
        tokens_(shape.tokens_max),
        scores_(shape.tokens_max / shape.tokens_per_block + 1),
        order_(scores_.size()) {}

  void append(const NewTokens& tokens) override { tokens_.append(tokens); }
  void truncate(std::uint32_t position) override { tokens_.truncate(position); }

  Status select(const SelectRequest& request, std::span<GroupSelection> selection,
                WorkerPool&) override {
    KVTIER_RETURN_IF_ERROR(check_request(shape_, request));
    reserve_selection(shape_, selection);
    const FarRegion region = FarRegion::of(shape_, request.first_position);
    tokens_.check_covers(region);
    const std::span scores(scores_.data(), block_count(region, shape_.tokens_per_block));
    // Block numbers stay below 2^24, so float holds each of them.
    const auto first_block = static_cast<float>(region.begin / shape_.tokens_per_block);
    for (std::size_t i = 0; i < scores.size(); ++i) {
      scores[i] = -first_block - static_cast<float>(i);
    }
    for (GroupSelection& group : selection) {
      rank_blocks({.scores = scores,
                   .always = {},
                   .region = region,
                   .tokens_per_block = shape_.tokens_per_block,
                   .far_budget_tokens = far_budget_tokens(shape_, request),
                   .band_tokens = request.band_tokens},
                  order_, group);
    }
    return {};
  }

  std::unique_ptr<Selector> fork() const override { return std::make_unique<Full>(*this); }
  void save(StateWriter& writer) const override { tokens_.save(writer); }
  Status restore(StateReader& reader) override { return tokens_.restore(reader); }

  std::size_t metadata_bytes() const override { return 0; }

 private:
  SelectorShape shape_;
  SeenTokens tokens_;
  std::vector<float> scores_;
  std::vector<std::uint32_t> order_;
};

}  // namespace

const SelectorFamily& full_family() {
  static const SelectorFamily kFamily = {
      .name = "full",
      .summary = "everything, from the start as far as the budget goes (baseline: budget 100 %)",
      .metadata = "0",
      .build_cost = "0",
      .step_cost = "O(blocks)",
      .make = [](const SelectorRecipe&, SelectorFactory& factory) -> Status {
        factory.make = [](const SelectorShape& shape, LayerIndex) {
          return Result<std::unique_ptr<Selector>>(std::make_unique<Full>(shape));
        };
        return {};
      }};
  return kFamily;
}

}  // namespace kvtier
