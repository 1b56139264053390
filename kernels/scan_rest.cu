#include "kernels/kv_view.h"
#include "kernels/scan_codes.h"
#include "kernels/tensor_core.cuh"

#include <algorithm>

// Mean values by the weights of what is not chosen. A run of which nothing is chosen counts with
// the sum that the scan left; only of the others are cells looked at. CTAs of a list take runs by
// the piece and leave partial sums, which a second kernel adds in one order. A piece's means are
// asked for before its weights are known. Measured on an H100 at 1M tokens: two values a thread and
// a wait for the weights first took 50 us, where 34 MB are 12.

namespace kvtier {
namespace {

constexpr unsigned kThreads = 256;
constexpr unsigned kWarps = kThreads / kWarpLanes;
constexpr unsigned kPieceRuns = 64;
constexpr unsigned kMaxGroup = 8;
static_assert(kMaxGroup <= kWarps);
constexpr unsigned kMaxRestParts = 64;
/// The second kernel: threads a value, and parts that are added side by side.
constexpr unsigned kValueThreads = 128;
constexpr unsigned kFinishWays = 4;
/// Behind the sums of a part: their weight, and padding to 16 bytes.
constexpr unsigned kWeightPad = 4;

struct Arguments {
  const float* cells;
  const float* tops;
  const float* sums;
  const float* lse2;
  const float* scores;
  const std::uint8_t* touched;
  const std::byte* means;
  const std::uint32_t* run_counts;
  float* parts;
  const std::uint8_t* rows;
  float* out;
  float* lse;
  std::uint32_t lists_per_sequence;
  std::uint32_t runs_max;
  std::uint32_t group;
  std::uint32_t cells_per_run;
  std::uint32_t value_dim;
  std::uint32_t part_count;

  __device__ float* part(std::uint32_t list, std::uint32_t part, std::uint32_t query) const {
    return parts +
           ((std::size_t{list} * part_count + part) * group + query) * (value_dim + kWeightPad);
  }
};

/// The weight of a run's cells that are not chosen, relative to all tokens.
__device__ float rest_of_run(const Arguments& a, std::uint32_t list, std::uint32_t run,
                             std::uint32_t query, float lse2) {
  const std::size_t place = std::size_t{list} * a.runs_max + run;
  const float scale = exp2f(a.tops[place * a.group + query] - lse2);
  if (a.touched[place] == 0) return scale * a.sums[place * a.group + query];
  const std::uint32_t cells_max = a.runs_max * a.cells_per_run;
  const std::size_t first = std::size_t{run} * a.cells_per_run;
  const float* scores = a.scores + std::size_t{list} * cells_max + first;
  const float* weights = a.cells + (std::size_t{list} * a.group + query) * cells_max + first;
  float sum = 0.0f;
  for (std::uint32_t i = 0; i < a.cells_per_run; i += 4) {
    const float4 score = *reinterpret_cast<const float4*>(scores + i);
    const float4 weight = *reinterpret_cast<const float4*>(weights + i);
    // A negative score is a chosen one; not-a-number is none.
    sum += score.x < 0.0f ? 0.0f : weight.x;
    sum += score.y < 0.0f ? 0.0f : weight.y;
    sum += score.z < 0.0f ? 0.0f : weight.z;
    sum += score.w < 0.0f ? 0.0f : weight.w;
  }
  return scale * sum;
}

/// Adds one query's sums up over the CTA, ways within a warp first. All threads call.
template <unsigned kValueDim>
__device__ void leave_sums(float (&sums)[8], float (&shared_sums)[kWarps][kValueDim],
                           float* target) {
  constexpr unsigned kRowLanes = kValueDim / 8;
  const unsigned warp = threadIdx.x / kWarpLanes;
  const unsigned lane = threadIdx.x % kWarpLanes;
#pragma unroll
  for (float& sum : sums) {
#pragma unroll
    for (unsigned lanes = kRowLanes; lanes < kWarpLanes; lanes *= 2) {
      sum += __shfl_xor_sync(kAllLanes, sum, lanes);
    }
  }
  __syncthreads();
  if (lane < kRowLanes) {
#pragma unroll
    for (unsigned i = 0; i < 8; ++i) shared_sums[warp][lane * 8 + i] = sums[i];
  }
  __syncthreads();
  if (threadIdx.x >= kValueDim) return;
  float sum = 0.0f;
#pragma unroll
  for (unsigned w = 0; w < kWarps; ++w) sum += shared_sums[w][threadIdx.x];
  target[threadIdx.x] = sum;
}

/// A thread holds eight values of every so many-th run of a piece, for all queries.
template <typename Element, unsigned kValueDim>
__global__ void __launch_bounds__(kThreads) sum_rest_kernel(const __grid_constant__ Arguments a) {
  constexpr unsigned kRowLanes = kValueDim / 8;
  constexpr unsigned kWays = kThreads / kRowLanes;
  constexpr unsigned kRows = kPieceRuns / kWays;  // Of one thread in one piece.
  __shared__ float weights[kMaxGroup][kPieceRuns];
  __shared__ float shared_sums[kWarps][kValueDim];
  wait_for_previous_kernel();
  let_next_kernel_start();
  const std::uint32_t list = blockIdx.y;
  const std::uint32_t runs = min(a.run_counts[list / a.lists_per_sequence], a.runs_max);
  const unsigned warp = threadIdx.x / kWarpLanes;
  const unsigned lane = threadIdx.x % kWarpLanes;
  const unsigned way = threadIdx.x / kRowLanes;
  const unsigned eighth = threadIdx.x % kRowLanes;
  const auto* means =
      reinterpret_cast<const uint4*>(a.means) + std::size_t{list} * a.runs_max * kRowLanes + eighth;
  float sums[kMaxGroup][8] = {};
  float total = 0.0f;  // Of query `warp`.
  for (std::uint32_t first = blockIdx.x * kPieceRuns; first < runs;
       first += gridDim.x * kPieceRuns) {
    uint4 rows[kRows];
#pragma unroll
    for (unsigned r = 0; r < kRows; ++r) {
      const std::uint32_t run = first + way + r * kWays;
      rows[r] = {};
      if (run < runs) rows[r] = __ldcs(means + std::size_t{run} * kRowLanes);
    }
    __syncthreads();
    for (unsigned i = threadIdx.x; i < kPieceRuns * a.group; i += kThreads) {
      const unsigned query = i % a.group;
      const std::uint32_t run = first + i / a.group;
      const float lse2 = a.lse2[std::size_t{list} * a.group + query];
      weights[query][i / a.group] = run < runs ? rest_of_run(a, list, run, query, lse2) : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (unsigned r = 0; r < kRows; ++r) {
      const std::uint32_t words[4] = {rows[r].x, rows[r].y, rows[r].z, rows[r].w};
#pragma unroll
      for (unsigned w = 0; w < 4; ++w) {
        const float2 mean = TensorCore<Element>::unpack(words[w]);
#pragma unroll
        for (unsigned query = 0; query < kMaxGroup; ++query) {
          if (query >= a.group) break;
          const float weight = weights[query][way + r * kWays];
          sums[query][2 * w] += weight * mean.x;
          sums[query][2 * w + 1] += weight * mean.y;
        }
      }
    }
    if (warp < a.group) total += weights[warp][lane] + weights[warp][lane + kWarpLanes];
  }
#pragma unroll
  for (unsigned i = 16; i > 0; i /= 2) total += __shfl_xor_sync(kAllLanes, total, i);
  if (warp < a.group && lane == 0) a.part(list, blockIdx.x, warp)[kValueDim] = total;
#pragma unroll
  for (unsigned query = 0; query < kMaxGroup; ++query) {
    if (query >= a.group) break;
    leave_sums<kValueDim>(sums[query], shared_sums, a.part(list, blockIdx.x, query));
  }
}

/// CTA (list, query): a group of threads per kFinishWays-th part, a thread of it per value.
__global__ void __launch_bounds__(kValueThreads* kFinishWays)
    finish_rest_kernel(const __grid_constant__ Arguments a) {
  __shared__ float sums[kFinishWays][kValueThreads];
  __shared__ float totals[kFinishWays];
  wait_for_previous_kernel();
  let_next_kernel_start();
  const std::uint32_t list = blockIdx.x;
  const std::uint32_t query = blockIdx.y;
  const std::size_t row = std::size_t{list} * a.group + query;
  const unsigned way = threadIdx.x / kValueThreads;
  const unsigned value = threadIdx.x % kValueThreads;
  float total = 0.0f;
  float sum = 0.0f;
#pragma unroll 8
  for (std::uint32_t p = way; p < a.part_count; p += kFinishWays) {
    const float* part = a.part(list, p, query);
    total += part[a.value_dim];
    if (value < a.value_dim) sum += part[value];
  }
  sums[way][value] = sum;
  if (value == 0) totals[way] = total;
  __syncthreads();
  if (way > 0) return;
  for (unsigned w = 1; w < kFinishWays; ++w) {
    sum += sums[w][value];
    total += totals[w];
  }
  // Too little for float32 is nothing. What is not a number compares as false, and stays.
  const bool left_out = a.rows != nullptr && a.rows[row] == 0 && total == total;
  const bool empty = left_out || total < 1e-37f;
  if (value < a.value_dim) a.out[row * a.value_dim + value] = empty ? 0.0f : sum / total;
  if (value == 0) a.lse[row] = empty ? kEmptyLse : a.lse2[row] * kLn2 + logf(total);
}

}  // namespace

std::uint32_t rest_parts(const Gpu& gpu, const ScanParams& params) {
  const std::uint32_t useful = (params.runs_max + kPieceRuns - 1) / kPieceRuns;
  const std::uint32_t fair = 8 * gpu.traits().multiprocessors / std::max(1u, params.lists);
  return std::max(1u, std::min({useful, fair, kMaxRestParts}));
}

Status estimate_rest(const Gpu& gpu, const ScanParams& params, const ScanRestParams& rest,
                     StreamRef stream) {
  const bool shape = params.group <= kMaxGroup && params.lists <= 65535 &&
                     (params.value_dim == 64 || params.value_dim == 128) &&
                     params.codes.dtype != DType::kF32 && params.tokens_per_cell > 0 &&
                     params.tokens_per_cell <= 16;
  if (!shape) {
    return unsupported(fmt::format("an estimate on the GPU of {} values of {} for {} query heads",
                                   to_string(params.codes.dtype), params.value_dim, params.group));
  }
  if (params.lists == 0 || params.runs_max == 0) return {};
  const ScanWeights& weights = params.weights;
  Arguments arguments = {.cells = weights.cells,
                         .tops = weights.tops,
                         .sums = weights.sums,
                         .lse2 = weights.lse2,
                         .scores = weights.scores,
                         .touched = weights.touched,
                         .means = params.value_means,
                         .run_counts = params.run_counts,
                         .parts = weights.rest,
                         .rows = rest.rows,
                         .out = rest.out,
                         .lse = rest.lse,
                         .lists_per_sequence = params.lists_per_sequence,
                         .runs_max = params.runs_max,
                         .group = params.group,
                         .cells_per_run = DeviceCodes::kRunTokens / params.tokens_per_cell,
                         .value_dim = params.value_dim,
                         .part_count = rest_parts(gpu, params)};
  void* pointers[] = {&arguments};
  const auto kernel_of = [&](auto element) {
    using Element = decltype(element);
    return params.value_dim == 64 ? reinterpret_cast<const void*>(&sum_rest_kernel<Element, 64>)
                                  : reinterpret_cast<const void*>(&sum_rest_kernel<Element, 128>);
  };
  const void* kernel =
      params.codes.dtype == DType::kF16 ? kernel_of(__half{}) : kernel_of(__nv_bfloat16{});
  KVTIER_RETURN_IF_ERROR(gpu.launch({.kernel = kernel,
                                     .grid = {arguments.part_count, params.lists, 1},
                                     .threads = kThreads,
                                     .arguments = pointers,
                                     .stream = stream.get()},
                                    "estimate_rest"));
  return gpu.launch({.kernel = reinterpret_cast<const void*>(&finish_rest_kernel),
                     .grid = {params.lists, params.group, 1},
                     .threads = kValueThreads * kFinishWays,
                     .arguments = pointers,
                     .stream = stream.get(),
                     .early = gpu.traits().capability >= 90},
                    "estimate_rest");
}

}  // namespace kvtier
