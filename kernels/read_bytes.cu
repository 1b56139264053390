#include "kernels/read_bytes.h"
#include "kernels/warp.cuh"

namespace kvtier {
namespace {

constexpr unsigned kThreads = 512;
constexpr unsigned kLoads = 8;

__global__ void __launch_bounds__(kThreads)
    read_bytes_kernel(const ulonglong2* words, std::uint64_t count, unsigned long long* sum) {
  const std::uint64_t step = std::uint64_t{gridDim.x} * kThreads * kLoads;
  unsigned long long xors = 0;
  for (std::uint64_t at = std::uint64_t{blockIdx.x} * kThreads * kLoads + threadIdx.x; at < count;
       at += step) {
    ulonglong2 loaded[kLoads];
#pragma unroll
    for (unsigned i = 0; i < kLoads; ++i) {
      const std::uint64_t place = at + i * kThreads;
      loaded[i] = place < count ? __ldcs(words + place) : ulonglong2{};
    }
#pragma unroll
    for (const ulonglong2& pair : loaded) xors ^= pair.x ^ pair.y;
  }
  for (unsigned i = kWarpLanes / 2; i > 0; i /= 2) xors ^= __shfl_xor_sync(kAllLanes, xors, i);
  if (threadIdx.x % kWarpLanes == 0) atomicXor(sum, xors);
}

}  // namespace

Status read_bytes(const Gpu& gpu, std::span<const std::byte> bytes, std::uint64_t* sum,
                  StreamRef stream) {
  if (bytes.size() % 16 != 0) return unsupported(fmt::format("reading {} bytes", bytes.size()));
  if (bytes.empty()) return {};
  const auto* words = bytes.data();
  std::uint64_t count = bytes.size() / 16;
  void* pointers[] = {&words, &count, &sum};
  return gpu.launch({.kernel = reinterpret_cast<const void*>(&read_bytes_kernel),
                     .grid = {4 * gpu.traits().multiprocessors, 1, 1},
                     .threads = kThreads,
                     .arguments = pointers,
                     .stream = stream.get()},
                    "read_bytes");
}

}  // namespace kvtier
