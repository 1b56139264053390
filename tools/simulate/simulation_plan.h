#pragma once

#include "memory/status.h"
#include "tools/simulate/cache_run.h"
#include "tools/simulate/offline_optimum.h"
#include "tools/simulate/request_trace.h"
#include "tools/simulate/reuse_profile.h"
#include "tools/simulate/simulate_options.h"
#include "tools/simulate/simulation_result.h"

#include <memory>
#include <string>
#include <vector>

namespace kvtier {

/// One policy over one cache or hierarchy, every number concrete.
struct PlannedSimulation {
  std::string policy;
  std::vector<TierSpec> tiers;  ///< Empty: without bound.
};

/// The runs that the options ask of a trace: policy by policy, capacities in their order. Fails
/// with `invalid_argument` naming the option, or with `unsupported` when the trace lacks what is
/// asked.
Result<std::vector<PlannedSimulation>> plan_simulations(const SimulateOptions& options,
                                                        const RequestTrace& trace);

/// Capacities of a sweep that names none: `points` of them from a thousandth of the distinct blocks
/// to all, evenly in their logarithm, without repetitions.
std::vector<std::uint64_t> sweep_capacities(std::uint64_t unique_blocks, std::uint32_t points);

/// Answers planned runs over one trace. What several of them need is computed once, when made;
/// `run` may be called from several threads.
class Simulator {
 public:
  /// Borrows the trace and the options.
  Simulator(const RequestTrace& trace, const SimulateOptions& options, bool with_optimal);

  const ReuseProfile& profile() const { return profile_; }
  SimulationRun run(const PlannedSimulation& planned) const;

 private:
  const RequestTrace& trace_;
  const SimulateOptions& options_;
  ReuseProfile profile_;
  std::unique_ptr<NextUses> next_uses_;
};

}  // namespace kvtier
