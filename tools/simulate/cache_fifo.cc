#include "tools/simulate/simulated_cache.h"

#include <algorithm>
#include <bit>

namespace kvtier {
namespace {

/// First in, first out: uses of what is resident change nothing. The baseline of Belady, "A study
/// of replacement algorithms for a virtual-storage computer", IBM Systems Journal 5(2), 1966.
///
/// A ring of admissions; what was taken away meanwhile is passed over. Invariants: admission n lies
/// at n modulo the ring's size, for head_ <= n < tail_; a resident block's own is admission_of_ it.
class SimulatedFifo final : public SimulatedCache {
 public:
  explicit SimulatedFifo(const SimulatedCacheOptions& options)
      : SimulatedCache(options.unique_blocks, options.capacity),
        ring_(std::bit_ceil(2 * std::size_t{std::min(options.capacity, options.unique_blocks)})),
        admission_of_(options.unique_blocks) {}

 private:
  void on_hit(const BlockUse&) override {}

  void on_miss(const BlockUse& use) override {
    if (is_full()) {
      while (!is_valid(head_)) ++head_;
      evict(at(head_++));
    }
    if (tail_ - head_ == ring_.size()) drop_invalid();
    admission_of_[use.block] = static_cast<std::uint32_t>(tail_);
    at(tail_++) = use.block;
    admit(use.block);
  }

  void forget(BlockNumber) override {}

  BlockNumber& at(std::uint64_t admission) { return ring_[admission & (ring_.size() - 1)]; }
  bool is_valid(std::uint64_t admission) {
    return contains(at(admission)) &&
           admission_of_[at(admission)] == static_cast<std::uint32_t>(admission);
  }

  /// Makes room: at least half of a full ring is not resident any more.
  void drop_invalid() {
    std::uint64_t kept = head_;
    for (std::uint64_t admission = head_; admission < tail_; ++admission) {
      if (!is_valid(admission)) continue;
      admission_of_[at(admission)] = static_cast<std::uint32_t>(kept);
      at(kept++) = at(admission);
    }
    tail_ = kept;
  }

  std::vector<BlockNumber> ring_;
  std::vector<std::uint32_t> admission_of_;  ///< Its last 32 bits: no ring is longer.
  std::uint64_t head_ = 0;
  std::uint64_t tail_ = 0;
};

}  // namespace

std::unique_ptr<SimulatedCache> make_simulated_fifo(const SimulatedCacheOptions& options) {
  return std::make_unique<SimulatedFifo>(options);
}

}  // namespace kvtier
