#include "selectors/place_lists.h"
#include "tools/simulate/simulated_cache.h"

namespace kvtier {
namespace {

/// First in, first out: uses of what is resident change nothing. The baseline of Belady, "A study
/// of replacement algorithms for a virtual-storage computer", IBM Systems Journal 5(2), 1966.
class SimulatedFifo final : public SimulatedCache {
 public:
  explicit SimulatedFifo(const SimulatedCacheOptions& options)
      : SimulatedCache(options.unique_blocks, options.capacity), list_(options.unique_blocks, 1) {}

 private:
  void on_hit(const BlockUse&) override {}
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

std::unique_ptr<SimulatedCache> make_simulated_fifo(const SimulatedCacheOptions& options) {
  return std::make_unique<SimulatedFifo>(options);
}

}  // namespace kvtier
