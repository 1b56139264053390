#pragma once

#include "memory/status.h"
#include "tools/cli/parse.h"
#include "tools/replay/progress.h"

#include <cstdint>
#include <string>
#include <vector>

namespace kvtier {

/// How much of what a step attends, sinks and window apart, it does not find in a cache that holds
/// a share of the KV. Value type.
///
/// The standard curve is `(1 - reuse) * (ln share / ln budget)^2`: nothing is missed with all of
/// the KV resident, and with room for no more than one step attends, all that a step does not share
/// with the steps before it. The square was fitted to the trace that is shipped (README.md).
class ReuseCurve {
 public:
  /// `budget` is the attended share of the context, `reuse` what a step finds of its choice in a
  /// cache that holds just as much; both between 0 and 1.
  static ReuseCurve standard(double budget, double reuse);

  /// Measured: the attention trace is replayed through the runtime at several capacities, in memory
  /// alone. Takes seconds for a small trace. Errors as for `kvtier replay`.
  static Result<ReuseCurve> from_trace(const std::string& path, const std::string& selector,
                                       const Budget& budget, std::uint32_t block_tokens,
                                       Progress& progress);

  /// From 0 for a share of 1 to 1 for none.
  double missed(double share) const;

  struct Point {
    double share = 0;
    double missed = 0;
  };
  /// Measured ones, ascending by share; empty for the standard curve.
  const std::vector<Point>& points() const { return points_; }
  /// One line that says where it comes from.
  const std::string& described() const { return described_; }

 private:
  double budget_ = 0;
  double reuse_ = 0;
  std::vector<Point> points_;
  std::string described_;
};

/// Of the shipped trace with the default selector at 5 %.
inline constexpr double kStandardReuse = 0.68;

}  // namespace kvtier
