#include "kernels/kv_view.h"
#include "kernels/merge_states.h"
#include "kernels/tensor_core.cuh"

namespace kvtier {
namespace {

constexpr unsigned kThreads = 128;
constexpr unsigned kRowsPerCta = kThreads / kWarpLanes;

struct Arguments {
  const float* outs[kMaxMergeParts];
  const float* lses[kMaxMergeParts];
  std::uint32_t parts;
  std::uint32_t value_dim;
  std::uint64_t rows;
  const float* sink_logits;
  std::uint32_t sink_heads;
  DType out_dtype;
  void* out;
  float* lse;
};

__device__ void store(const Arguments& a, std::size_t element, float4 x) {
  if (a.out_dtype == DType::kF32) {
    *reinterpret_cast<float4*>(static_cast<float*>(a.out) + element) = x;
    return;
  }
  uint2 packed;
  if (a.out_dtype == DType::kF16) {
    packed = {TensorCore<__half>::pack(x.x, x.y), TensorCore<__half>::pack(x.z, x.w)};
  } else {
    packed = {TensorCore<__nv_bfloat16>::pack(x.x, x.y), TensorCore<__nv_bfloat16>::pack(x.z, x.w)};
  }
  *reinterpret_cast<uint2*>(static_cast<std::uint16_t*>(a.out) + element) = packed;
}

/// One warp per row.
__global__ void __launch_bounds__(kThreads)
    merge_states_kernel(const __grid_constant__ Arguments a) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const std::uint64_t row = std::uint64_t{blockIdx.x} * kRowsPerCta + threadIdx.x / kWarpLanes;
  if (row >= a.rows) return;
  const unsigned lane = threadIdx.x % kWarpLanes;
  float shares[kMaxMergeParts];
  float most = kEmptyLse;
#pragma unroll
  for (unsigned p = 0; p < kMaxMergeParts; ++p) {
    shares[p] = p < a.parts ? a.lses[p][row] : kEmptyLse;
    most = fmaxf(most, shares[p]);
  }
  const float sink = a.sink_logits == nullptr ? kEmptyLse : a.sink_logits[row % a.sink_heads];
  most = fmaxf(most, sink);
  // Nothing anywhere: any finite number serves, and keeps NaN what it is.
  const float base = most == kEmptyLse ? 0.0f : most;
  float total = expf(sink - base);
#pragma unroll
  for (float& share : shares) {
    share = expf(share - base);
    total += share;
  }
  const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
  for (std::uint32_t dim = lane * 4; dim < a.value_dim; dim += kWarpLanes * 4) {
    const std::size_t element = row * a.value_dim + dim;
    float4 sum = {};
#pragma unroll
    for (unsigned p = 0; p < kMaxMergeParts; ++p) {
      // An empty part's values are not looked at: there may be none.
      if (shares[p] == 0.0f) continue;
      const float share = shares[p] * inverse;
      const float4 x = *reinterpret_cast<const float4*>(a.outs[p] + element);
      sum = {sum.x + share * x.x, sum.y + share * x.y, sum.z + share * x.z, sum.w + share * x.w};
    }
    store(a, element, sum);
  }
  if (lane == 0 && a.lse != nullptr) a.lse[row] = total == 0.0f ? kEmptyLse : base + logf(total);
}

}  // namespace

Status merge_states(const Gpu& gpu, const MergeStatesParams& params, StreamRef stream) {
  if (params.value_dim % 4 != 0 || params.part_count > kMaxMergeParts) {
    return unsupported(
        fmt::format("merging {} parts of {} values, expected up to {} and a multiple of 4",
                    params.part_count, params.value_dim, kMaxMergeParts));
  }
  if (params.rows == 0) return {};
  KVTIER_CHECK(params.sink_logits == nullptr || params.sink_heads > 0, "sinks of no heads");
  Arguments arguments = {.parts = params.part_count,
                         .value_dim = params.value_dim,
                         .rows = params.rows,
                         .sink_logits = params.sink_logits,
                         .sink_heads = params.sink_heads,
                         .out_dtype = params.out_dtype,
                         .out = params.out,
                         .lse = params.lse};
  for (std::uint32_t p = 0; p < params.part_count; ++p) {
    arguments.outs[p] = params.parts[p].out;
    arguments.lses[p] = params.parts[p].lse;
  }
  void* pointers[] = {&arguments};
  const std::size_t ctas = (params.rows + kRowsPerCta - 1) / kRowsPerCta;
  return gpu.launch({.kernel = reinterpret_cast<const void*>(&merge_states_kernel),
                     .grid = {static_cast<unsigned>(ctas), 1, 1},
                     .threads = kThreads,
                     .arguments = pointers,
                     .stream = stream.get(),
                     .early = gpu.traits().capability >= 90},
                    "merge_states");
}

}  // namespace kvtier
