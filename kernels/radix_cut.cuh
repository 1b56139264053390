#pragma once

#include "kernels/warp.cuh"

#include <cstdint>

// Finding the k-th largest score digit by digit from the top, as top_k_cpu.cc does: scores become
// integers of the same order, and how many there are of each digit says in which one the k-th is.

namespace kvtier {

inline constexpr unsigned kBins = 2048;
inline constexpr unsigned kDigits = 3;

__device__ inline unsigned shift_of(unsigned digit) {
  return digit == 0 ? 21 : digit == 1 ? 10 : 0;
}
__device__ inline unsigned bins_of(unsigned digit) { return digit == 2 ? 1024 : 2048; }

/// An integer of the same order. Both zeros are equal scores.
__device__ inline std::uint32_t key_of(float score) {
  const std::uint32_t bits = __float_as_uint(score + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

/// Digits found so far: keys with `(key & mask) == prefix` may be the k-th, `left` of them are to
/// be taken, and all larger ones.
struct Cut {
  std::uint32_t prefix = 0;
  std::uint32_t mask = 0;
  std::uint32_t left = 0;
  std::uint32_t equal = 0;  ///< How many agree with the digits found so far.
};

/// Finds the next digit from its counts. All `kThreads` threads call; `scratch` holds kThreads + 3
/// words of shared memory.
template <unsigned kThreads>
__device__ void narrow(Cut& cut, unsigned digit, const std::uint32_t* bins,
                       std::uint32_t* scratch) {
  // Thread t sums up to a few bins, the largest digits first, and a scan over warps and over their
  // sums says how many keys lie above.
  constexpr unsigned kMine = kBins / kThreads;
  static_assert(kMine >= 2);
  const unsigned mine = bins_of(digit) / kThreads;
  std::uint32_t counts[kMine] = {};
  std::uint32_t sum = 0;
#pragma unroll
  for (unsigned i = 0; i < kMine; ++i) {
    if (i < mine) counts[i] = bins[bins_of(digit) - 1 - (threadIdx.x * mine + i)];
    sum += counts[i];
  }
  const unsigned lane = threadIdx.x % kWarpLanes;
  const unsigned warp = threadIdx.x / kWarpLanes;
  std::uint32_t up_to = sum;
  for (unsigned step = 1; step < kWarpLanes; step *= 2) {
    const std::uint32_t before = __shfl_up_sync(kAllLanes, up_to, step);
    if (lane >= step) up_to += before;
  }
  if (lane == kWarpLanes - 1) scratch[warp] = up_to;
  __syncthreads();
  std::uint32_t above = up_to - sum;
  for (unsigned w = 0; w < kThreads / kWarpLanes; ++w) above += w < warp ? scratch[w] : 0;
#pragma unroll
  for (unsigned i = 0; i < kMine; ++i) {
    if (above < cut.left && above + counts[i] >= cut.left) {
      scratch[kThreads] = bins_of(digit) - 1 - (threadIdx.x * mine + i);
      scratch[kThreads + 1] = above;
      scratch[kThreads + 2] = counts[i];
    }
    above += counts[i];
  }
  __syncthreads();
  cut.prefix |= scratch[kThreads] << shift_of(digit);
  cut.mask |= (bins_of(digit) - 1) << shift_of(digit);
  cut.left -= scratch[kThreads + 1];
  cut.equal = scratch[kThreads + 2];
  __syncthreads();
}

/// What the threads of a CTA before this one hold, and all of them; `scratch` holds as many words
/// as there are warps, and one more barrier stands between two calls.
template <unsigned kThreads>
__device__ std::uint32_t sum_before(std::uint32_t mine, std::uint32_t* scratch,
                                    std::uint32_t& all) {
  const unsigned lane = threadIdx.x % kWarpLanes;
  const unsigned warp = threadIdx.x / kWarpLanes;
  std::uint32_t up_to = mine;
#pragma unroll
  for (unsigned step = 1; step < kWarpLanes; step *= 2) {
    const std::uint32_t before = __shfl_up_sync(kAllLanes, up_to, step);
    if (lane >= step) up_to += before;
  }
  if (lane == kWarpLanes - 1) scratch[warp] = up_to;
  __syncthreads();
  std::uint32_t before = up_to - mine;
  all = 0;
#pragma unroll
  for (unsigned w = 0; w < kThreads / kWarpLanes; ++w) {
    before += w < warp ? scratch[w] : 0;
    all += scratch[w];
  }
  __syncthreads();
  return before;
}

}  // namespace kvtier
