#include "kernels/score_rows.h"
#include "kernels/tensor_core.cuh"

#include <algorithm>
#include <array>

// A dot product does not mind the order of its terms, so rows go from memory to the tensor core
// without a detour through shared memory: of every 32 dims of a row, four lanes load 8 each, 16
// bytes, and what lane c holds is declared to be columns 2c, 2c + 1, 2c + 8 and 2c + 9 of two steps
// of the product. The queries are loaded in the same order.

namespace kvtier {
namespace {

constexpr unsigned kThreads = 256;
constexpr unsigned kWarps = kThreads / kWarpLanes;
/// Rows that one warp scores together: 16 loads of 16 bytes a lane are on their way for dim 128.
constexpr unsigned kTileRows = 32;
constexpr unsigned kCtasPerMultiprocessor = 2;

struct Arguments {
  const std::byte* rows;
  std::uint64_t task_stride_bytes;
  std::uint64_t row_stride_bytes;
  const std::uint32_t* counts;
  std::uint32_t rows_max;
  const std::byte* queries;
  std::uint32_t query_count;
  float scale;
  float logit_cap;
  float* logits;
  std::uint64_t logit_stride;
};

__device__ uint4 load_once(const std::byte* from) {
  return __ldcs(reinterpret_cast<const uint4*>(from));
}

template <typename Element, unsigned kDim>
class WarpScorer {
 public:
  __device__ WarpScorer(const Arguments& a, std::uint32_t task, std::uint32_t count)
      : a_(a), count_(count), lane_(threadIdx.x % kWarpLanes) {
    const std::byte* queries =
        a.queries + std::size_t{task} * a.query_count * kRowBytes + lane_ % 4 * 16;
#pragma unroll
    for (unsigned r = 0; r < 2; ++r) {
      const unsigned row = lane_ / 4 + 8 * r;
#pragma unroll
      for (unsigned j = 0; j < kPieces; ++j) {
        queries_[r][j] = {};
        if (row < a.query_count) {
          queries_[r][j] =
              *reinterpret_cast<const uint4*>(queries + row * kRowBytes + j * kPieceBytes);
        }
      }
    }
    rows_ = a.rows + task * a.task_stride_bytes + lane_ % 4 * 16;
    logits_ = a.logits + std::size_t{task} * a.query_count * a.logit_stride;
  }

  __device__ void score(std::uint32_t first) const {
    uint4 keys[kTileRows / 8][kPieces];
#pragma unroll
    for (unsigned n = 0; n < kTileRows / 8; ++n) {
      // Behind the end the last row is read once more, and its score dropped.
      const std::uint32_t row = min(first + n * 8 + lane_ / 4, count_ - 1);
#pragma unroll
      for (unsigned j = 0; j < kPieces; ++j) {
        keys[n][j] = load_once(rows_ + row * a_.row_stride_bytes + j * kPieceBytes);
      }
    }
#pragma unroll
    for (unsigned n = 0; n < kTileRows / 8; ++n) {
      float sums[4] = {};
#pragma unroll
      for (unsigned j = 0; j < kPieces; ++j) {
        const uint4 a = queries_[0][j];
        const uint4 b = queries_[1][j];
        TensorCore<Element>::multiply_add(sums, {a.x, b.x, a.y, b.y}, keys[n][j].x, keys[n][j].y);
        TensorCore<Element>::multiply_add(sums, {a.z, b.z, a.w, b.w}, keys[n][j].z, keys[n][j].w);
      }
      store(first + n * 8 + lane_ % 4 * 2, sums);
    }
  }

 private:
  static constexpr unsigned kRowBytes = kDim * 2;
  static constexpr unsigned kPieceBytes = 64;
  static constexpr unsigned kPieces = kDim / 32;

  __device__ void store(std::uint32_t row, const float (&sums)[4]) const {
#pragma unroll
    for (unsigned i = 0; i < 4; ++i) {
      const unsigned query = lane_ / 4 + i / 2 * 8;
      if (query >= a_.query_count || row + i % 2 >= count_) continue;
      float logit = sums[i] * a_.scale;
      if (a_.logit_cap > 0.0f) logit = a_.logit_cap * tanhf(logit / a_.logit_cap);
      logits_[query * a_.logit_stride + row + i % 2] = logit;
    }
  }

  const Arguments& a_;
  std::uint32_t count_;
  unsigned lane_;
  uint4 queries_[2][kPieces];
  const std::byte* rows_;
  float* logits_;
};

template <typename Element, unsigned kDim>
__global__ void __launch_bounds__(kThreads) score_rows_kernel(const __grid_constant__ Arguments a) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const std::uint32_t task = blockIdx.y;
  const std::uint32_t count = a.counts == nullptr ? a.rows_max : min(a.counts[task], a.rows_max);
  const std::uint32_t first = (blockIdx.x * kWarps + threadIdx.x / kWarpLanes) * kTileRows;
  if (first >= count) return;
  const WarpScorer<Element, kDim> scorer(a, task, count);
  const std::uint64_t step = std::uint64_t{gridDim.x} * kWarps * kTileRows;
  for (std::uint64_t at = first; at < count; at += step) {
    scorer.score(static_cast<std::uint32_t>(at));
  }
}

struct ScoreKernel {
  DType dtype;
  std::uint32_t dim;
  const void* kernel;
};

template <DType kDType, typename Element, unsigned kDim>
ScoreKernel kernel_entry() {
  return {kDType, kDim, reinterpret_cast<const void*>(&score_rows_kernel<Element, kDim>)};
}

Result<ScoreKernel> find_kernel(const ScoreRowsParams& params) {
  const std::array<ScoreKernel, 8> kernels = {kernel_entry<DType::kF16, __half, 64>(),
                                              kernel_entry<DType::kF16, __half, 96>(),
                                              kernel_entry<DType::kF16, __half, 128>(),
                                              kernel_entry<DType::kF16, __half, 256>(),
                                              kernel_entry<DType::kBF16, __nv_bfloat16, 64>(),
                                              kernel_entry<DType::kBF16, __nv_bfloat16, 96>(),
                                              kernel_entry<DType::kBF16, __nv_bfloat16, 128>(),
                                              kernel_entry<DType::kBF16, __nv_bfloat16, 256>()};
  for (const ScoreKernel& kernel : kernels) {
    if (kernel.dtype == params.dtype && kernel.dim == params.dim && params.query_count <= 16 &&
        params.tasks <= 65535) {
      return kernel;
    }
  }
  return unsupported(
      fmt::format("scores on the GPU of {} rows of dim {} for {} queries in {} tasks",
                  to_string(params.dtype), params.dim, params.query_count, params.tasks));
}

}  // namespace

Status score_rows(const Gpu& gpu, const ScoreRowsParams& params, StreamRef stream) {
  KVTIER_ASSIGN_OR_RETURN(const ScoreKernel kernel, find_kernel(params));
  if (params.tasks == 0 || params.rows_max == 0 || params.query_count == 0) return {};
  KVTIER_CHECK(params.task_stride_bytes % 16 == 0 && params.row_stride_bytes % 16 == 0,
               "rows {} and tasks {} bytes apart are not aligned to 16", params.row_stride_bytes,
               params.task_stride_bytes);
  Arguments arguments = {.rows = params.rows,
                         .task_stride_bytes = params.task_stride_bytes,
                         .row_stride_bytes = params.row_stride_bytes,
                         .counts = params.counts,
                         .rows_max = params.rows_max,
                         .queries = static_cast<const std::byte*>(params.queries),
                         .query_count = params.query_count,
                         .scale = params.softmax.scale,
                         .logit_cap = params.softmax.logit_cap,
                         .logits = params.logits,
                         .logit_stride = params.logit_stride};
  void* pointers[] = {&arguments};
  const std::uint32_t useful = (params.rows_max + kWarps * kTileRows - 1) / (kWarps * kTileRows);
  const std::uint32_t fair =
      std::max(1u, kCtasPerMultiprocessor * gpu.traits().multiprocessors / params.tasks);
  return gpu.launch({.kernel = kernel.kernel,
                     .grid = {std::min(useful, fair), params.tasks, 1},
                     .threads = kThreads,
                     .arguments = pointers,
                     .stream = stream.get(),
                     .early = gpu.traits().capability >= 90},
                    "score_rows");
}

}  // namespace kvtier
