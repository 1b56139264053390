#include "selectors/place_lists.h"
#include "tools/simulate/simulated_cache.h"

namespace kvtier {
namespace {

/// Least recently used: Mattson, Gecsei, Slutz and Traiger, "Evaluation techniques for storage
/// hierarchies", IBM Systems Journal 9(2), 1970. One list, the most recent use in front. A single
/// cache needs no run of this: see `ReuseProfile`. Hierarchies do.
class SimulatedLru final : public SimulatedCache {
 public:
  explicit SimulatedLru(const SimulatedCacheOptions& options)
      : SimulatedCache(options.unique_blocks, options.capacity), list_(options.unique_blocks, 1) {}

 private:
  void on_hit(const BlockUse& use) override { list_.move_to_front(0, use.block); }
  void on_miss(const BlockUse& use) override {
    if (is_full()) {
      const BlockNumber victim = list_.back(0);
      list_.erase(0, victim);
      evict(victim);
    }
    list_.push_front(0, use.block);
    admit(use.block);
  }
  void forget(BlockNumber block) override { list_.erase(0, block); }

  PlaceLists list_;
};

}  // namespace

std::unique_ptr<SimulatedCache> make_simulated_lru(const SimulatedCacheOptions& options) {
  return std::make_unique<SimulatedLru>(options);
}

}  // namespace kvtier
