#pragma once

#include <cstdint>

namespace kvtier {

/// How much of a link one source of guesses may use at each step, by how useful its guesses have
/// been. Counts units: extents of the disk, blocks of the link to the device.
///
/// The rule: whenever `kJudged` guesses have come to their end, used or not, the allowance halves
/// if fewer than one in `kHalvesBelow` was used, and doubles, up to what the link's budget holds,
/// if more than one in `kDoublesAbove` was. It never falls below one unit in `kProbeSteps` steps,
/// so that a source which has become good again is found out.
///
/// Depends on the counts alone. One thread at a time; allocates nothing.
class GuessBudget {
 public:
  static constexpr std::uint64_t kJudged = 32;
  /// Reading ahead what is not used costs the drive time that nothing else asked for (demand
  /// overtakes it), so most of a source may be wrong before it is worth less than nothing.
  static constexpr std::uint64_t kHalvesBelow = 16;
  static constexpr std::uint64_t kDoublesAbove = 8;
  static constexpr std::uint64_t kProbeSteps = 16;

  explicit GuessBudget(std::uint64_t units_per_step)
      : full_(units_per_step * kProbeSteps), allowance_(full_) {}

  /// A step begins; `used` and `unused` are how many of the source's guesses have come to either
  /// end since the beginning.
  void begin_step(std::uint64_t used, std::uint64_t unused);
  /// Takes one unit of this step's; false when none is left.
  bool spend();

  /// Units per step, in parts of `kProbeSteps`.
  std::uint64_t allowance() const { return allowance_; }
  std::uint64_t halvings() const { return halvings_; }
  std::uint64_t doublings() const { return doublings_; }

 private:
  // In parts of kProbeSteps of a unit.
  std::uint64_t full_;
  std::uint64_t allowance_;
  std::uint64_t credit_ = 0;

  std::uint64_t used_judged_ = 0;
  std::uint64_t unused_judged_ = 0;
  std::uint64_t halvings_ = 0;
  std::uint64_t doublings_ = 0;
};

}  // namespace kvtier
