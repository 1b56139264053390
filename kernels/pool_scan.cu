#include "kernels/kv_view.h"
#include "kernels/radix_cut.cuh"
#include "kernels/scan_codes.h"

#include <algorithm>

// From the weights of every query to one score a cell. All CTAs of a list add up its few partial
// log-sum-exps again, which costs less than a kernel that does so once.

namespace kvtier {
namespace {

constexpr unsigned kThreads = 256;
/// Cells that a thread adds up side by side: 16 bytes.
constexpr unsigned kCells = 4;
constexpr unsigned kMaxGroup = kThreads / kWarpLanes;
static_assert(kBins == kScoreBins);

struct Arguments {
  const float* cells;
  const float* tops;
  const float* part_lse2;
  const float* near_lse;
  const std::uint32_t* run_counts;
  float* lse2;
  float* scores;
  std::uint32_t* bins;
  std::uint32_t lists_per_sequence;
  std::uint32_t runs_max;
  std::uint32_t parts;
  std::uint32_t group;
  std::uint32_t cells_per_run;
  std::uint32_t sink_cells;
};

/// Query `warp`'s log-sum-exp over all tokens, to base 2.
__device__ float whole_lse2(const Arguments& a, std::uint32_t list, unsigned query) {
  const unsigned lane = threadIdx.x % kWarpLanes;
  float near = kEmptyLse;
  if (a.near_lse != nullptr) near = a.near_lse[std::size_t{list} * a.group + query] * kLog2E;
  const float* parts = a.part_lse2 + std::size_t{list} * a.parts * a.group + query;
  float top = near;
  for (unsigned p = lane; p < a.parts; p += kWarpLanes) top = fmaxf(top, parts[p * a.group]);
#pragma unroll
  for (unsigned i = 16; i > 0; i /= 2) top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, i));
  const float base = top == kEmptyLse ? 0.0f : top;
  float total = lane == 0 ? exp2f(near - base) : 0.0f;
  for (unsigned p = lane; p < a.parts; p += kWarpLanes) total += exp2f(parts[p * a.group] - base);
#pragma unroll
  for (unsigned i = 16; i > 0; i /= 2) total += __shfl_xor_sync(kAllLanes, total, i);
  return total == 0.0f ? kEmptyLse : base + log2f(total);
}

__global__ void __launch_bounds__(kThreads) pool_scan_kernel(const __grid_constant__ Arguments a) {
  __shared__ float lse2[kMaxGroup];
  __shared__ std::uint32_t counted[kBins];
  wait_for_previous_kernel();
  let_next_kernel_start();
  const std::uint32_t list = blockIdx.y;
  const unsigned warp = threadIdx.x / kWarpLanes;
  for (unsigned bin = threadIdx.x; bin < kBins; bin += kThreads) counted[bin] = 0;
  if (warp < a.group) {
    const float whole = whole_lse2(a, list, warp);
    if (threadIdx.x % kWarpLanes == 0) {
      lse2[warp] = whole;
      if (blockIdx.x == 0) a.lse2[std::size_t{list} * a.group + warp] = whole;
    }
  }
  __syncthreads();
  const std::uint32_t cells_max = a.runs_max * a.cells_per_run;
  const std::uint32_t runs = min(a.run_counts[list / a.lists_per_sequence], a.runs_max);
  const std::uint32_t count = runs * a.cells_per_run;
  const std::uint32_t step = gridDim.x * kThreads * kCells;
  for (std::uint32_t cell = (blockIdx.x * kThreads + threadIdx.x) * kCells; cell < count;
       cell += step) {
    const float* tops =
        a.tops + (std::size_t{list} * a.runs_max + cell / a.cells_per_run) * a.group;
    float sums[kCells] = {};
    for (unsigned query = 0; query < a.group; ++query) {
      const float scale = exp2f(tops[query] - lse2[query]);
      const float4 weights = __ldcs(reinterpret_cast<const float4*>(
          a.cells + (std::size_t{list} * a.group + query) * cells_max + cell));
      sums[0] += scale * weights.x;
      sums[1] += scale * weights.y;
      sums[2] += scale * weights.z;
      sums[3] += scale * weights.w;
    }
#pragma unroll
    for (unsigned i = 0; i < kCells; ++i) {
      if (cell + i < a.sink_cells) {
        sums[i] = -1.0f;
      } else {
        atomicAdd(&counted[key_of(sums[i]) >> shift_of(0)], 1u);
      }
    }
    *reinterpret_cast<float4*>(a.scores + std::size_t{list} * cells_max + cell) = {
        sums[0], sums[1], sums[2], sums[3]};
  }
  __syncthreads();
  for (unsigned bin = threadIdx.x; bin < kBins; bin += kThreads) {
    if (counted[bin] > 0) {
      atomicAdd(&a.bins[std::size_t{list} * kBins + bin], counted[bin]);
    }
  }
}

}  // namespace

Status pool_scan(const Gpu& gpu, const ScanParams& params, StreamRef stream) {
  if (params.group > kMaxGroup || params.lists > 65535) {
    return unsupported(fmt::format("{} lists of {} query heads, expected up to 65535 of {}",
                                   params.lists, params.group, kMaxGroup));
  }
  if (params.lists == 0 || params.runs_max == 0) return {};
  const std::uint32_t cells_per_run = DeviceCodes::kRunTokens / params.tokens_per_cell;
  Arguments arguments = {.cells = params.weights.cells,
                         .tops = params.weights.tops,
                         .part_lse2 = params.weights.part_lse2,
                         .near_lse = params.near_lse,
                         .run_counts = params.run_counts,
                         .lse2 = params.weights.lse2,
                         .scores = params.weights.scores,
                         .bins = params.weights.bins,
                         .lists_per_sequence = params.lists_per_sequence,
                         .runs_max = params.runs_max,
                         .parts = scan_parts(gpu, params),
                         .group = params.group,
                         .cells_per_run = cells_per_run,
                         .sink_cells = params.sinks / params.tokens_per_cell};
  void* pointers[] = {&arguments};
  constexpr std::size_t kPerCta = std::size_t{2} * kThreads * kCells;
  const std::size_t useful = (params.cells_max() + kPerCta - 1) / kPerCta;
  const std::size_t fair = std::max(1u, 4 * gpu.traits().multiprocessors / params.lists);
  return gpu.launch({.kernel = reinterpret_cast<const void*>(&pool_scan_kernel),
                     .grid = {static_cast<unsigned>(std::min(useful, fair)), params.lists, 1},
                     .threads = kThreads,
                     .arguments = pointers,
                     .stream = stream.get(),
                     .early = gpu.traits().capability >= 90},
                    "pool_scan");
}

}  // namespace kvtier
