#pragma once

#include "kernels/warp.cuh"

#include <cstdint>

// XXH3-64 of one block of a multiple of 64 bytes, from 256, by one warp, from the registers that
// carry the block (the algorithm's long form: xxhash's specification, doc/xxhash_spec.md).
//
// Lane l holds bytes [16 l, 16 l + 16) of each row of 512 bytes: stripe l / 4 of the row, words
// 2 (l % 4) and the next of that stripe. Inside 1 KiB (two rows) a stripe's share is only added to
// the eight accumulators, in any order, so each lane adds up its own and one butterfly over the
// lanes of equal l % 4 ends the KiB.

namespace kvtier {

/// XXH3's default secret as 64-bit words; a kernel's parameter, so it lies in constant memory.
struct Xxh3Secret {
  std::uint64_t word[24];
};

class WarpXxh3 {
 public:
  __device__ WarpXxh3(const Xxh3Secret& secret, unsigned lane)
      : secret_(secret), stripe_(lane / 4), pair_(2 * (lane % 4)) {
    const unsigned quarter = lane % 4;
    initial_[0] = quarter == 0 ? kPrime32_3 : quarter == 1 ? kPrime64_2 : kPrime64_4;
    initial_[1] = quarter == 0 ? kPrime64_1 : quarter == 1 ? kPrime64_3 : kPrime32_2;
    if (quarter == 3) {
      initial_[0] = kPrime64_5;
      initial_[1] = kPrime32_1;
    }
  }

  __device__ void start(std::uint64_t seed) {
    seed_ = seed;
    sum_[0] = initial_[0];
    sum_[1] = initial_[1];
    part_[0] = part_[1] = 0;
  }

  /// Adds this lane's 16 bytes of row `row`; `last` for those of the block's last 64 bytes.
  __device__ void add(uint4 bytes, unsigned row, bool last) {
    const std::uint64_t low = bytes.x | std::uint64_t{bytes.y} << 32;
    const std::uint64_t high = bytes.z | std::uint64_t{bytes.w} << 32;
    const unsigned word = stripe_ + 8 * (row & 1) + pair_;
    // The last stripe's key starts at byte 121 of the secret.
    const std::uint64_t key_low = last ? unaligned(15 + pair_, 8) : seeded(word);
    const std::uint64_t key_high = last ? unaligned(16 + pair_, 8) : seeded(word + 1);
    part_[0] += high + product(low ^ key_low);
    part_[1] += low + product(high ^ key_high);
  }

  /// Ends a whole KiB that more bytes follow.
  __device__ void end_kib() {
    fold();
    sum_[0] = scramble(sum_[0], 16 + pair_);
    sum_[1] = scramble(sum_[1], 17 + pair_);
  }

  /// The checksum, on every lane.
  __device__ std::uint64_t finish(std::uint64_t block_bytes) {
    fold();
    const std::uint64_t a = sum_[0] ^ unaligned(1 + pair_, 24);
    const std::uint64_t b = sum_[1] ^ unaligned(2 + pair_, 24);
    std::uint64_t hash = (a * b) ^ __umul64hi(a, b);
    hash += __shfl_xor_sync(kAllLanes, hash, 1);
    hash += __shfl_xor_sync(kAllLanes, hash, 2);
    hash += block_bytes * kPrime64_1;
    hash ^= hash >> 37;
    hash *= 0x165667919E3779F9ull;
    return hash ^ (hash >> 32);
  }

 private:
  static constexpr std::uint64_t kPrime32_1 = 0x9E3779B1u;
  static constexpr std::uint64_t kPrime32_2 = 0x85EBCA77u;
  static constexpr std::uint64_t kPrime32_3 = 0xC2B2AE3Du;
  static constexpr std::uint64_t kPrime64_1 = 0x9E3779B185EBCA87ull;
  static constexpr std::uint64_t kPrime64_2 = 0xC2B2AE3D27D4EB4Full;
  static constexpr std::uint64_t kPrime64_3 = 0x165667B19E3779F9ull;
  static constexpr std::uint64_t kPrime64_4 = 0x85EBCA77C2B2AE63ull;
  static constexpr std::uint64_t kPrime64_5 = 0x27D4EB2F165667C5ull;

  __device__ static std::uint64_t product(std::uint64_t key) {
    return std::uint64_t{static_cast<std::uint32_t>(key)} * (key >> 32);
  }

  /// Even words of the secret are raised by the seed, odd ones lowered.
  __device__ std::uint64_t seeded(unsigned word) const {
    return secret_.word[word] + (word % 2 == 0 ? seed_ : 0 - seed_);
  }
  /// 64 bits of the seeded secret from `shift` bits behind the start of `word`.
  __device__ std::uint64_t unaligned(unsigned word, unsigned shift) const {
    return seeded(word) >> shift | seeded(word + 1) << (64 - shift);
  }

  __device__ void fold() {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (unsigned lanes = 4; lanes < kWarpLanes; lanes *= 2) {
        part_[i] += __shfl_xor_sync(kAllLanes, part_[i], lanes);
      }
      sum_[i] += part_[i];
      part_[i] = 0;
    }
  }
  __device__ std::uint64_t scramble(std::uint64_t sum, unsigned word) const {
    return (sum ^ (sum >> 47) ^ seeded(word)) * kPrime32_1;
  }

  const Xxh3Secret& secret_;
  unsigned stripe_;
  unsigned pair_;
  std::uint64_t initial_[2];
  std::uint64_t seed_ = 0;
  std::uint64_t sum_[2];   ///< Of the KiB before; equal on the lanes of equal l % 4.
  std::uint64_t part_[2];  ///< This lane's share of the current KiB.
};

}  // namespace kvtier
