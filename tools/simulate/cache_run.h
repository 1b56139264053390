#pragma once

#include "tools/simulate/request_trace.h"
#include "tools/simulate/reuse_profile.h"
#include "tools/simulate/simulated_cache.h"
#include "tools/simulate/simulation_result.h"

#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace kvtier {

enum class Hierarchy : unsigned char {
  /// A tier holds all that the tiers above it hold. Every use reaches every tier; what a tier
  /// evicts
  /// leaves the tiers above it too.
  kInclusive,
  /// A block lies in one tier. A use takes it to the first tier; what a tier evicts goes to the
  /// next, as if it had been used there, and from the last it is gone.
  kExclusive,
};
const char* to_string(Hierarchy hierarchy);

/// A tier to simulate.
struct TierSpec {
  std::string name;
  std::uint64_t capacity_blocks = 0;
};

struct CacheRunOptions {
  std::string policy;           ///< One that `make_simulated_cache` knows; each tier has its own.
  std::vector<TierSpec> tiers;  ///< From the fastest. Inclusive ones do not shrink downwards.
  Hierarchy hierarchy = Hierarchy::kInclusive;
  TouchOrder touch_order = TouchOrder::kLastFirst;
  BlockCosts costs;
};

/// Replays a trace against a policy, in one tier or several. A request first looks for its leading
/// run of blocks that are resident in any tier, each a hit of the first tier that holds it; then
/// all its blocks are used, in the touch order. Deterministic.
SimulationRun run_cache(const RequestTrace& trace, const CacheRunOptions& options);

}  // namespace kvtier
