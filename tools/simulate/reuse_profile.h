#pragma once

#include "tools/simulate/request_trace.h"
#include "tools/simulate/simulation_result.h"

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace kvtier {

/// In which order the blocks of a request are used, after its lookup.
enum class TouchOrder : unsigned char {
  /// Its first block ends most recently used, so that eviction trims prefixes from their tails.
  kLastFirst,
  kFirstFirst,
};
const char* to_string(TouchOrder order);

/// Of a sorted sample, the smallest value that a share of all samples does not exceed (nearest
/// rank). None without samples.
struct Quantiles {
  std::optional<double> p10;
  std::optional<double> p50;
  std::optional<double> p90;
  std::optional<double> p99;
};

/// How a trace uses its blocks again: exact LRU stack distances, and from them LRU of every
/// capacity and the ceiling, from one pass.
///
/// The stack distance of a block at a request is the number of distinct blocks used since its last
/// use, itself included, when the request arrives; a block is resident in LRU of capacity C iff
/// that is at most C. A request's block number i is a hit iff the largest distance of its blocks 0
/// .. i is at most C, so one histogram over these maxima holds the hits of all capacities.
///
/// Cost: a few ns per block reference where requests repeat runs of blocks, O(log unique)
/// otherwise; 64 bytes per distinct block.
class ReuseProfile {
 public:
  static ReuseProfile measure(const RequestTrace& trace, TouchOrder order);

  // Of the trace.
  std::uint64_t input_tokens() const { return input_tokens_; }
  std::uint64_t second_half_input_tokens() const { return second_half_input_tokens_; }
  std::uint64_t output_tokens() const { return output_tokens_; }
  std::uint64_t blocks_seen_once() const { return blocks_seen_once_; }
  /// Tokens of blocks that were seen before, wherever they stand in the prompt.
  std::uint64_t any_position_hit_tokens() const { return any_position_hit_tokens_; }
  const Quantiles& stack_distance_blocks() const { return stack_distance_blocks_; }
  const Quantiles& reuse_time_s() const { return reuse_time_s_; }

  /// LRU of `capacity_blocks`, from 1. O(1).
  SimulationRun lru(std::uint64_t capacity_blocks) const;
  /// A cache without bound.
  SimulationRun infinite() const;

 private:
  class Pass;

  /// For each distance: sums over all that is no farther.
  struct Cumulative {
    HitCounts hits;
    std::uint64_t reused_blocks = 0;  ///< Uses that find their block resident.
    std::uint64_t reused_tokens = 0;
  };

  std::uint64_t input_tokens_ = 0;
  std::uint64_t second_half_input_tokens_ = 0;
  std::uint64_t output_tokens_ = 0;
  std::uint64_t blocks_seen_once_ = 0;
  std::uint64_t any_position_hit_tokens_ = 0;
  std::uint64_t used_blocks_ = 0;
  std::uint64_t used_tokens_ = 0;
  std::uint64_t unique_blocks_ = 0;
  Quantiles stack_distance_blocks_;
  Quantiles reuse_time_s_;
  std::vector<Cumulative> by_distance_;
};

}  // namespace kvtier
