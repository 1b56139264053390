#include "kernels/attend_plan.h"

#include <algorithm>

namespace kvtier {
namespace {

constexpr std::size_t kAlignment = 256;

constexpr std::size_t align_up(std::size_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

constexpr std::uint64_t divide_up(std::uint64_t a, std::uint64_t b) { return (a + b - 1) / b; }

/// CTAs that run at one time on one multiprocessor, and costs in units of a team's tile: filling
/// the pipeline, and each split's share of merging. Measured on an H100: one wave is best wherever
/// it fills the GPU (over 128K tokens in 8 heads, us without merging, by splits: 33: 182, 66: 182,
/// 132: 182, 264: 184).
constexpr unsigned kCtasPerMultiprocessor = 2;
constexpr double kStartTiles = 3.0;
constexpr double kMergeTilesPerSplit = 0.01;

/// The number of splits under which the GPU is done first: whole waves of CTAs, each as long as its
/// share of the longest list.
std::uint32_t choose_splits(const GpuTraits& gpu, const AttendSlotsParams& params,
                            std::uint32_t units, std::uint32_t teams) {
  const std::uint64_t tokens = std::uint64_t{params.list_ranges_max} * params.slab.tokens_per_block;
  const std::uint64_t tiles = std::max<std::uint64_t>(1, divide_up(tokens, kAttendTileTokens));
  const std::uint64_t at_a_time = std::uint64_t{gpu.multiprocessors} * kCtasPerMultiprocessor;
  const auto most =
      static_cast<std::uint32_t>(std::min({std::uint64_t{kMaxSplits}, divide_up(tiles, teams),
                                           std::max<std::uint64_t>(1, params.list_ranges_max)}));
  std::uint32_t best = 1;
  double best_cost = 0.0;
  for (std::uint32_t splits = 1; splits <= most; ++splits) {
    const auto waves = double(divide_up(std::uint64_t{units} * splits, at_a_time));
    const auto share = double(divide_up(tiles, std::uint64_t{splits} * teams));
    const double cost = waves * (share + kStartTiles) + kMergeTilesPerSplit * splits;
    if (splits == 1 || cost < best_cost) {
      best = splits;
      best_cost = cost;
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
