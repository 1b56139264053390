#include "selectors/place_lists.h"
#include "tools/simulate/simulated_cache.h"

#include <algorithm>

namespace kvtier {
namespace {

/// ARC: Megiddo and Modha, "ARC: a self-tuning, low overhead replacement cache", FAST 2003, figure
/// 4. Two LRU lists, of blocks used once (T1) and more often (T2), each followed by ghosts of what
/// left it (B1, B2). A ghost that is used says which list should have been longer, and moves the
/// target length of T1.
///
/// Invariants: T1 + T2 hold what is resident; T1 + B1 at most `capacity`, all four at most twice
/// that.
class SimulatedArc final : public SimulatedCache {
 public:
  explicit SimulatedArc(const SimulatedCacheOptions& options)
      : SimulatedCache(options.unique_blocks, options.capacity),
        lists_(options.unique_blocks, kLists),
        list_of_(options.unique_blocks, kNowhere) {}

 private:
  enum List : std::uint8_t { kT1, kT2, kB1, kB2, kLists, kNowhere = kLists };

  void on_hit(const BlockUse& use) override {
    leave(use.block);
    enter(kT2, use.block);
  }

  void on_miss(const BlockUse& use) override {
    const std::uint8_t list = list_of_[use.block];
    const std::uint32_t b1 = lists_.size(kB1);
    const std::uint32_t b2 = lists_.size(kB2);
    if (list == kB1) {
      target_ = std::min<std::uint64_t>(capacity(), target_ + std::max(b2 / b1, 1u));
    } else if (list == kB2) {
      target_ -= std::min<std::uint64_t>(target_, std::max(b1 / b2, 1u));
    } else {
      limit_ghosts();
    }
    if (is_full()) replace(list == kB2);
    if (list != kNowhere) leave(use.block);
    enter(list == kNowhere ? kT1 : kT2, use.block);
    admit(use.block);
  }

  /// Case IV of the paper: a block that is not even remembered. What it evicts or forgets is done
  /// here, so that `replace` finds a ghost list with room.
  void limit_ghosts() {
    const std::uint32_t once = lists_.size(kT1) + lists_.size(kB1);
    if (once == capacity()) {
      if (lists_.size(kT1) < capacity()) {
        leave(lists_.back(kB1));
      } else {
        const BlockNumber victim = lists_.back(kT1);
        leave(victim);
        evict(victim);
      }
      return;
    }
    const std::uint64_t all = std::uint64_t{once} + lists_.size(kT2) + lists_.size(kB2);
    if (all == 2 * std::uint64_t{capacity()}) leave(lists_.back(kB2));
  }

  /// REPLACE of the paper.
  void replace(bool was_in_b2) {
    const std::uint32_t t1 = lists_.size(kT1);
    const bool from_t1 =
        t1 > 0 && (t1 > target_ || (was_in_b2 && t1 == target_) || lists_.size(kT2) == 0);
    const BlockNumber victim = lists_.back(from_t1 ? kT1 : kT2);
    leave(victim);
    enter(from_t1 ? kB1 : kB2, victim);
    evict(victim);
  }

  void enter(List list, BlockNumber block) {
    lists_.push_front(list, block);
    list_of_[block] = list;
  }
  void leave(BlockNumber block) {
    lists_.erase(list_of_[block], block);
    list_of_[block] = kNowhere;
  }
  void forget(BlockNumber block) override { leave(block); }

  PlaceLists lists_;
  std::vector<std::uint8_t> list_of_;
  std::uint64_t target_ = 0;  ///< Of T1's length; p in the paper.
};

}  // namespace

std::unique_ptr<SimulatedCache> make_simulated_arc(const SimulatedCacheOptions& options) {
  return std::make_unique<SimulatedArc>(options);
}

}  // namespace kvtier
