#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace kvtier {

/// What was found of the requests' prompts: the sums over all requests of their longest leading
/// runs of resident blocks.
struct HitCounts {
  std::uint64_t hit_blocks = 0;
  std::uint64_t hit_tokens = 0;
  std::uint64_t second_half_hit_tokens = 0;  ///< Of requests from index floor(n / 2) on.

  bool operator==(const HitCounts&) const = default;
};

/// One tier of a run. Hits are blocks of the leading runs, where each lay at arrival.
struct TierResult {
  std::string name;
  std::optional<std::uint64_t> capacity_blocks;  ///< None: without bound.
  std::uint64_t hit_blocks = 0;
  std::uint64_t hit_tokens = 0;
  /// What was written into the tier, and what left it for lack of room. None for an offline policy,
  /// which decides what lies where but not how it got there.
  std::optional<std::uint64_t> inserted_blocks;
  std::optional<std::uint64_t> inserted_tokens;
  std::optional<std::uint64_t> evicted_blocks;

  bool operator==(const TierResult&) const = default;
};

/// A policy at a capacity, or over a hierarchy of tiers.
struct SimulationRun {
  std::string policy;
  std::optional<std::uint64_t> capacity_blocks;  ///< Of all tiers that hold distinct blocks.
  HitCounts hits;
  std::vector<TierResult> tiers;

  bool operator==(const SimulationRun&) const = default;
};

}  // namespace kvtier
