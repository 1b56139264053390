#pragma once

#include "kernels/warp.cuh"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

// The few instructions that attention and scanning are made of, for sm_80 and newer. Shapes are
// those of mma.m16n8k16: A is [16, 16], B is [16, 8], the sum is [16, 8]. Of the sum, lane l holds
// rows l / 4 and l / 4 + 8, columns 2 (l % 4) and the next.

namespace kvtier {

__device__ inline std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

/// Copies 16 bytes to shared memory without waiting; zeros when not `present`, reading nothing.
__device__ inline void copy_async(std::uint32_t target, const void* source, bool present) {
  const int bytes = present ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source),
               "r"(bytes)
               : "memory");
}
/// The same for what is read once: the first to leave the L2 cache, fetched by pairs of lines.
__device__ inline std::uint64_t read_once_policy() {
  std::uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ inline void copy_async_once(std::uint32_t target, const void* source, bool present,
                                       std::uint64_t policy) {
  const int bytes = present ? 16 : 0;
  asm volatile(
      "cp.async.cg.shared.global.L2::cache_hint.L2::256B [%0], [%1], 16, %2, %3;" ::"r"(target),
      "l"(source), "r"(bytes), "l"(policy)
      : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/// Waits until at most `kPending` of the groups committed by this thread are on their way.
template <int kPending>
__device__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

/// Four 8x8 tiles of 16-bit elements; lane l names row l % 8 of tile l / 8.
__device__ inline uint4 load_tiles(std::uint32_t row) {
  uint4 tiles;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(tiles.x), "=r"(tiles.y), "=r"(tiles.z), "=r"(tiles.w)
               : "r"(row)
               : "memory");
  return tiles;
}
__device__ inline uint4 load_tiles_transposed(std::uint32_t row) {
  uint4 tiles;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(tiles.x), "=r"(tiles.y), "=r"(tiles.z), "=r"(tiles.w)
               : "r"(row)
               : "memory");
  return tiles;
}

/// The two 16-bit element types: products, and pairs packed from float32.
template <typename Element>
struct TensorCore;

template <>
struct TensorCore<__half> {
  static __device__ void multiply_add(float (&sum)[4], uint4 a, std::uint32_t b0,
                                      std::uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
  }
  static __device__ std::uint32_t pack(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const std::uint32_t*>(&pair);
  }
  static __device__ float2 unpack(std::uint32_t pair) {
    return __half22float2(*reinterpret_cast<const __half2*>(&pair));
  }
};

template <>
struct TensorCore<__nv_bfloat16> {
  static __device__ void multiply_add(float (&sum)[4], uint4 a, std::uint32_t b0,
                                      std::uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
  }
  static __device__ std::uint32_t pack(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const std::uint32_t*>(&pair);
  }
  static __device__ float2 unpack(std::uint32_t pair) {
    return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&pair));
  }
};

}  // namespace kvtier
