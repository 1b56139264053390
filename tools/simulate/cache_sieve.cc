#include "selectors/place_lists.h"
#include "tools/simulate/simulated_cache.h"

namespace kvtier {
namespace {

/// SIEVE: Zhang, Yang, Yue, Vigfusson and Rashmi, "SIEVE is simpler than LRU: an efficient turn-key
/// eviction algorithm for web caches", NSDI 2024. A queue in order of admission, and a hand that
/// walks from its tail to its head, sparing once what was used since it last passed. Unlike CLOCK,
/// what is spared stays where it is, so new blocks are tested soon.
class SimulatedSieve final : public SimulatedCache {
 public:
  explicit SimulatedSieve(const SimulatedCacheOptions& options)
      : SimulatedCache(options.unique_blocks, options.capacity),
        queue_(options.unique_blocks, 1),
        is_visited_(options.unique_blocks) {}

 private:
  void on_hit(const BlockUse& use) override { is_visited_[use.block] = 1; }

  void on_miss(const BlockUse& use) override {
    if (is_full()) make_room();
    queue_.push_front(0, use.block);
    is_visited_[use.block] = 0;
    admit(use.block);
  }

  void make_room() {
    BlockNumber block = hand_ == PlaceLists::kNone ? queue_.back(0) : hand_;
    while (is_visited_[block] != 0) {
      is_visited_[block] = 0;
      block = queue_.ahead_of(block);
      if (block == PlaceLists::kNone) block = queue_.back(0);
    }
    forget_at_hand(block);
    evict(block);
  }

  /// The hand moves on to the block ahead; `kNone` starts at the tail again.
  void forget_at_hand(BlockNumber block) {
    hand_ = queue_.ahead_of(block);
    queue_.erase(0, block);
  }

  void forget(BlockNumber block) override {
    if (block == hand_) return forget_at_hand(block);
    queue_.erase(0, block);
  }

  PlaceLists queue_;
  std::vector<std::uint8_t> is_visited_;
  BlockNumber hand_ = PlaceLists::kNone;
};

}  // namespace

std::unique_ptr<SimulatedCache> make_simulated_sieve(const SimulatedCacheOptions& options) {
  return std::make_unique<SimulatedSieve>(options);
}

}  // namespace kvtier
