#pragma once

#include "tools/simulate/request_trace.h"
#include "tools/simulate/simulation_result.h"

#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace kvtier {

/// When each block reference is used next: the reference by which a later request uses the same
/// block, or `kNever`. Compute once per trace; 4 bytes per reference. Immutable; safe to share.
class NextUses {
 public:
  static constexpr std::uint32_t kNever = 0xFFFFFFFF;

  explicit NextUses(const RequestTrace& trace);

  std::uint32_t of(std::size_t reference) const { return next_[reference]; }

 private:
  std::vector<std::uint32_t> next_;
};

/// A set of numbers below a bound that knows its largest. Insertion, removal and the largest cost
/// one word per level of 64: five levels for a billion.
class NumberSet {
 public:
  explicit NumberSet(std::uint64_t bound);

  std::uint64_t size() const { return size_; }
  bool contains(std::uint64_t number) const {
    return (levels_[0][number / 64] >> number % 64 & 1) != 0;
  }
  void insert(std::uint64_t number);
  void erase(std::uint64_t number);
  /// The set must not be empty.
  std::uint64_t largest() const;

 private:
  /// levels_[l][w] has bit b iff word 64 * w + b of the level below has any (of level 0: the number
  /// is in the set). The last level is one word.
  std::vector<std::vector<std::uint64_t>> levels_;
  std::uint64_t size_ = 0;
};

/// A tier of an offline run: its name, and the blocks that it and the tiers above it may hold.
struct OptimalTier {
  std::string name;
  std::uint64_t capacity_blocks = 0;
  std::uint64_t cumulative_blocks = 0;
};

/// Offline optimum with bypass (after Belady, IBM Systems Journal 5(2), 1966, for prefix caches):
/// after each request keep, of the resident blocks and the request's, those whose next use is
/// nearest; blocks without one are dropped, ties keep the shallower block. With chained ids this
/// maximises block hits. What is kept at a capacity is kept at every larger one, so tiers nest: a
/// hit belongs to the first tier up to which the kept blocks fit.
///
/// `tiers` have ascending cumulative capacities. Cost: a few ns per reference and tier; one bit per
/// reference and tier.
SimulationRun simulate_optimal(const RequestTrace& trace, const NextUses& next_uses,
                               std::span<const OptimalTier> tiers);

}  // namespace kvtier
