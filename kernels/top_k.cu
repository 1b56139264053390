#include "kernels/radix_cut.cuh"
#include "kernels/top_k.h"
#include "kernels/warp.cuh"

#include <algorithm>
#include <array>

// Radix selection: scores become integers of the same order, and the k-th largest is found digit
// by digit from the top, as top_k_cpu.cc does. Every kernel counts one digit of those scores that
// agree with the digits before, and the next one reads the counts. Of equal scores at the cut the
// first by index are taken: CTAs own consecutive parts of a list, and the last digit is counted per
// CTA, so each knows how many equals lie before its part. What is above the cut is collected in any
// order, because it is sorted in the end.

namespace kvtier {
namespace {

constexpr unsigned kThreads = 512;
constexpr unsigned kMaxParts = 64;
static_assert(kMaxParts <= kThreads);
constexpr unsigned kSortThreads = 1024;
/// Scores of one CTA, at least: below, its reading costs less than its start.
constexpr std::uint32_t kLeastPart = 2048;

struct Arguments {
  const float* scores;
  std::uint64_t stride;
  const std::uint32_t* counts;
  std::uint32_t count_max;
  std::uint32_t k;
  std::uint32_t parts;       ///< CTAs per list.
  std::uint32_t* taken;      ///< [lists]: collected so far.
  std::uint32_t* bins;       ///< [lists, kDigits, kBins]
  std::uint32_t* part_bins;  ///< [lists, parts, kBins]: of the last digit.
  std::uint64_t* collected;  ///< [lists, k]
  std::uint32_t* indices;
};

__device__ std::uint32_t count_of(const Arguments& a, std::uint32_t list) {
  return a.counts == nullptr ? a.count_max : min(a.counts[list], a.count_max);
}

/// The part of a list that this CTA owns.
struct Part {
  const float* scores;
  std::uint32_t begin;
  std::uint32_t end;

  __device__ Part(const Arguments& a, std::uint32_t list, std::uint32_t count)
      : scores(a.scores + list * a.stride) {
    begin = static_cast<std::uint32_t>(std::uint64_t{count} * blockIdx.x / a.parts);
    end = static_cast<std::uint32_t>(std::uint64_t{count} * (blockIdx.x + 1) / a.parts);
  }
};

__device__ Cut find_cut(const Arguments& a, std::uint32_t list, std::uint32_t count,
                        unsigned digits, std::uint32_t* scratch) {
  Cut cut;
  cut.left = min(a.k, count);
  for (unsigned digit = 0; digit < digits; ++digit) {
    narrow<kThreads>(cut, digit, a.bins + (std::size_t{list} * kDigits + digit) * kBins, scratch);
  }
  return cut;
}

/// Counts digit `digit` of this CTA's part among the keys that agree with the digits before.
__global__ void __launch_bounds__(kThreads)
    count_digit_kernel(const __grid_constant__ Arguments a, unsigned digit) {
  __shared__ std::uint32_t counted[kBins];
  __shared__ std::uint32_t scratch[kThreads + 3];
  wait_for_previous_kernel();
  let_next_kernel_start();
  const std::uint32_t list = blockIdx.y;
  const std::uint32_t count = count_of(a, list);
  for (unsigned bin = threadIdx.x; bin < kBins; bin += kThreads) counted[bin] = 0;
  const Cut cut = count == 0 ? Cut{} : find_cut(a, list, count, digit, scratch);
  __syncthreads();
  const Part part(a, list, count);
  // Scores crowd in few bins; adding once for all lanes of a warp (match) was slower all the same.
#pragma unroll 8
  for (std::uint32_t i = part.begin + threadIdx.x; i < part.end; i += kThreads) {
    const std::uint32_t key = key_of(part.scores[i]);
    if ((key & cut.mask) == cut.prefix) {
      atomicAdd(&counted[key >> shift_of(digit) & (bins_of(digit) - 1)], 1u);
    }
  }
  __syncthreads();
  for (unsigned bin = threadIdx.x; bin < kBins; bin += kThreads) {
    if (digit == 2) {
      a.part_bins[(std::size_t{list} * a.parts + blockIdx.x) * kBins + bin] = counted[bin];
    }
    if (counted[bin] > 0) {
      atomicAdd(&a.bins[(std::size_t{list} * kDigits + digit) * kBins + bin], counted[bin]);
    }
  }
}

/// Orders descending by key, then ascending by index.
__device__ std::uint64_t pack(std::uint32_t key, std::uint32_t index) {
  return std::uint64_t{key} << 32 | (0xFFFFFFFFu - index);
}

__global__ void __launch_bounds__(kThreads) collect_kernel(const __grid_constant__ Arguments a) {
  __shared__ std::uint32_t scratch[kThreads + 3];
  __shared__ std::uint32_t equals[kThreads / kWarpLanes];
  wait_for_previous_kernel();
  let_next_kernel_start();
  const std::uint32_t list = blockIdx.y;
  const std::uint32_t count = count_of(a, list);
  if (count == 0 || a.k == 0) return;
  const Cut cut = find_cut(a, list, count, kDigits, scratch);
  const Part part(a, list, count);
  std::uint64_t* const collected = a.collected + std::size_t{list} * a.k;
  const std::uint32_t* bins = a.part_bins + std::size_t{list} * a.parts * kBins;
  if (threadIdx.x == 0) scratch[0] = 0;
  __syncthreads();
  if (threadIdx.x < blockIdx.x) {
    atomicAdd(scratch, bins[threadIdx.x * kBins + (cut.prefix & 1023)]);
  }
  __syncthreads();
  std::uint32_t equals_before = scratch[0];
  const unsigned lane = threadIdx.x % kWarpLanes;
  const unsigned warp = threadIdx.x / kWarpLanes;
  for (std::uint32_t at = part.begin; at < part.end; at += kThreads) {
    const std::uint32_t i = at + threadIdx.x;
    const std::uint32_t key = i < part.end ? key_of(part.scores[i]) : 0;
    if (i < part.end && key > cut.prefix) collected[atomicAdd(a.taken + list, 1u)] = pack(key, i);
    const bool equal = i < part.end && key == cut.prefix;
    // Equals are counted on only while some are still to be taken; the same for all threads.
    if (equals_before >= cut.left || !__syncthreads_or(equal)) continue;
    const unsigned ballot = __ballot_sync(kAllLanes, equal);
    if (lane == 0) equals[warp] = __popc(ballot);
    __syncthreads();
    std::uint32_t rank = equals_before + __popc(ballot & ((1u << lane) - 1));
    for (unsigned w = 0; w < kThreads / kWarpLanes; ++w) {
      if (w < warp) rank += equals[w];
      equals_before += equals[w];
    }
    // The last places are theirs: there are exactly `left` of them.
    if (equal && rank < cut.left) collected[min(a.k, count) - 1 - rank] = pack(key, i);
    __syncthreads();
  }
}

/// Sorts what was collected for one list, and writes its indices.
__global__ void __launch_bounds__(kSortThreads)
    sort_kernel(const __grid_constant__ Arguments a, std::uint32_t size) {
  extern __shared__ std::uint64_t sorted[];
  wait_for_previous_kernel();
  let_next_kernel_start();
  const std::uint32_t list = blockIdx.x;
  const std::uint32_t picked = min(a.k, count_of(a, list));
  for (unsigned i = threadIdx.x; i < size; i += kSortThreads) {
    sorted[i] = i < picked ? a.collected[std::size_t{list} * a.k + i] : 0;
  }
  for (unsigned run = 2; run <= size; run *= 2) {
    for (unsigned step = run / 2; step > 0; step /= 2) {
      __syncthreads();
      for (unsigned i = threadIdx.x; i < size / 2; i += kSortThreads) {
        const unsigned low = i / step * step * 2 + i % step;
        const unsigned high = low + step;
        const bool descending = (low & run) == 0;
        const std::uint64_t x = sorted[low];
        const std::uint64_t y = sorted[high];
        if ((x < y) == descending) {
          sorted[low] = y;
          sorted[high] = x;
        }
      }
    }
  }
  __syncthreads();
  for (unsigned i = threadIdx.x; i < a.k; i += kSortThreads) {
    const auto index = 0xFFFFFFFFu - static_cast<std::uint32_t>(sorted[i]);
    a.indices[std::size_t{list} * a.k + i] = i < picked ? index : kNoIndex;
  }
}

struct Plan {
  std::uint32_t parts = 1;
  std::size_t bins_offset = 0;
  std::size_t part_bins_offset = 0;
  std::size_t collected_offset = 0;
  std::size_t bytes = 0;
};

Plan plan_top_k(const Gpu& gpu, const TopKParams& params) {
  constexpr std::size_t kAlignment = 16;
  const auto align = [](std::size_t bytes) {
    return (bytes + kAlignment - 1) / kAlignment * kAlignment;
  };
  Plan plan;
  const std::uint32_t useful = (params.count_max + kLeastPart - 1) / kLeastPart;
  const std::uint32_t fair = 2 * gpu.traits().multiprocessors / std::max(1u, params.lists);
  plan.parts = std::clamp(std::min(useful, fair), 1u, kMaxParts);
  const std::size_t lists = params.lists;
  plan.bins_offset = align(lists * 4);
  plan.part_bins_offset = plan.bins_offset + lists * kDigits * kBins * 4;
  plan.collected_offset = plan.part_bins_offset + lists * plan.parts * kBins * 4;
  plan.bytes = plan.collected_offset + lists * params.k * 8;
  return plan;
}

Status launch_all(const Gpu& gpu, const TopKParams& params, const Plan& plan, Arguments& arguments,
                  StreamRef stream) {
  const bool early = gpu.traits().capability >= 90;
  const auto launch = [&](const void* kernel, std::array<unsigned, 3> grid, unsigned threads,
                          std::size_t shared, void* second, bool may_be_early) {
    void* pointers[] = {&arguments, second};
    return gpu.launch({.kernel = kernel,
                       .grid = grid,
                       .threads = threads,
                       .shared_bytes = shared,
                       .arguments = pointers,
                       .stream = stream.get(),
                       .early = early && may_be_early},
                      "top_k");
  };
  for (unsigned digit = 0; digit < kDigits; ++digit) {
    // The first one follows the clearing of the counts, which is no kernel to be early on.
    KVTIER_RETURN_IF_ERROR(launch(reinterpret_cast<const void*>(&count_digit_kernel),
                                  {plan.parts, params.lists, 1}, kThreads, 0, &digit, digit > 0));
  }
  KVTIER_RETURN_IF_ERROR(launch(reinterpret_cast<const void*>(&collect_kernel),
                                {plan.parts, params.lists, 1}, kThreads, 0, nullptr, true));
  std::uint32_t size = 2;
  while (size < params.k) size *= 2;
  return launch(reinterpret_cast<const void*>(&sort_kernel), {params.lists, 1, 1}, kSortThreads,
                size * sizeof(std::uint64_t), &size, true);
}

}  // namespace

std::size_t top_k_workspace_bytes(const Gpu& gpu, const TopKParams& params) {
  return plan_top_k(gpu, params).bytes;
}

Status top_k(const Gpu& gpu, const TopKParams& params, StreamRef stream) {
  if (params.k > kMaxTopK || params.lists > 65535) {
    return unsupported(fmt::format("the {} best of {} lists, expected up to {} of 65535", params.k,
                                   params.lists, kMaxTopK));
  }
  if (params.lists == 0 || params.k == 0) return {};
  const Plan plan = plan_top_k(gpu, params);
  std::byte* const workspace = params.workspace;
  KVTIER_CHECK(workspace != nullptr, "no workspace");
  Arguments arguments = {
      .scores = params.scores,
      .stride = params.stride,
      .counts = params.counts,
      .count_max = params.count_max,
      .k = params.k,
      .parts = plan.parts,
      .taken = reinterpret_cast<std::uint32_t*>(workspace),
      .bins = reinterpret_cast<std::uint32_t*>(workspace + plan.bins_offset),
      .part_bins = reinterpret_cast<std::uint32_t*>(workspace + plan.part_bins_offset),
      .collected = reinterpret_cast<std::uint64_t*>(workspace + plan.collected_offset),
      .indices = params.indices};
  KVTIER_RETURN_IF_ERROR(
      cuda_status(gpu.calls(), gpu.calls().fill(workspace, 0, plan.part_bins_offset, stream.get()),
                  "clearing the counts of top_k"));
  return launch_all(gpu, params, plan, arguments, stream);
}

}  // namespace kvtier
