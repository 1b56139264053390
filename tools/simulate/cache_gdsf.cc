#include "tools/simulate/simulated_cache.h"

#include <algorithm>
#include <limits>
#include <tuple>

namespace kvtier {
namespace {

/// GreedyDual-Size-Frequency: Cherkasova, "Improving WWW proxies performance with
/// GreedyDual-Size-Frequency caching policy", HP Labs technical report HPL-98-69R1, 1998. A block's
/// worth is L + uses * saving / size, where L is the worth of what was evicted last, so that
/// everything ages. The saving is the time to compute the block again less the time to load it;
/// both grow with its size, which leaves the saving per token: deep blocks are worth more, since
/// computing them attends to more. Of equal worth, what was used last stays.
///
/// Invariant: heap_ is a binary heap of the resident blocks, least worth on top, and place_of_ its
/// inverse.
class SimulatedGdsf final : public SimulatedCache {
 public:
  explicit SimulatedGdsf(const SimulatedCacheOptions& options)
      : SimulatedCache(options.unique_blocks, options.capacity),
        costs_(options.costs),
        states_(options.unique_blocks) {
    heap_.reserve(std::min(options.capacity, options.unique_blocks));
  }

 private:
  struct State {
    std::uint64_t worth = 0;
    std::uint64_t last_use = 0;
    std::uint32_t uses = 0;
    std::uint32_t place = 0;  ///< In the heap, while resident.
  };

  void on_hit(const BlockUse& use) override {
    value(use);
    // A raw id may stand elsewhere than before, where it is worth less.
    sift_up(states_[use.block].place);
    sift_down(states_[use.block].place);
  }

  void on_miss(const BlockUse& use) override {
    if (is_full()) {
      const BlockNumber victim = heap_.front();
      aged_ = states_[victim].worth;
      forget(victim);
      evict(victim);
    }
    states_[use.block].uses = 0;
    states_[use.block].place = static_cast<std::uint32_t>(heap_.size());
    heap_.push_back(use.block);
    value(use);
    sift_up(states_[use.block].place);
    admit(use.block);
  }

  void value(const BlockUse& use) {
    State& state = states_[use.block];
    ++state.uses;
    state.last_use = ++clock_;
    // Saturating: an overflow would turn the most valuable block into the least.
    std::uint64_t worth = 0;
    if (__builtin_mul_overflow(costs_.saving_ps_per_token(use.tokens_before), state.uses, &worth) ||
        __builtin_add_overflow(worth, aged_, &worth)) {
      worth = std::numeric_limits<std::uint64_t>::max();
    }
    state.worth = worth;
  }

  void forget(BlockNumber block) override {
    const std::uint32_t hole = states_[block].place;
    const BlockNumber last = heap_.back();
    heap_.pop_back();
    if (last == block) return;
    heap_[hole] = last;
    states_[last].place = hole;
    sift_up(hole);
    sift_down(states_[last].place);
  }

  bool is_before(std::uint32_t a, std::uint32_t b) const {
    const State& left = states_[heap_[a]];
    const State& right = states_[heap_[b]];
    return std::tie(left.worth, left.last_use) < std::tie(right.worth, right.last_use);
  }
  void swap_places(std::uint32_t a, std::uint32_t b) {
    std::swap(heap_[a], heap_[b]);
    states_[heap_[a]].place = a;
    states_[heap_[b]].place = b;
  }
  void sift_up(std::uint32_t place) {
    while (place > 0 && is_before(place, (place - 1) / 2)) {
      swap_places(place, (place - 1) / 2);
      place = (place - 1) / 2;
    }
  }
  void sift_down(std::uint32_t place) {
    while (true) {
      std::uint32_t least = place;
      for (const std::uint64_t child :
           {2 * std::uint64_t{place} + 1, 2 * std::uint64_t{place} + 2}) {
        if (child < heap_.size() && is_before(static_cast<std::uint32_t>(child), least)) {
          least = static_cast<std::uint32_t>(child);
        }
      }
      if (least == place) return;
      swap_places(place, least);
      place = least;
    }
  }

  BlockCosts costs_;
  std::vector<State> states_;
  std::vector<BlockNumber> heap_;
  std::uint64_t aged_ = 0;  ///< L in the paper.
  std::uint64_t clock_ = 0;
};

}  // namespace

std::unique_ptr<SimulatedCache> make_simulated_gdsf(const SimulatedCacheOptions& options) {
  return std::make_unique<SimulatedGdsf>(options);
}

}  // namespace kvtier
