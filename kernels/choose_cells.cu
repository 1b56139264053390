#include "kernels/choose_cells.h"
#include "kernels/radix_cut.cuh"
#include "kernels/top_k.h"

#include <algorithm>

// The first digit of the k-th score is known from the counts of pool_scan. The cells that reach
// that digit are collected in index order, and a CTA a list finds the other two digits among them
// and takes what is above and the first of what is equal, again in index order. Long lists are
// collected by a kernel of its own, in parts side by side; short ones by the CTA that chooses,
// because a launch costs more than 16,384 scores from the L2 cache.

namespace kvtier {
namespace {

constexpr unsigned kCollectThreads = 256;
constexpr unsigned kCells = 4;  ///< That a thread looks at together: 16 bytes.
constexpr unsigned kPickThreads = 512;
constexpr unsigned kMaxParts = 64;
/// Candidates that are kept in shared memory; more are read from where they were collected.
constexpr std::uint32_t kKept = 4096;
/// Up to this length a list is collected by the CTA that chooses.
constexpr std::size_t kShortList = 32768;

struct Arguments {
  float* scores;
  const std::uint32_t* bins;
  const std::uint32_t* run_counts;
  std::uint8_t* touched;
  std::uint32_t* part_counts;  ///< [lists, parts]
  std::uint64_t* collected;    ///< [lists, cells_max]
  std::uint32_t* chosen;
  std::uint32_t lists_per_sequence;
  std::uint32_t runs_max;
  std::uint32_t cells_per_run;
  std::uint32_t sink_cells;
  std::uint32_t parts;
  std::uint32_t k;

  __device__ std::uint32_t cells_max() const { return runs_max * cells_per_run; }
  __device__ std::uint32_t cell_count(std::uint32_t list) const {
    return min(run_counts[list / lists_per_sequence], runs_max) * cells_per_run;
  }
  /// How many are to be taken: no more than there are candidates.
  __device__ std::uint32_t wanted(std::uint32_t list) const {
    const std::uint32_t cells = cell_count(list);
    return min(k, cells > sink_cells ? cells - sink_cells : 0);
  }
  __device__ std::uint32_t part_begin(std::uint32_t list, std::uint32_t part) const {
    const std::uint32_t quads = cell_count(list) / kCells;
    return static_cast<std::uint32_t>(std::uint64_t{quads} * part / parts) * kCells;
  }
};

/// Collects the cells [begin, end) that reach the cut: store(place, candidate) in index order.
/// Returns how many there are.
template <unsigned kThreads, typename Store>
__device__ std::uint32_t collect(const Arguments& a, std::uint32_t list, const Cut& cut,
                                 std::uint32_t begin, std::uint32_t end, std::uint32_t* scratch,
                                 const Store& store) {
  const float* scores = a.scores + std::size_t{list} * a.cells_max();
  std::uint32_t taken = 0;
  float4 next = {};
  const std::uint32_t first = begin + threadIdx.x * kCells;
  if (first < end) next = *reinterpret_cast<const float4*>(scores + first);
  for (std::uint32_t at = begin; at < end; at += kThreads * kCells) {
    const std::uint32_t cell = at + threadIdx.x * kCells;
    const float4 x = next;
    const std::uint32_t behind = cell + kThreads * kCells;
    if (behind < end) next = *reinterpret_cast<const float4*>(scores + behind);
    std::uint32_t keys[kCells] = {key_of(x.x), key_of(x.y), key_of(x.z), key_of(x.w)};
    std::uint32_t mine = 0;
#pragma unroll
    for (unsigned i = 0; i < kCells; ++i) {
      if (cell >= end || cell + i < a.sink_cells || keys[i] < cut.prefix) keys[i] = 0;
      mine += keys[i] != 0 ? 1 : 0;
    }
    // Most of a list is far below the cut.
    if (!__syncthreads_or(mine > 0)) continue;
    std::uint32_t all;
    std::uint32_t place = taken + sum_before<kThreads>(mine, scratch, all);
#pragma unroll
    for (unsigned i = 0; i < kCells; ++i) {
      if (keys[i] != 0) store(place++, std::uint64_t{keys[i]} << 32 | (cell + i));
    }
    taken += all;
  }
  return taken;
}

__global__ void __launch_bounds__(kCollectThreads)
    collect_cells_kernel(const __grid_constant__ Arguments a) {
  __shared__ std::uint32_t scratch[kCollectThreads + 3];
  wait_for_previous_kernel();
  let_next_kernel_start();
  const std::uint32_t list = blockIdx.y;
  Cut cut;
  cut.left = a.wanted(list);
  std::uint32_t taken = 0;
  if (cut.left > 0) {
    narrow<kCollectThreads>(cut, 0, a.bins + std::size_t{list} * kBins, scratch);
    const std::uint32_t begin = a.part_begin(list, blockIdx.x);
    std::uint64_t* const target = a.collected + std::size_t{list} * a.cells_max() + begin;
    taken = collect<kCollectThreads>(
        a, list, cut, begin, a.part_begin(list, blockIdx.x + 1), scratch,
        [&](std::uint32_t place, std::uint64_t candidate) { target[place] = candidate; });
  }
  if (threadIdx.x == 0) a.part_counts[std::size_t{list} * a.parts + blockIdx.x] = taken;
}

/// The candidates of one list in index order, wherever they are.
struct Candidates {
  const std::uint64_t* kept;  ///< Shared memory: the first `kKept`.
  const std::uint64_t* collected;
  const std::uint32_t* begins;  ///< Shared memory, [parts + 1]: candidates before each part.
  const Arguments& a;
  std::uint32_t list;

  __device__ std::uint64_t fetch(std::uint32_t i) const {
    std::uint32_t part = 0;
    for (std::uint32_t half = kMaxParts / 2; half > 0; half /= 2) {
      if (part + half < a.parts && begins[part + half] <= i) part += half;
    }
    return collected[a.part_begin(list, part) + (i - begins[part])];
  }
  __device__ std::uint64_t at(std::uint32_t i) const { return i < kKept ? kept[i] : fetch(i); }
};

/// Writes out who is above the cut, and the first of who is at it.
__device__ void write_choice(const Arguments& a, std::uint32_t list, const Candidates& candidates,
                             std::uint32_t count, const Cut& cut, std::uint32_t* scratch) {
  std::uint32_t* const chosen = a.chosen + std::size_t{list} * a.k;
  std::uint32_t above = 0;
  std::uint32_t equal = 0;
  for (std::uint32_t at = 0; at < count; at += kPickThreads) {
    const std::uint32_t i = at + threadIdx.x;
    const std::uint64_t candidate = i < count ? candidates.at(i) : 0;
    const auto key = static_cast<std::uint32_t>(candidate >> 32);
    const bool is_above = i < count && (key & cut.mask) > cut.prefix;
    const bool is_equal = i < count && (key & cut.mask) == cut.prefix;
    std::uint32_t all;
    const std::uint32_t before =
        sum_before<kPickThreads>((is_above ? 1u : 0u) | (is_equal ? 0x10000u : 0u), scratch, all);
    const std::uint32_t equals_before = equal + (before >> 16);
    if (is_above || (is_equal && equals_before < cut.left)) {
      const auto cell = static_cast<std::uint32_t>(candidate);
      chosen[above + (before & 0xFFFF) + min(equals_before, cut.left)] = cell;
      // Marked for the estimate of the rest.
      a.scores[std::size_t{list} * a.cells_max() + cell] = -1.0f;
      a.touched[std::size_t{list} * a.runs_max + cell / a.cells_per_run] = 1;
    }
    above += all & 0xFFFF;
    equal += all >> 16;
  }
}

/// Where a list's candidates are, collected here or by the kernel before.
template <bool kCollected>
__device__ std::uint32_t gather_candidates(const Arguments& a, std::uint32_t list, const Cut& cut,
                                           std::uint32_t* begins, std::uint64_t* kept,
                                           std::uint32_t* scratch) {
  std::uint64_t* const collected = a.collected + std::size_t{list} * a.cells_max();
  if constexpr (!kCollected) {
    if (threadIdx.x == 0) begins[0] = 0;
    return collect<kPickThreads>(a, list, cut, 0, a.cell_count(list), scratch,
                                 [&](std::uint32_t place, std::uint64_t candidate) {
                                   (place < kKept ? kept : collected)[place] = candidate;
                                 });
  } else {
    std::uint32_t count;
    const std::uint32_t of_part =
        threadIdx.x < a.parts ? a.part_counts[std::size_t{list} * a.parts + threadIdx.x] : 0;
    const std::uint32_t before = sum_before<kPickThreads>(of_part, scratch, count);
    if (threadIdx.x < a.parts) begins[threadIdx.x] = before;
    __syncthreads();
    const Candidates candidates = {kept, collected, begins, a, list};
    for (std::uint32_t i = threadIdx.x; i < min(count, kKept); i += kPickThreads) {
      kept[i] = candidates.fetch(i);
    }
    return count;
  }
}

template <bool kCollected>
__global__ void __launch_bounds__(kPickThreads)
    pick_cells_kernel(const __grid_constant__ Arguments a) {
  __shared__ std::uint32_t scratch[kPickThreads + 3];
  __shared__ std::uint32_t counted[kBins];
  __shared__ std::uint32_t begins[kMaxParts + 1];
  __shared__ std::uint64_t kept[kKept];
  wait_for_previous_kernel();
  let_next_kernel_start();
  const std::uint32_t list = blockIdx.x;
  const std::uint32_t wanted = a.wanted(list);
  for (std::uint32_t i = wanted + threadIdx.x; i < a.k; i += kPickThreads) {
    a.chosen[std::size_t{list} * a.k + i] = kNoIndex;
  }
  if (wanted == 0) return;
  Cut cut;
  cut.left = wanted;
  narrow<kPickThreads>(cut, 0, a.bins + std::size_t{list} * kBins, scratch);
  const std::uint32_t count = gather_candidates<kCollected>(a, list, cut, begins, kept, scratch);
  const Candidates candidates = {kept, a.collected + std::size_t{list} * a.cells_max(), begins, a,
                                 list};
  // Where all that agree so far are taken, more digits say nothing new.
  for (unsigned digit = 1; digit < kDigits && cut.left < cut.equal; ++digit) {
    for (unsigned bin = threadIdx.x; bin < kBins; bin += kPickThreads) counted[bin] = 0;
    __syncthreads();
    for (std::uint32_t i = threadIdx.x; i < count; i += kPickThreads) {
      const auto key = static_cast<std::uint32_t>(candidates.at(i) >> 32);
      if ((key & cut.mask) == cut.prefix) {
        atomicAdd(&counted[key >> shift_of(digit) & (bins_of(digit) - 1)], 1u);
      }
    }
    __syncthreads();
    narrow<kPickThreads>(cut, digit, counted, scratch);
  }
  __syncthreads();
  write_choice(a, list, candidates, count, cut, scratch);
}

struct Plan {
  bool collects = false;  ///< A kernel of its own does.
  std::uint32_t parts = 1;
  std::size_t collected_offset = 0;
  std::size_t bytes = 0;
};

Plan plan_choice(const Gpu& gpu, const ScanParams& scan) {
  constexpr std::size_t kLeastPart = 4096;
  Plan plan;
  plan.collects = scan.cells_max() > kShortList;
  const std::size_t useful = (scan.cells_max() + kLeastPart - 1) / kLeastPart;
  const std::size_t fair = 2 * gpu.traits().multiprocessors / std::max(1u, scan.lists);
  if (plan.collects) {
    plan.parts = static_cast<std::uint32_t>(
        std::clamp(std::min(useful, fair), std::size_t{1}, std::size_t{kMaxParts}));
  }
  plan.collected_offset = (std::size_t{scan.lists} * plan.parts * 4 + 15) / 16 * 16;
  plan.bytes = plan.collected_offset + std::size_t{scan.lists} * scan.cells_max() * 8;
  return plan;
}

}  // namespace

std::size_t choose_cells_workspace_bytes(const Gpu& gpu, const ScanParams& scan) {
  return plan_choice(gpu, scan).bytes;
}

Status choose_cells(const Gpu& gpu, const ScanParams& scan, const ChooseCellsParams& params,
                    StreamRef stream) {
  if (params.k > kMaxTopK || scan.lists > 65535) {
    return unsupported(fmt::format("the {} best of {} lists, expected up to {} of 65535", params.k,
                                   scan.lists, kMaxTopK));
  }
  if (scan.lists == 0 || params.k == 0) return {};
  const Plan plan = plan_choice(gpu, scan);
  KVTIER_CHECK(params.workspace != nullptr, "no workspace");
  Arguments arguments = {
      .scores = scan.weights.scores,
      .bins = scan.weights.bins,
      .run_counts = scan.run_counts,
      .touched = scan.weights.touched,
      .part_counts = reinterpret_cast<std::uint32_t*>(params.workspace),
      .collected = reinterpret_cast<std::uint64_t*>(params.workspace + plan.collected_offset),
      .chosen = params.chosen,
      .lists_per_sequence = scan.lists_per_sequence,
      .runs_max = scan.runs_max,
      .cells_per_run = DeviceCodes::kRunTokens / scan.tokens_per_cell,
      .sink_cells = scan.sinks / scan.tokens_per_cell,
      .parts = plan.parts,
      .k = params.k};
  void* pointers[] = {&arguments};
  const bool early = gpu.traits().capability >= 90;
  const void* pick = reinterpret_cast<const void*>(&pick_cells_kernel<false>);
  if (plan.collects) {
    pick = reinterpret_cast<const void*>(&pick_cells_kernel<true>);
    KVTIER_RETURN_IF_ERROR(
        gpu.launch({.kernel = reinterpret_cast<const void*>(&collect_cells_kernel),
                    .grid = {plan.parts, scan.lists, 1},
                    .threads = kCollectThreads,
                    .arguments = pointers,
                    .stream = stream.get(),
                    .early = early},
                   "choose_cells"));
  }
  return gpu.launch({.kernel = pick,
                     .grid = {scan.lists, 1, 1},
                     .threads = kPickThreads,
                     .arguments = pointers,
                     .stream = stream.get(),
                     .early = early},
                    "choose_cells");
}

}  // namespace kvtier
