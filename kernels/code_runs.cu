#include "kernels/code_runs.h"
#include "kernels/tensor_core.cuh"

#include <limits>

// A CTA codes one run: a thread per channel finds its range and codes, which are then collected
// from shared memory into words. Runs come once in 64 tokens, or thousands at a time after a
// prefill, where rows of 128 or 256 bytes a warp read memory well enough. Arithmetic is spelled out
// in roundings, because the codes are to be those of the CPU to the last bit.

namespace kvtier {
namespace {

constexpr unsigned kThreads = 128;
constexpr unsigned kRunTokens = DeviceCodes::kRunTokens;
constexpr unsigned kTiles = 4;
constexpr unsigned kMaxDim = 128;
constexpr float kLargestCode = 15.0f;

struct Arguments {
  KvSlab slab;
  const CodeRunJob* jobs;
  const std::uint32_t* slots;
  std::uint32_t sinks;
  std::uint32_t lists;
  std::uint32_t runs_max;
  std::uint32_t run_bytes;
  std::byte* codes;
  std::byte* value_means;
};

template <typename Element>
__device__ float to_float(Element x) {
  if constexpr (sizeof(Element) == 2 && std::is_same_v<Element, __half>) {
    return __half2float(x);
  } else {
    return __bfloat162float(x);
  }
}
template <typename Element>
__device__ Element from_float(float x) {
  if constexpr (std::is_same_v<Element, __half>) {
    return __float2half_rn(x);
  } else {
    return __float2bfloat16_rn(x);
  }
}

/// The smallest number of the type that is not below `x` (>= 0).
template <typename Element>
__device__ Element round_up(float x) {
  Element rounded = from_float<Element>(x);
  if (!(to_float(rounded) < x)) return rounded;
  // Positive numbers ascend with their bits.
  std::uint16_t bits = *reinterpret_cast<const std::uint16_t*>(&rounded) + 1;
  return *reinterpret_cast<const Element*>(&bits);
}

/// Rows of keys, or of values, of one run.
template <typename Element>
struct RunRows {
  const std::byte* blocks;
  std::size_t block_bytes;
  std::size_t offset;
  std::uint32_t dim;
  std::uint32_t tokens_per_block;
  const std::uint32_t* slots;  ///< Shared memory.

  __device__ float at(unsigned token, unsigned channel) const {
    const std::byte* block = blocks + slots[token / tokens_per_block] * block_bytes + offset;
    return to_float(
        reinterpret_cast<const Element*>(block)[token % tokens_per_block * dim + channel]);
  }
};

template <typename Element>
__device__ void code_channel(const RunRows<Element>& keys, unsigned channel, unsigned skip,
                             bool broken, std::uint8_t (&codes)[kRunTokens][kMaxDim],
                             Element* scales) {
  float least = 0.0f;
  float most = 0.0f;
  // Not a number as soon as one key is not finite, and it stays so.
  float sum = broken ? __int_as_float(0x7FC00000) : 0.0f;
  if (!broken) {
    for (unsigned t = skip; t < kRunTokens; ++t) {
      const float key = keys.at(t, channel);
      least = t == skip ? key : fminf(least, key);
      most = t == skip ? key : fmaxf(most, key);
      sum = __fadd_rn(__fmul_rn(key, 0.0f), sum);
    }
  }
  least = __fadd_rn(least, sum);
  float step = __fdiv_rn(__fsub_rn(most, least), kLargestCode);
  if (isinf(step)) {
    step = __fsub_rn(__fdiv_rn(most, kLargestCode), __fdiv_rn(least, kLargestCode));
  }
  const Element stored = round_up<Element>(step);
  scales[channel] = stored;
  scales[keys.dim + channel] = from_float<Element>(least);
  const float inverse = __fdiv_rn(1.0f, to_float(stored));
  const bool varies = to_float(stored) > 0.0f && isfinite(inverse);
  for (unsigned t = skip; t < kRunTokens; ++t) {
    const float x = varies ? __fmul_rn(__fsub_rn(keys.at(t, channel), least), inverse) : 0.0f;
    codes[t][channel] =
        static_cast<std::uint8_t>(x > 0.0f ? __float2int_rn(fminf(x, kLargestCode)) : 0);
  }
}

/// The word of lane `lane` that holds its channels 4 `step` to 4 `step` + 3 of two tokens of a
/// tile.
__device__ std::uint32_t pack_word(const std::uint8_t (&codes)[kRunTokens][kMaxDim], unsigned dim,
                                   unsigned tile, unsigned lane, unsigned step) {
  const unsigned token = lane / 4 * 8 + 2 * tile;
  const unsigned channel = lane % 4 * (dim / 4) + step * 4;
  std::uint32_t word = 0;
#pragma unroll
  for (unsigned t = 0; t < 2; ++t) {
#pragma unroll
    for (unsigned e = 0; e < 4; ++e) {
      word |= std::uint32_t{codes[token + t][channel + e]} << (e % 2 * 16 + e / 2 * 4 + t * 8);
    }
  }
  return word;
}

template <typename Element>
__global__ void __launch_bounds__(kThreads) code_runs_kernel(const __grid_constant__ Arguments a) {
  __shared__ std::uint8_t codes[kRunTokens][kMaxDim];
  __shared__ std::uint32_t slots[kRunTokens];
  const CodeRunJob job = a.jobs[blockIdx.x];
  if (job.list >= a.lists || job.run >= a.runs_max) return;
  const KvSlab& slab = a.slab;
  const unsigned blocks = kRunTokens / slab.tokens_per_block;
  const unsigned first = min(job.run, 2u) * kRunTokens;  // Sinks end within the first run.
  const unsigned skip = a.sinks > first ? min(a.sinks - first, kRunTokens) : 0;
  bool outside = false;
  if (threadIdx.x < blocks) {
    const std::uint32_t slot = a.slots[std::size_t{blockIdx.x} * blocks + threadIdx.x];
    outside = slot >= slab.slots;
    slots[threadIdx.x] = outside ? 0 : slot;
  }
  for (unsigned i = threadIdx.x; i < kRunTokens * kMaxDim / 4; i += kThreads) {
    reinterpret_cast<std::uint32_t*>(codes)[i] = 0;
  }
  const bool broken = __syncthreads_or(outside);
  const std::size_t place = std::size_t{job.list} * a.runs_max + job.run;
  std::byte* const run = a.codes + place * a.run_bytes;
  auto* const scales = reinterpret_cast<Element*>(run + kRunTokens * slab.head_dim / 2);
  if (threadIdx.x < slab.head_dim) {
    if (skip < kRunTokens) {
      const RunRows<Element> keys = {slab.blocks,   slab.block_bytes,      0,
                                     slab.head_dim, slab.tokens_per_block, slots};
      code_channel(keys, threadIdx.x, skip, broken, codes, scales);
    } else {
      scales[threadIdx.x] = scales[slab.head_dim + threadIdx.x] = from_float<Element>(0.0f);
    }
  }
  if (threadIdx.x < slab.value_dim) {
    const RunRows<Element> values = {slab.blocks,
                                     slab.block_bytes,
                                     std::size_t{slab.tokens_per_block} * slab.head_dim * 2,
                                     slab.value_dim,
                                     slab.tokens_per_block,
                                     slots};
    float sum = broken ? __int_as_float(0x7FC00000) : 0.0f;
    for (unsigned t = skip; t < kRunTokens && !broken; ++t) sum += values.at(t, threadIdx.x);
    if (skip < kRunTokens) sum /= float(kRunTokens - skip);
    reinterpret_cast<Element*>(a.value_means)[place * slab.value_dim + threadIdx.x] =
        from_float<Element>(sum);
  }
  __syncthreads();
  const unsigned steps = slab.head_dim / 16;
  for (unsigned i = threadIdx.x; i < kTiles * steps * kWarpLanes; i += kThreads) {
    const unsigned tile = i / (steps * kWarpLanes);
    const unsigned in_tile = i % (steps * kWarpLanes);
    const unsigned step = in_tile / (4 * kWarpLanes) * 4 + in_tile % 4;
    const unsigned lane = in_tile % (4 * kWarpLanes) / 4;
    reinterpret_cast<std::uint32_t*>(run)[i] = pack_word(codes, slab.head_dim, tile, lane, step);
  }
}

Status check_shape(const CodeRunsParams& params) {
  const KvSlab& slab = params.slab;
  const bool dims = (slab.head_dim == 64 || slab.head_dim == 128) &&
                    (slab.value_dim == 64 || slab.value_dim == 128) && !slab.values_in_keys;
  const bool blocks = slab.heads_per_block == 1 && slab.tokens_per_block > 0 &&
                      kRunTokens % slab.tokens_per_block == 0;
  if (dims && blocks && slab.dtype != DType::kF32 && params.sinks <= kRunTokens) return {};
  return unsupported(
      fmt::format("codes on the GPU of {} keys of {} and values of {}, {} tokens and {} heads a "
                  "block, {} sinks",
                  to_string(slab.dtype), slab.head_dim, slab.value_dim, slab.tokens_per_block,
                  slab.heads_per_block, params.sinks));
}

}  // namespace

Status code_runs(const Gpu& gpu, const CodeRunsParams& params, StreamRef stream) {
  KVTIER_RETURN_IF_ERROR(check_shape(params));
  if (params.job_count == 0) return {};
  Arguments arguments = {.slab = params.slab,
                         .jobs = params.jobs,
                         .slots = params.slots,
                         .sinks = params.sinks,
                         .lists = params.lists,
                         .runs_max = params.runs_max,
                         .run_bytes = static_cast<std::uint32_t>(params.layout().run_bytes()),
                         .codes = params.codes,
                         .value_means = params.value_means};
  void* pointers[] = {&arguments};
  const void* kernel = params.slab.dtype == DType::kF16
                           ? reinterpret_cast<const void*>(&code_runs_kernel<__half>)
                           : reinterpret_cast<const void*>(&code_runs_kernel<__nv_bfloat16>);
  return gpu.launch({.kernel = kernel,
                     .grid = {params.job_count, 1, 1},
                     .threads = kThreads,
                     .arguments = pointers,
                     .stream = stream.get()},
                    "code_runs");
}

}  // namespace kvtier
