#pragma once

#include "kernels/scan_codes.h"
#include "kernels/tensor_core.cuh"

#include <cstdint>

// What one warp of scan_codes does with a run of 64 tokens. Keys are the A side of the product, 16
// tokens by 16 channels. Codes go there as they lie in memory, masked: a nibble in the low bits of
// a 16-bit float is the subnormal number code * 2^-24, or code * 2^-20 four bits higher, for which
// the query's side is divided by 16. Queries are the B side, with the run's steps folded in, in two
// columns each: what 16 bits hold of a factor, and what they leave. Lane 4 g + c gets the logits of
// query c of each tile of queries for tokens 8 g to 8 g + 7, high and low part next to each other.

namespace kvtier {

inline constexpr unsigned kScanThreads = 256;
inline constexpr unsigned kScanWarps = kScanThreads / kWarpLanes;
inline constexpr unsigned kMaxScanGroup = 8;
inline constexpr unsigned kMaxScanParts = 128;

struct ScanArguments {
  const std::byte* runs;
  const std::uint32_t* run_counts;
  const std::byte* queries;
  float* cells;
  float* tops;
  float* sums;
  float* part_lse2;
  std::uint32_t* bins;
  std::uint8_t* touched;
  std::uint32_t lists_per_sequence;
  std::uint32_t runs_max;
  std::uint32_t sinks;
  std::uint32_t group;
  float scale;
  float logit_cap;
};

template <typename ElementType, unsigned kKeyDim, unsigned kTilesOfQueries, unsigned kTokensPerCell>
struct ScanShape {
  using Element = ElementType;
  static constexpr unsigned kDim = kKeyDim;
  static constexpr unsigned kQueryTiles = kTilesOfQueries;  ///< Of four queries each.
  static constexpr unsigned kCell = kTokensPerCell;
  static constexpr unsigned kSteps = kDim / 16;   ///< Products of one tile of 16 tokens.
  static constexpr unsigned kMine = kDim / 4;     ///< Channels of one lane.
  static constexpr unsigned kPieces = kMine / 8;  ///< Of 16 bytes, of a lane's steps.
  static constexpr unsigned kCodeBytes = 64 * kDim / 2;
  static constexpr unsigned kRunBytes = kCodeBytes + 4 * kDim;
  /// Two CTAs of eight warps share a multiprocessor: 147 KiB on their way, for any latency.
  static constexpr unsigned kStages = 3;
  static constexpr unsigned kRingBytes = kStages * kRunBytes;
};

template <typename S>
class ScanWarp {
 public:
  __device__ ScanWarp(const ScanArguments& a, std::uint32_t list, std::byte* ring)
      : a_(a), list_(list), lane_(threadIdx.x % kWarpLanes), ring_(ring) {
    load_queries();
#pragma unroll
    for (unsigned n = 0; n < S::kQueryTiles; ++n) {
      top_[n] = kEmptyLse;
      total_[n] = 0.0f;
    }
  }

  /// Runs first, first + step, ... before `count`.
  __device__ void run(std::uint32_t first, std::uint32_t step, std::uint32_t count) {
#pragma unroll
    for (unsigned i = 0; i < S::kStages - 1; ++i) request(first + i * step, count, i);
    unsigned stage = 0;
    for (std::uint32_t run = first; run < count; run += step) {
      wait_copies<S::kStages - 2>();
      __syncwarp();
      request(run + (S::kStages - 1) * step, count, stage == 0 ? S::kStages - 1 : stage - 1);
      weigh(run, ring_ + stage * S::kRunBytes);
      stage = stage + 1 == S::kStages ? 0 : stage + 1;
    }
    wait_copies<0>();
  }

  /// The warp's maximum and sum of every query.
  __device__ void leave(float* tops, float* totals) const {
#pragma unroll
    for (unsigned n = 0; n < S::kQueryTiles; ++n) {
      if (lane_ < 4) {
        tops[4 * n + lane_] = top_[n];
        totals[4 * n + lane_] = total_[n];
      }
    }
  }

 private:
  using Core = TensorCore<typename S::Element>;
  using Half = TensorCore<__half>;

  /// This lane's channels of query lane / 8 of each tile, scaled by a power of two so that the
  /// largest is between 32 and 64; the slope takes it back.
  __device__ void load_queries() {
#pragma unroll
    for (unsigned n = 0; n < S::kQueryTiles; ++n) {
      const unsigned query = 4 * n + lane_ / 8;
      float most = 0.0f;
#pragma unroll
      for (unsigned p = 0; p < S::kPieces; ++p) {
        uint4 piece = {};
        if (query < a_.group) {
          piece = *reinterpret_cast<const uint4*>(
              a_.queries +
              ((std::size_t{list_} * a_.group + query) * S::kDim + lane_ % 4 * S::kMine + p * 8) *
                  2);
        }
        unpack(piece, queries_[n] + p * 8);
#pragma unroll
        for (unsigned i = 0; i < 8; ++i) most = fmaxf(most, fabsf(queries_[n][p * 8 + i]));
      }
      most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 1));
      most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 2));
      // A power of two from the exponent's bits: subnormal and infinite ones are met by the ends.
      const int exponent = min(max(static_cast<int>(__float_as_uint(most) >> 23) - 127, -100), 100);
      const float up = __int_as_float((127 + 5 - exponent) << 23);
      const float down = __int_as_float((127 - 5 + exponent) << 23);
#pragma unroll
      for (unsigned x = 0; x < S::kMine; ++x) {
        queries_[n][x] *= x % 4 < 2 ? up : up * 0.0625f;
        if (x % 2 == 1) halves_[n][x / 2] = __floats2half2_rn(queries_[n][x - 1], queries_[n][x]);
      }
      const float back = __shfl_sync(kAllLanes, down, lane_ % 4 * 8);
      slope_[n] = a_.scale * kLog2E * back;
    }
  }

  __device__ static void unpack(uint4 piece, float* target) {
    const std::uint32_t words[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
    for (unsigned i = 0; i < 4; ++i) {
      const float2 pair = Core::unpack(words[i]);
      target[2 * i] = pair.x;
      target[2 * i + 1] = pair.y;
    }
  }

  __device__ void request(std::uint64_t run, std::uint32_t count, unsigned stage) const {
    if (run < count) {
      const std::byte* from =
          a_.runs + (std::size_t{list_} * a_.runs_max + run) * S::kRunBytes + lane_ * 16;
      const std::uint32_t to = shared_address(ring_ + stage * S::kRunBytes) + lane_ * 16;
#pragma unroll
      for (unsigned at = 0; at < S::kRunBytes; at += kWarpLanes * 16) {
        if (at + lane_ * 16 < S::kRunBytes) copy_async_once(to + at, from + at, true, policy_);
      }
    }
    commit_copies();
  }

  __device__ void weigh(std::uint32_t run, const std::byte* stage) {
    float sums[S::kQueryTiles][4][4] = {};
    float offsets[S::kQueryTiles];
    {
      std::uint32_t factors[S::kQueryTiles][S::kSteps][2];
      fold(stage + S::kCodeBytes, factors, offsets);
      multiply(stage, factors, sums);
    }
#pragma unroll
    for (unsigned n = 0; n < S::kQueryTiles; ++n) {
      float logits[8];
#pragma unroll
      for (unsigned i = 0; i < 4; ++i) {
        // Codes are in units of 2^-24.
        logits[2 * i] = (sums[n][i][0] + sums[n][i][1]) * 0x1p24f;
        logits[2 * i + 1] = (sums[n][i][2] + sums[n][i][3]) * 0x1p24f;
      }
      finish(run, n, offsets[n], logits);
    }
  }

  /// The steps times the queries as the B side, and each query's product with the smallest keys.
  __device__ void fold(const std::byte* scales,
                       std::uint32_t (&factors)[S::kQueryTiles][S::kSteps][2],
                       float (&offsets)[S::kQueryTiles]) const {
    const bool low = lane_ / 4 % 2 == 1;
    const std::byte* steps = scales + lane_ % 4 * S::kMine * 2;
    const std::byte* least = steps + S::kDim * 2;
#pragma unroll
    for (unsigned p = 0; p < S::kPieces; ++p) {
      float step[8];
      unpack(*reinterpret_cast<const uint4*>(steps + p * 16), step);
#pragma unroll
      for (unsigned i = 0; i < 8; i += 2) {
        // Eight bits of a step, or eleven: nothing is lost but below 2^-24, where nothing counts.
        const __half2 pair = __floats2half2_rn(step[i], step[i + 1]);
#pragma unroll
        for (unsigned n = 0; n < S::kQueryTiles; ++n) {
          const __half2 query = halves_[n][p * 4 + i / 2];
          const __half2 high = __hmul2(query, pair);
          const __half2 left = __hfma2(query, pair, __hneg2(high));
          const __half2 part = low ? left : high;
          factors[n][p * 2 + i / 4][i / 2 % 2] = *reinterpret_cast<const std::uint32_t*>(&part);
        }
      }
    }
    // Lanes of one query do half of the pieces each: the high one the even, the low one the odd.
#pragma unroll
    for (float& offset : offsets) offset = 0.0f;
#pragma unroll
    for (unsigned half = 0; half < S::kPieces / 2; ++half) {
      const unsigned p = 2 * half;
      float key[8];
      unpack(*reinterpret_cast<const uint4*>(least + (p + (low ? 1 : 0)) * 16), key);
#pragma unroll
      for (unsigned n = 0; n < S::kQueryTiles; ++n) {
        float small = 0.0f;
        float large = 0.0f;
#pragma unroll
        for (unsigned i = 0; i < 8; ++i) {
          const float query = low ? queries_[n][(p + 1) * 8 + i] : queries_[n][p * 8 + i];
          if (i % 4 < 2) large += query * key[i];
          if (i % 4 >= 2) small += query * key[i];
        }
        offsets[n] += large + 16.0f * small;
      }
    }
#pragma unroll
    for (float& offset : offsets) {
      offset += __shfl_xor_sync(kAllLanes, offset, 1);
      offset += __shfl_xor_sync(kAllLanes, offset, 2);
      offset += __shfl_xor_sync(kAllLanes, offset, 4);
      offset = __shfl_sync(kAllLanes, offset, lane_ % 4 * 8);
    }
  }

  __device__ void multiply(const std::byte* codes,
                           const std::uint32_t (&factors)[S::kQueryTiles][S::kSteps][2],
                           float (&sums)[S::kQueryTiles][4][4]) const {
    constexpr std::uint32_t kLow = 0x000F000Fu;
    constexpr std::uint32_t kHigh = 0x00F000F0u;
    const auto* words = reinterpret_cast<const uint4*>(codes) + lane_;
#pragma unroll
    for (unsigned h = 0; h < S::kSteps / 4; ++h) {
#pragma unroll
      for (unsigned tile = 0; tile < 4; ++tile) {
        const uint4 piece = words[(tile * (S::kSteps / 4) + h) * kWarpLanes];
        const std::uint32_t of_step[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
        for (unsigned e = 0; e < 4; ++e) {
          const std::uint32_t word = of_step[e];
          const uint4 keys = {word & kLow, word >> 8 & kLow, word & kHigh, word >> 8 & kHigh};
#pragma unroll
          for (unsigned n = 0; n < S::kQueryTiles; ++n) {
            Half::multiply_add(sums[n][tile], keys, factors[n][4 * h + e][0],
                               factors[n][4 * h + e][1]);
          }
        }
      }
    }
  }

  /// From products to weights under the warp's running maximum, which each run is stored with.
  __device__ void finish(std::uint32_t run, unsigned n, float offset, float (&logits)[8]) {
    float most = kEmptyLse;
#pragma unroll
    for (unsigned i = 0; i < 8; ++i) {
      float logit = (logits[i] + offset) * slope_[n];
      if (a_.logit_cap > 0.0f) {
        const float cap = a_.logit_cap * kLog2E;
        logit = cap * tanhf(logit / cap);
      }
      if (run == 0 && lane_ / 4 * 8 + i < a_.sinks) logit = kEmptyLse;
      logits[i] = logit;
      most = fmaxf(most, logit);
    }
    if (__any_sync(kAllLanes, most > top_[n])) {
#pragma unroll
      for (unsigned lanes = 4; lanes < kWarpLanes; lanes *= 2) {
        most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, lanes));
      }
      most = fmaxf(most, top_[n]);
      if (most != kEmptyLse) total_[n] *= exp2f(top_[n] - most);
      top_[n] = most;
    }
    // Nothing seen yet: any finite number serves, and keeps NaN logits what they are.
    const float base = top_[n] == kEmptyLse ? 0.0f : top_[n];
    float sum = 0.0f;
#pragma unroll
    for (float& logit : logits) {
      logit = exp2f(logit - base);
      sum += logit;
    }
    float of_run = sum;
#pragma unroll
    for (unsigned lanes = 4; lanes < kWarpLanes; lanes *= 2) {
      of_run += __shfl_xor_sync(kAllLanes, of_run, lanes);
    }
    total_[n] += of_run;
    store(run, n, base, of_run, logits);
  }

  __device__ void store(std::uint32_t run, unsigned n, float base, float of_run,
                        const float (&weights)[8]) const {
    const unsigned query = 4 * n + lane_ % 4;
    if (query >= a_.group) return;
    constexpr unsigned kMyCells = 8 / S::kCell;
    const std::size_t cells_max = std::size_t{a_.runs_max} * 64 / S::kCell;
    float* const cells = a_.cells + (std::size_t{list_} * a_.group + query) * cells_max +
                         std::size_t{run} * (64 / S::kCell) + lane_ / 4 * kMyCells;
    if constexpr (S::kCell == 8) {
      float sum = 0.0f;
#pragma unroll
      for (float weight : weights) sum += weight;
      *cells = sum;
    } else if constexpr (S::kCell == 4) {
      *reinterpret_cast<float2*>(cells) = {(weights[0] + weights[1]) + (weights[2] + weights[3]),
                                           (weights[4] + weights[5]) + (weights[6] + weights[7])};
    } else {
      *reinterpret_cast<float4*>(cells) = {weights[0], weights[1], weights[2], weights[3]};
      *reinterpret_cast<float4*>(cells + 4) = {weights[4], weights[5], weights[6], weights[7]};
    }
    if (lane_ >= 4) return;
    const std::size_t place = std::size_t{list_} * a_.runs_max + run;
    a_.tops[place * a_.group + query] = base;
    a_.sums[place * a_.group + query] = of_run;
    if (lane_ == 0 && n == 0) a_.touched[place] = 0;
  }

  const ScanArguments& a_;
  std::uint32_t list_;
  unsigned lane_;
  std::byte* ring_;
  float queries_[S::kQueryTiles][S::kMine];
  __half2 halves_[S::kQueryTiles][S::kMine / 2];
  float slope_[S::kQueryTiles];
  float top_[S::kQueryTiles];
  float total_[S::kQueryTiles];
  std::uint64_t policy_ = read_once_policy();
};

}  // namespace kvtier
