#include "kernels/attend_plan.h"

#include <algorithm>

namespace kvtier {
namespace {

constexpr std::size_t kAlignment = 256;

constexpr std::size_t align_up(std::size_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

constexpr std::uint64_t divide_up(std::uint64_t a, std::uint64_t b) { return (a + b - 1) / b; }

/// CTAs that run at one time on one multiprocessor.
constexpr unsigned kCtasPerMultiprocessor = 2;

/// What a division costs, in microseconds; a full GPU reads 3 TB/s. Measured on an H100 (8 heads x
/// 128, us by splits): 2K tokens: 1: 43, 16: 9.6, 33: 10.6; 32K: 16: 58, 33: 55, 66: 56, 132: 61;
/// 128K: 16: 202, 33: 188, 66: 187, 132: 188, 264: 194.
constexpr double kWaveUs = 1.5;       ///< Starting a wave of CTAs.
constexpr double kFirstTileUs = 1.3;  ///< A team's first tile, from memory to its sums.
constexpr double kTileUs = 2.0;       ///< Each tile after it.
constexpr double kMergeUs = 2.8;      ///< The second kernel, and its share of each split.
constexpr double kMergeSplitUs = 0.05;
constexpr double kBytesPerUs = 3e6;

/// The number of splits under which the GPU is done first: whole waves of CTAs, each as long as its
/// share of the longest list takes one team, or all together the memory.
std::uint32_t choose_splits(const GpuTraits& gpu, const AttendSlotsParams& params,
                            std::uint32_t units, std::uint32_t teams) {
  const KvSlab& slab = params.slab;
  const std::uint64_t tokens = std::uint64_t{params.list_ranges_max} * slab.tokens_per_block;
  const std::uint64_t tiles = std::max<std::uint64_t>(1, divide_up(tokens, kAttendTileTokens));
  const std::uint64_t at_a_time = std::uint64_t{gpu.multiprocessors} * kCtasPerMultiprocessor;
  const double tile_bytes = double(kAttendTileTokens) * double(size_of(slab.dtype)) *
                            (slab.head_dim + (slab.values_in_keys ? 0 : slab.value_dim));
  const auto most =
      static_cast<std::uint32_t>(std::min<std::uint64_t>(kMaxSplits, divide_up(tiles, teams)));
  std::uint32_t best = 1;
  double best_us = 0.0;
  for (std::uint32_t splits = 1; splits <= most; ++splits) {
    const std::uint64_t ctas = std::uint64_t{units} * splits;
    const auto waves = double(divide_up(ctas, at_a_time));
    const auto share = double(divide_up(tiles, std::uint64_t{splits} * teams));
    const double memory_us =
        share * double(std::min(ctas, at_a_time)) * teams * tile_bytes / kBytesPerUs;
    const double team_us = kFirstTileUs + (share - 1.0) * kTileUs;
    const double merge_us = splits == 1 ? 0.0 : kMergeUs + kMergeSplitUs * splits;
    const double us = waves * (kWaveUs + std::max(memory_us, team_us)) + merge_us;
    if (splits == 1 || us < best_us) {
      best = splits;
      best_us = us;
    }
  }
  return best;
}

}  // namespace

AttendPlan plan_attend(const GpuTraits& gpu, const AttendSlotsParams& params, std::uint32_t teams) {
  AttendPlan plan;
  plan.rows = params.query_count * params.queries_per_kv_head;
  plan.row_groups = static_cast<std::uint32_t>(divide_up(plan.rows, kAttendRows));
  plan.units =
      params.sequences * params.head_groups * params.slab.heads_per_block * plan.row_groups;
  plan.splits = choose_splits(gpu, params, plan.units, teams);
  if (plan.splits > 1) {
    const std::size_t states = std::size_t{plan.units} * plan.splits * kAttendRows;
    plan.partial_out_offset = align_up(states * sizeof(float));
    plan.workspace_bytes = plan.partial_out_offset + states * params.slab.value_dim * sizeof(float);
  }
  return plan;
}

}  // namespace kvtier
