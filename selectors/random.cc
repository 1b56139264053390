#include "selectors/families.h"
#include "selectors/rank_blocks.h"
#include "selectors/seen_tokens.h"

#include <memory>

namespace kvtier {
namespace {

/// SplitMix64 (Steele, Lea, Flood 2014), one step: turns a counter into 64 well-mixed bits.
std::uint64_t mixed(std::uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

/// A fresh, even choice at every step. Stateless: a block's score is a hash of (seed, layer,
/// position, head group, block), so neither the history nor the number of workers can change it.
class Random final : public Selector {
 public:
  Random(const SelectorShape& shape, LayerIndex layer)
      : shape_(shape),
        layer_seed_(mixed(mixed(shape.seed) ^ layer.value)),
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
    const std::uint32_t first_block = region.begin / shape_.tokens_per_block;
    for (std::size_t group = 0; group < selection.size(); ++group) {
      const std::uint64_t seed = mixed(mixed(layer_seed_ ^ request.first_position) ^ group);
      for (std::size_t i = 0; i < scores.size(); ++i) {
        // 24 bits are what a float holds exactly; a tie goes to the earlier block.
        scores[i] = static_cast<float>(mixed(seed ^ (first_block + i)) >> 40) * 0x1p-24f;
      }
      rank_blocks({.scores = scores,
                   .always = {},
                   .region = region,
                   .tokens_per_block = shape_.tokens_per_block,
                   .far_budget_tokens = far_budget_tokens(shape_, request),
                   .band_tokens = request.band_tokens},
                  order_, selection[group]);
    }
    return {};
  }

  std::unique_ptr<Selector> fork() const override { return std::make_unique<Random>(*this); }
  void save(StateWriter& writer) const override { tokens_.save(writer); }
  Status restore(StateReader& reader) override { return tokens_.restore(reader); }

  std::size_t metadata_bytes() const override { return 0; }

 private:
  SelectorShape shape_;
  std::uint64_t layer_seed_;
  SeenTokens tokens_;
  std::vector<float> scores_;
  std::vector<std::uint32_t> order_;
};

}  // namespace

const SelectorFamily& random_family() {
  static const SelectorFamily kFamily = {
      .name = "random",
      .summary = "a seeded random choice, fresh at every step (baseline)",
      .metadata = "0",
      .build_cost = "0",
      .step_cost = "O(blocks)",
      .make = [](const SelectorRecipe&, SelectorFactory& factory) -> Status {
        factory.make = [](const SelectorShape& shape, LayerIndex layer) {
          return Result<std::unique_ptr<Selector>>(std::make_unique<Random>(shape, layer));
        };
        return {};
      }};
  return kFamily;
}

}  // namespace kvtier
