#include "selectors/place_lists.h"
#include "tools/simulate/simulated_cache.h"

#include <algorithm>

namespace kvtier {
namespace {

/// S3-FIFO: Yang, Zhang, Qiu, Yue and Rashmi, "FIFO queues are all you need for cache eviction",
/// SOSP 2023, algorithm 1. New blocks pass through a small queue of a tenth of the cache; what was
/// used more than once there goes on to the main queue, the rest leaves, remembered in a ghost
/// queue as long as the main one. What comes back while it is remembered goes straight to the main
/// queue, which spares a block as often as it was used, up to three times. The queues share one
/// room: what the small one does not use, the main one may.
class SimulatedS3Fifo final : public SimulatedCache {
 public:
  explicit SimulatedS3Fifo(const SimulatedCacheOptions& options)
      : SimulatedCache(options.unique_blocks, options.capacity),
        small_target_(std::max(1u, options.capacity / 10)),
        ghost_capacity_(options.capacity - std::min(options.capacity, small_target_)),
        queues_(options.unique_blocks, kQueues),
        queue_of_(options.unique_blocks, kNowhere),
        uses_(options.unique_blocks) {}

 private:
  enum Queue : std::uint8_t { kSmall, kMain, kGhost, kQueues, kNowhere = kQueues };
  static constexpr std::uint8_t kUsesMax = 3;

  void on_hit(const BlockUse& use) override {
    uses_[use.block] = std::min<std::uint8_t>(kUsesMax, uses_[use.block] + 1);
  }

  void on_miss(const BlockUse& use) override {
    // Looked up before making room, which may push it out of the ghost queue.
    const bool is_remembered = queue_of_[use.block] == kGhost;
    while (is_full()) make_room();
    if (queue_of_[use.block] == kGhost) leave(use.block);
    enter(is_remembered ? kMain : kSmall, use.block);
    uses_[use.block] = 0;
    admit(use.block);
  }

  void make_room() {
    const bool from_small = queues_.size(kSmall) >= small_target_ || queues_.size(kMain) == 0;
    if (from_small) {
      evict_from_small();
    } else {
      evict_from_main();
    }
  }

  void evict_from_small() {
    while (queues_.size(kSmall) > 0) {
      const BlockNumber block = queues_.back(kSmall);
      leave(block);
      if (uses_[block] > 1) {
        enter(kMain, block);
        uses_[block] = 0;
        continue;
      }
      remember(block);
      evict(block);
      return;
    }
    evict_from_main();
  }

  void evict_from_main() {
    while (true) {
      const BlockNumber block = queues_.back(kMain);
      leave(block);
      if (uses_[block] == 0) {
        evict(block);
        return;
      }
      --uses_[block];
      enter(kMain, block);
    }
  }

  void remember(BlockNumber block) {
    if (ghost_capacity_ == 0) return;
    if (queues_.size(kGhost) == ghost_capacity_) leave(queues_.back(kGhost));
    enter(kGhost, block);
  }

  void enter(Queue queue, BlockNumber block) {
    queues_.push_front(queue, block);
    queue_of_[block] = queue;
  }
  void leave(BlockNumber block) {
    queues_.erase(queue_of_[block], block);
    queue_of_[block] = kNowhere;
  }
  void forget(BlockNumber block) override { leave(block); }

  std::uint32_t small_target_;
  std::uint32_t ghost_capacity_;
  PlaceLists queues_;
  std::vector<std::uint8_t> queue_of_;
  std::vector<std::uint8_t> uses_;
};

}  // namespace

std::unique_ptr<SimulatedCache> make_simulated_s3_fifo(const SimulatedCacheOptions& options) {
  return std::make_unique<SimulatedS3Fifo>(options);
}

}  // namespace kvtier
