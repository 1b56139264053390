#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace kvtier {

/// Decides, for one layer and each of its query heads, whether the selector's estimate of what is
/// not attended brings the output nearer to exact attention than leaving it out.
///
/// Estimation is worth much in layers whose attention is peaked and harms flat ones, and no rule
/// known beforehand tells which is which. So it is measured: on some steps a sample of the blocks
/// that were not chosen is attended as well, and both ways are compared with the output that it
/// leads to. The first step of a layer is measured, then steps at growing distances (8, 16, ...
/// `interval_max`), since heads keep their habits but texts change. Older measurements count half
/// as much for each newer one.
///
/// A function of the steps alone. One thread at a time; allocates only when made.
class RestChoice {
 public:
  RestChoice() = default;
  RestChoice(std::uint32_t query_heads, std::uint32_t interval_max);

  /// Counts a step; true when it is one to measure.
  bool begin_step();
  /// What was measured, as squared distances from the exact output relative to its squared length,
  /// summed over the step's queries: per query head, without and with the estimate.
  void learn(std::span<const double> without, std::span<const double> with);
  /// How many steps were measured so far.
  std::uint32_t measurements() const { return measurements_; }
  /// Whether the output of a query head takes the estimate. False before anything is measured.
  bool takes_estimate(std::uint32_t head) const { return with_[head] < without_[head]; }

 private:
  std::uint32_t interval_max_ = 0;
  std::uint32_t interval_ = 0;
  std::uint32_t until_next_ = 0;
  std::uint32_t measurements_ = 0;
  std::vector<double> without_;
  std::vector<double> with_;
};

}  // namespace kvtier
