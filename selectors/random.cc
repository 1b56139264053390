#include "selectors/families.h"
#include "selectors/place_scores.h"

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
struct Drawn {
  std::uint64_t layer_seed = 0;

  void operator()(const SelectRequest& request, std::size_t head_group, std::uint32_t first_block,
                  std::span<float> scores) const {
    const std::uint64_t seed = mixed(mixed(layer_seed ^ request.first_position) ^ head_group);
    for (std::size_t i = 0; i < scores.size(); ++i) {
      // 24 bits are what a float holds exactly; a tie goes to the earlier block.
      scores[i] = static_cast<float>(mixed(seed ^ (first_block + i)) >> 40) * 0x1p-24f;
    }
  }
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
          const Drawn score{mixed(mixed(shape.seed) ^ layer.value)};
          return Result<std::unique_ptr<Selector>>(
              std::make_unique<PlaceScores<Drawn>>(shape, score));
        };
        return {};
      }};
  return kFamily;
}

}  // namespace kvtier
