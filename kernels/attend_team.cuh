#pragma once

#include "kernels/attend_plan.h"
#include "kernels/tensor_core.cuh"

#include <cstdint>

// What the warps of one CTA do in attend_slots: teams that each attend their own tiles of 16
// tokens, through a ring of stages in shared memory that is filled ahead by asynchronous copies.
//
// A warp is a team where its registers hold the sums of all value dims; wider values are cut into
// slices, one warp each, and the warps of a team then share a ring and compute the same logits.

namespace kvtier {

template <typename ElementType, unsigned kHeadDimension, unsigned kValueDimension,
          bool kValuesAreInKeys, unsigned kSliceCount>
struct AttendShape {
  using Element = ElementType;
  static constexpr unsigned kHeadDim = kHeadDimension;
  static constexpr unsigned kValueDim = kValueDimension;
  static constexpr bool kValuesInKeys = kValuesAreInKeys;
  static constexpr unsigned kSlices = kSliceCount;

  static constexpr unsigned kWarps = kAttendThreads / kWarpLanes;
  static constexpr unsigned kTeams = kWarps / kSlices;
  static constexpr unsigned kTeamThreads = kSlices * kWarpLanes;
  /// Rows in pieces of 16 bytes. An odd pitch spreads eight rows over all banks.
  static constexpr unsigned kKeyPieces = kHeadDim / 8;
  static constexpr unsigned kValuePieces = kValuesInKeys ? 0 : kValueDim / 8;
  static constexpr unsigned kKeyPitch = 16 * (kKeyPieces | 1);
  static constexpr unsigned kValuePitch = kValuesInKeys ? kKeyPitch : 16 * (kValuePieces | 1);
  static constexpr unsigned kValuesAt = kValuesInKeys ? 0 : kAttendTileTokens * kKeyPitch;
  static constexpr unsigned kStageBytes = kValuesAt + kAttendTileTokens * kValuePitch;
  /// Two CTAs share the 227 KiB of an H100's multiprocessor. Three stages of 8 KiB per warp keep
  /// 128 KiB on their way there: 3 TB/s for 5 us of latency.
  static constexpr unsigned kFittingStages = kSlices * 26 * 1024 / kStageBytes;
  static constexpr unsigned kStages = kFittingStages < 2   ? 2
                                      : kFittingStages > 6 ? 6
                                                           : kFittingStages;

  /// Columns of 8 values that one warp sums.
  static constexpr unsigned kColumns = kValueDim / kSlices / 8;

  static constexpr unsigned kQueryBytes = kAttendRows * kKeyPitch;
  static constexpr unsigned kRingBytes = kTeams * kStages * kStageBytes;
  static constexpr unsigned kPositionBytes = kTeams * kStages * kAttendTileTokens * 4;
  static constexpr unsigned kSharedBytes = kQueryBytes + kRingBytes + kPositionBytes;
  static_assert(kColumns % 2 == 0 && kKeyPieces % 2 == 0);
  static_assert(kAttendTileTokens * kKeyPieces % kTeamThreads == 0);
};

/// A token that is not there: behind every query.
inline constexpr std::uint32_t kNoPosition = 0xFFFFFFFFu;

/// A list and the part of it that one CTA attends, in one KV head: every `splits`-th group of as
/// many tiles as there are teams, so that all CTAs of a list read neighbouring memory at one time.
struct AttendList {
  const SlotRange* ranges;
  std::uint32_t count;
  std::uint32_t split;
  std::uint32_t splits;
  std::uint32_t head;
  std::uint32_t limits[2];  ///< Last position that this lane's two rows may see.
};

template <typename S>
class AttendTeam {
 public:
  /// Sums over this lane's two rows, of exp2(logit - top): log base 2.
  float sums[S::kColumns][4];
  float top[2];
  float weight[2];

  __device__ AttendTeam(const AttendArguments& a, const AttendList& list, std::uint32_t shared)
      : a_(a),
        list_(list),
        lane_(threadIdx.x % kWarpLanes),
        team_(threadIdx.x / S::kTeamThreads),
        slice_(threadIdx.x % S::kTeamThreads / kWarpLanes),
        queries_(shared),
        ring_(shared + S::kQueryBytes + team_ * S::kStages * S::kStageBytes),
        positions_(shared + S::kQueryBytes + S::kRingBytes +
                   team_ * S::kStages * kAttendTileTokens * 4) {
#pragma unroll
    for (unsigned c = 0; c < S::kColumns; ++c) {
#pragma unroll
      for (float& sum : sums[c]) sum = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      top[i] = kEmptyLse;
      weight[i] = 0.0f;
    }
  }

  /// Attends this team's tiles. The copies of the queries have been committed by every thread of
  /// the CTA, all of which call this.
  __device__ void run() {
    const std::uint32_t tokens = list_.count * a_.tokens_per_block;
    const std::uint32_t tiles = (tokens + kAttendTileTokens - 1) / kAttendTileTokens;
    const std::uint32_t first = list_.split * S::kTeams + team_;
    const std::uint32_t step = list_.splits * S::kTeams;
    const std::uint32_t mine = tiles > first ? (tiles - first + step - 1) / step : 0;
    look_up(0, mine);
#pragma unroll
    for (unsigned i = 0; i < S::kStages - 1; ++i) request(i, mine, i);
    // All but the groups of the tiles: the queries are in.
    wait_copies<S::kStages - 1>();
    __syncthreads();
    unsigned stage = 0;
    for (std::uint32_t i = 0; i < mine; ++i) {
      wait_copies<S::kStages - 2>();
      // Tile i is in for the whole team, and the stage of tile i - 1 is free for the next.
      synchronize();
      request(i + S::kStages - 1, mine, stage == 0 ? S::kStages - 1 : stage - 1);
      attend(ring_ + stage * S::kStageBytes, positions_ + stage * kAttendTileTokens * 4);
      stage = stage + 1 == S::kStages ? 0 : stage + 1;
    }
    wait_copies<0>();
    finish();
  }

 private:
  __device__ void synchronize() const {
    if constexpr (S::kSlices == 1) {
      __syncwarp();
    } else {
      asm volatile("bar.sync %0, %1;" ::"r"(team_ + 1), "n"(S::kTeamThreads) : "memory");
    }
  }

  __device__ std::uint32_t first_token(std::uint32_t i) const {
    return ((i * list_.splits + list_.split) * S::kTeams + team_) * kAttendTileTokens;
  }

  /// Reads ahead which range this lane's token of tile `i` belongs to (two lanes per token).
  __device__ void look_up(std::uint32_t i, std::uint32_t mine) {
    const std::uint32_t token = first_token(i) + lane_ % kAttendTileTokens;
    const std::uint32_t place = token / a_.tokens_per_block;
    token_in_block_ = token - place * a_.tokens_per_block;
    range_ = SlotRange{};
    if (i < mine && place < list_.count) range_ = list_.ranges[place];
  }

  /// Starts the copies of tile `i`, or commits an empty group behind the last.
  __device__ void request(std::uint32_t i, std::uint32_t mine, unsigned stage) {
    if (i < mine) {
      const std::uint32_t in_range = token_in_block_ - range_.first_token;
      const bool wanted = range_.tokens > 0;
      const bool sound = range_.slot < a_.slots &&
                         std::uint32_t{range_.first_token} + range_.tokens <= a_.tokens_per_block;
      broken_ |= wanted && !sound;
      const bool present =
          wanted && sound && token_in_block_ >= range_.first_token && in_range < range_.tokens;
      const std::uint64_t offset =
          range_.slot * a_.block_bytes + list_.head * a_.head_bytes +
          std::uint64_t{token_in_block_} * (S::kHeadDim * sizeof(typename S::Element));
      if (slice_ == 0 && lane_ < kAttendTileTokens) {
        const std::uint32_t position = present ? range_.position + in_range : kNoPosition;
        asm volatile(
            "st.shared.u32 [%0], %1;" ::"r"(positions_ + (stage * kAttendTileTokens + lane_) * 4),
            "r"(position)
            : "memory");
      }
      copy_rows(present ? offset : kAbsent, ring_ + stage * S::kStageBytes);
      look_up(i + 1, mine);
    }
    commit_copies();
  }

  /// Spreads the rows whose offsets lanes 0 to 15 hold over the team's threads, in pieces.
  __device__ void copy_rows(std::uint64_t offset, std::uint32_t stage) const {
    const unsigned thread = slice_ * kWarpLanes + lane_;
#pragma unroll
    for (unsigned at = 0; at < kAttendTileTokens * S::kKeyPieces; at += S::kTeamThreads) {
      const unsigned row = (at + thread) / S::kKeyPieces;
      const unsigned piece = (at + thread) % S::kKeyPieces;
      const std::uint64_t from = __shfl_sync(kAllLanes, offset, row);
      const bool present = from != kAbsent;
      const std::byte* key = a_.blocks + (present ? from : 0) + piece * 16;
      copy_async_once(stage + row * S::kKeyPitch + piece * 16, key, present, policy_);
      if constexpr (!S::kValuesInKeys) {
        copy_async_once(stage + S::kValuesAt + row * S::kValuePitch + piece * 16,
                        key + (present ? a_.values_offset : 0), present, policy_);
      }
    }
  }

  __device__ void attend(std::uint32_t stage, std::uint32_t positions) {
    float logits[2][4] = {};
    multiply_keys(stage, logits);
    mask(positions, logits);
    uint4 high;
    uint4 low;
    weigh(logits, high, low);
    add_values(stage + S::kValuesAt, high, low);
  }

  /// logits[n] are those of tokens 8 n .. 8 n + 7 against the 16 rows of queries. Even and odd
  /// steps have sums of their own: a chain of dependent products half as long.
  __device__ void multiply_keys(std::uint32_t stage, float (&logits)[2][4]) const {
    const unsigned tile = lane_ / 8;
    const unsigned row = lane_ % 8;
    const std::uint32_t query = queries_ + (row + tile % 2 * 8) * S::kKeyPitch + tile / 2 * 16;
    const std::uint32_t key = stage + (row + tile / 2 * 8) * S::kKeyPitch + tile % 2 * 16;
    float odd[2][4] = {};
#pragma unroll
    for (unsigned k = 0; k < S::kKeyPieces; k += 2) {
      const uint4 a = load_tiles(query + k * 16);
      const uint4 b = load_tiles(key + k * 16);
      auto& sums = k / 2 % 2 == 0 ? logits : odd;
      TensorCore<typename S::Element>::multiply_add(sums[0], a, b.x, b.y);
      TensorCore<typename S::Element>::multiply_add(sums[1], a, b.z, b.w);
    }
#pragma unroll
    for (unsigned i = 0; i < 4; ++i) {
      logits[0][i] += odd[0][i];
      logits[1][i] += odd[1][i];
    }
  }

  /// Scales, caps, and takes out what a row may not see; afterwards log base 2.
  __device__ void mask(std::uint32_t positions, float (&logits)[2][4]) const {
#pragma unroll
    for (unsigned n = 0; n < 2; ++n) {
      std::uint32_t position[2];
      asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                   : "=r"(position[0]), "=r"(position[1])
                   : "r"(positions + (n * 8 + lane_ % 4 * 2) * 4)
                   : "memory");
#pragma unroll
      for (unsigned i = 0; i < 4; ++i) {
        float logit = logits[n][i] * a_.scale;
        if (a_.logit_cap > 0.0f) logit = a_.logit_cap * tanhf(logit / a_.logit_cap);
        const bool seen = position[i % 2] <= list_.limits[i / 2];
        logits[n][i] = seen ? logit * kLog2E : kEmptyLse;
      }
    }
  }

  /// Turns logits into weights under the running maximum, as an A tile in two 16-bit parts, so that
  /// a weight is carried to 2^-17 (bfloat16) or 2^-22 of itself.
  __device__ void weigh(float (&logits)[2][4], uint4& high, uint4& low) {
    using Core = TensorCore<typename S::Element>;
    float shrink[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float most = fmaxf(fmaxf(logits[0][2 * r], logits[0][2 * r + 1]),
                         fmaxf(logits[1][2 * r], logits[1][2 * r + 1]));
      most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 1));
      most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 2));
      most = fmaxf(most, top[r]);
      // Nothing seen yet: any finite number serves, and keeps NaN logits what they are.
      const float base = most == kEmptyLse ? 0.0f : most;
      shrink[r] = exp2f(top[r] - base);
      top[r] = most;
      weight[r] *= shrink[r];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int i = 2 * r; i < 2 * r + 2; ++i) {
          logits[n][i] = exp2f(logits[n][i] - base);
          weight[r] += logits[n][i];
        }
      }
    }
    if (__any_sync(kAllLanes, shrink[0] != 1.0f || shrink[1] != 1.0f)) {
#pragma unroll
      for (unsigned c = 0; c < S::kColumns; ++c) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[c][i] *= shrink[i / 2];
      }
    }
    std::uint32_t parts[2][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float x = logits[i / 2][2 * (i % 2)];
      const float y = logits[i / 2][2 * (i % 2) + 1];
      parts[0][i] = Core::pack(x, y);
      const float2 kept = Core::unpack(parts[0][i]);
      parts[1][i] = Core::pack(x - kept.x, y - kept.y);
    }
    high = {parts[0][0], parts[0][1], parts[0][2], parts[0][3]};
    low = {parts[1][0], parts[1][1], parts[1][2], parts[1][3]};
  }

  __device__ void add_values(std::uint32_t values, uint4 high, uint4 low) {
    using Core = TensorCore<typename S::Element>;
    const unsigned tile = lane_ / 8;
    const std::uint32_t value = values + (lane_ % 8 + tile % 2 * 8) * S::kValuePitch +
                                (slice_ * S::kColumns + tile / 2) * 16;
#pragma unroll
    for (unsigned c = 0; c < S::kColumns; c += 2) {
      const uint4 b = load_tiles_transposed(value + c * 16);
      Core::multiply_add(sums[c], high, b.x, b.y);
      Core::multiply_add(sums[c + 1], high, b.z, b.w);
      Core::multiply_add(sums[c], low, b.x, b.y);
      Core::multiply_add(sums[c + 1], low, b.z, b.w);
    }
  }

  /// Adds the weights up over the four lanes of a row, and makes the rows of a broken list NaN.
  __device__ void finish() {
    const bool broken = __any_sync(kAllLanes, broken_);
#pragma unroll
    for (float& w : weight) {
      w += __shfl_xor_sync(kAllLanes, w, 1);
      w += __shfl_xor_sync(kAllLanes, w, 2);
      if (broken) w = __int_as_float(0x7FC00000);
    }
  }

  static constexpr std::uint64_t kAbsent = ~std::uint64_t{0};

  const AttendArguments& a_;
  const AttendList& list_;
  unsigned lane_;
  unsigned team_;
  unsigned slice_;
  std::uint32_t queries_;
  std::uint32_t ring_;
  std::uint32_t positions_;
  std::uint64_t policy_ = read_once_policy();
  SlotRange range_;
  std::uint32_t token_in_block_ = 0;
  bool broken_ = false;
};

}  // namespace kvtier
