#include "tools/simulate/simulation_plan.h"

#include <algorithm>
#include <cmath>

namespace kvtier {
namespace {

constexpr const char* kSingleTier = "cache";

Result<std::uint64_t> blocks_of_amount(const BlockAmount& amount, const char* option,
                                       const SimulateOptions& options, const RequestTrace& trace) {
  if (amount.is_bytes() && trace.block_tokens() == 0) {
    return unsupported(
        fmt::format("{}: found blocks of different sizes, expected one size for "
                    "capacities in bytes (name blocks instead)",
                    trace.name()));
  }
  const std::uint64_t bytes_per_block = options.bytes_per_token * trace.block_tokens();
  const std::uint64_t blocks = amount.blocks(trace.unique_blocks(), bytes_per_block);
  if (blocks > 0) return blocks;
  return invalid_argument(fmt::format("{}: found {}, expected room for a block, {}", option,
                                      amount.text(), format_bytes(bytes_per_block)));
}

Result<std::vector<TierSpec>> plan_hierarchy(const SimulateOptions& options,
                                             const RequestTrace& trace) {
  std::vector<TierSpec> tiers;
  for (const TierAmount& tier : options.tiers) {
    KVTIER_ASSIGN_OR_RETURN(const std::uint64_t blocks,
                            blocks_of_amount(tier.amount, "--tiers", options, trace));
    if (options.hierarchy == Hierarchy::kInclusive && !tiers.empty() &&
        blocks < tiers.back().capacity_blocks) {
      return invalid_argument(fmt::format(
          "--tiers: found {} blocks of {} below {} of {}, expected an inclusive tier to hold what "
          "is above it",
          blocks, tier.name, tiers.back().capacity_blocks, tiers.back().name));
    }
    tiers.push_back({tier.name, blocks});
  }
  return tiers;
}

}  // namespace

std::vector<std::uint64_t> sweep_capacities(std::uint64_t unique_blocks, std::uint32_t points) {
  constexpr double kSmallestShare = 1e-3;
  std::vector<std::uint64_t> capacities;
  const double most = static_cast<double>(unique_blocks);
  const double least = std::max(1.0, most * kSmallestShare);
  for (std::uint32_t i = 0; i < points; ++i) {
    const double position = static_cast<double>(i) / static_cast<double>(points - 1);
    const double capacity = least * std::pow(most / least, position);
    capacities.push_back(std::max<std::uint64_t>(1, static_cast<std::uint64_t>(capacity + 0.5)));
  }
  capacities.erase(std::unique(capacities.begin(), capacities.end()), capacities.end());
  return capacities;
}

Result<std::vector<PlannedSimulation>> plan_simulations(const SimulateOptions& options,
                                                        const RequestTrace& trace) {
  std::vector<std::vector<TierSpec>> caches;
  if (!options.tiers.empty()) {
    KVTIER_ASSIGN_OR_RETURN(std::vector<TierSpec> tiers, plan_hierarchy(options, trace));
    caches.push_back(std::move(tiers));
  }
  for (const BlockAmount& capacity : options.capacities) {
    const char* option = capacity.is_bytes() ? "--capacity-bytes" : "--capacity-blocks";
    KVTIER_ASSIGN_OR_RETURN(const std::uint64_t blocks,
                            blocks_of_amount(capacity, option, options, trace));
    caches.push_back({{kSingleTier, blocks}});
  }
  std::vector<PlannedSimulation> planned;
  for (const std::string& policy : options.policies) {
    if (policy == "infinite") {
      planned.push_back({policy, {}});
      continue;
    }
    for (const auto& tiers : caches) planned.push_back({policy, tiers});
  }
  return planned;
}

Simulator::Simulator(const RequestTrace& trace, const SimulateOptions& options, bool with_optimal)
    : trace_(trace),
      options_(options),
      profile_(ReuseProfile::measure(trace, options.touch_order)),
      next_uses_(with_optimal ? std::make_unique<NextUses>(trace) : nullptr) {}

SimulationRun Simulator::run(const PlannedSimulation& planned) const {
  if (planned.tiers.empty()) return profile_.infinite();
  if (planned.policy == "lru" && planned.tiers.size() == 1) {
    SimulationRun run = profile_.lru(planned.tiers.front().capacity_blocks);
    run.tiers.front().name = planned.tiers.front().name;
    return run;
  }
  if (planned.policy == "optimal") {
    KVTIER_CHECK(next_uses_ != nullptr, "the simulator was made without the optimum");
    std::vector<OptimalTier> tiers;
    std::uint64_t sum = 0;
    for (const TierSpec& tier : planned.tiers) {
      sum += tier.capacity_blocks;
      const bool nests = options_.hierarchy == Hierarchy::kInclusive;
      tiers.push_back({tier.name, tier.capacity_blocks, nests ? tier.capacity_blocks : sum});
    }
    return simulate_optimal(trace_, *next_uses_, tiers);
  }
  return run_cache(trace_, {.policy = planned.policy,
                            .tiers = planned.tiers,
                            .hierarchy = options_.hierarchy,
                            .touch_order = options_.touch_order,
                            .costs = options_.costs});
}

}  // namespace kvtier
