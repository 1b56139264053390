#include "kernels/scan_codes.h"
#include "kernels/scan_warp.cuh"

#include <algorithm>
#include <array>

// Reading codes once at the rate of memory is all there is to it. A warp takes runs of 64 tokens
// from its own ring in shared memory, which asynchronous copies keep full; what it does with a run
// is in scan_warp.cuh. CTAs of a list take every so-many-th group of runs, so that all of them read
// neighbouring memory at one time.

namespace kvtier {
namespace {

template <typename S>
__global__ void __launch_bounds__(kScanThreads, S::kQueryTiles == 1 ? 2 : 1)
    scan_codes_kernel(const __grid_constant__ ScanArguments a) {
  extern __shared__ __align__(128) std::byte shared[];
  __shared__ float tops[kScanWarps][kMaxScanGroup];
  __shared__ float totals[kScanWarps][kMaxScanGroup];
  wait_for_previous_kernel();
  let_next_kernel_start();
  const std::uint32_t list = blockIdx.y;
  const unsigned warp = threadIdx.x / kWarpLanes;
  if (blockIdx.x == 0) {
    for (unsigned i = threadIdx.x; i < kScoreBins; i += kScanThreads) {
      a.bins[std::size_t{list} * kScoreBins + i] = 0;
    }
  }
  ScanWarp<S> scan(a, list, shared + warp * S::kRingBytes);
  scan.run(blockIdx.x * kScanWarps + warp, gridDim.x * kScanWarps,
           min(a.run_counts[list / a.lists_per_sequence], a.runs_max));
  scan.leave(tops[warp], totals[warp]);
  __syncthreads();
  const unsigned query = threadIdx.x;
  if (query >= a.group) return;
  float top = kEmptyLse;
  for (unsigned w = 0; w < kScanWarps; ++w) top = fmaxf(top, tops[w][query]);
  const float base = top == kEmptyLse ? 0.0f : top;
  float total = 0.0f;
  for (unsigned w = 0; w < kScanWarps; ++w)
    total += exp2f(tops[w][query] - base) * totals[w][query];
  a.part_lse2[(std::size_t{list} * gridDim.x + blockIdx.x) * a.group + query] =
      total == 0.0f ? kEmptyLse : base + log2f(total);
}

struct ScanKernel {
  DType dtype;
  std::uint32_t dim;
  std::uint32_t query_tiles;
  std::uint32_t cell_tokens;
  std::size_t shared_bytes;
  const void* kernel;
};

template <DType kDType, typename Element, unsigned kDim, unsigned kQueryTiles, unsigned kCell>
ScanKernel kernel_entry() {
  using S = ScanShape<Element, kDim, kQueryTiles, kCell>;
  return {kDType,
          kDim,
          kQueryTiles,
          kCell,
          kScanWarps * S::kRingBytes,
          reinterpret_cast<const void*>(&scan_codes_kernel<S>)};
}

template <DType kDType, typename Element, unsigned kDim>
std::array<ScanKernel, 6> kernels_of() {
  return {kernel_entry<kDType, Element, kDim, 1, 1>(), kernel_entry<kDType, Element, kDim, 1, 4>(),
          kernel_entry<kDType, Element, kDim, 1, 8>(), kernel_entry<kDType, Element, kDim, 2, 1>(),
          kernel_entry<kDType, Element, kDim, 2, 4>(), kernel_entry<kDType, Element, kDim, 2, 8>()};
}

Result<ScanKernel> find_kernel(const ScanParams& params) {
  const std::uint32_t tiles = params.group <= 4 ? 1 : 2;
  const bool fits = params.group >= 1 && params.group <= kMaxScanGroup && params.lists <= 65535 &&
                    params.sinks <= 64 && params.tokens_per_cell > 0 &&
                    params.sinks % params.tokens_per_cell == 0;
  for (const auto& kernels :
       {kernels_of<DType::kF16, __half, 64>(), kernels_of<DType::kF16, __half, 128>(),
        kernels_of<DType::kBF16, __nv_bfloat16, 64>(),
        kernels_of<DType::kBF16, __nv_bfloat16, 128>()}) {
    for (const ScanKernel& kernel : kernels) {
      if (fits && kernel.dtype == params.codes.dtype && kernel.dim == params.codes.dim &&
          kernel.query_tiles == tiles && kernel.cell_tokens == params.tokens_per_cell) {
        return kernel;
      }
    }
  }
  return unsupported(
      fmt::format("a scan on the GPU of {} keys of {} for {} query heads, {} tokens a cell, {} "
                  "sinks",
                  to_string(params.codes.dtype), params.codes.dim, params.group,
                  params.tokens_per_cell, params.sinks));
}

}  // namespace

std::uint32_t scan_parts(const Gpu& gpu, const ScanParams& params) {
  const std::uint32_t ctas = params.group <= 4 ? 2 : 1;
  const std::uint32_t useful = (params.runs_max + kScanWarps - 1) / kScanWarps;
  // An eighth of a CTA per multiprocessor is left to what runs beside: attention of the near
  // tokens, which otherwise takes the place of CTAs that then start when all others end.
  const std::uint32_t places = (8 * ctas - 1) * gpu.traits().multiprocessors / 8;
  const std::uint32_t fair = places / std::max(1u, params.lists);
  return std::max(1u, std::min({useful, fair, kMaxScanParts}));
}

Status scan_codes(const Gpu& gpu, const ScanParams& params, StreamRef stream) {
  KVTIER_ASSIGN_OR_RETURN(const ScanKernel kernel, find_kernel(params));
  if (params.lists == 0 || params.runs_max == 0) return {};
  const ScanWeights& weights = params.weights;
  ScanArguments arguments = {.runs = params.runs,
                             .run_counts = params.run_counts,
                             .queries = static_cast<const std::byte*>(params.queries),
                             .cells = weights.cells,
                             .tops = weights.tops,
                             .sums = weights.sums,
                             .part_lse2 = weights.part_lse2,
                             .bins = weights.bins,
                             .touched = weights.touched,
                             .lists_per_sequence = params.lists_per_sequence,
                             .runs_max = params.runs_max,
                             .sinks = params.sinks,
                             .group = params.group,
                             .scale = params.softmax.scale,
                             .logit_cap = params.softmax.logit_cap};
  void* pointers[] = {&arguments};
  return gpu.launch({.kernel = kernel.kernel,
                     .grid = {scan_parts(gpu, params), params.lists, 1},
                     .threads = kScanThreads,
                     .shared_bytes = kernel.shared_bytes,
                     .arguments = pointers,
                     .stream = stream.get()},
                    "scan_codes");
}

}  // namespace kvtier
