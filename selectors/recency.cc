#include "selectors/families.h"
#include "selectors/rank_blocks.h"
#include "selectors/seen_tokens.h"

#include <memory>
#include <numeric>

namespace kvtier {
namespace {

/// The newest blocks before the window: what a model with a plain sliding window would attend.
/// The line under every selector: what looks no better than this does not look back.
class Recency final : public Selector {
 public:
  explicit Recency(const SelectorShape& shape)
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
    std::iota(scores.begin(), scores.end(),
              static_cast<float>(region.begin / shape_.tokens_per_block));
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

  std::unique_ptr<Selector> fork() const override { return std::make_unique<Recency>(*this); }
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

const SelectorFamily& recency_family() {
  static const SelectorFamily kFamily = {
      .name = "recency",
      .summary = "the newest blocks before the window (baseline)",
      .metadata = "0",
      .build_cost = "0",
      .step_cost = "O(blocks)",
      .make = [](const SelectorRecipe&, SelectorFactory& factory) -> Status {
        factory.make = [](const SelectorShape& shape, LayerIndex) {
          return Result<std::unique_ptr<Selector>>(std::make_unique<Recency>(shape));
        };
        return {};
      }};
  return kFamily;
}

}  // namespace kvtier
