#include "kernels/gpu.h"

#include <map>
#include <mutex>
#include <utility>

namespace kvtier {

struct Gpu::Allowed {
  std::mutex mutex;
  std::map<const void*, std::size_t> bytes;  ///< Guarded by `mutex`.
};

Gpu::Gpu(CudaCalls& calls, GpuTraits traits)
    : calls_(&calls), traits_(std::move(traits)), allowed_(std::make_shared<Allowed>()) {}

// In move_blocks.cu: any kernel of the program serves to ask whether the device can run them.
const void* any_kernel();

#ifndef KVTIER_CUDA
const void* any_kernel() { return nullptr; }
#endif

Result<Gpu> Gpu::open(CudaCalls& calls, int ordinal) {
  int devices = 0;
  KVTIER_RETURN_IF_ERROR(cuda_status(calls, calls.count_devices(devices), "looking for a GPU"));
  if (ordinal < 0 || ordinal >= devices) {
    return unsupported(fmt::format("GPU {} wanted, {} found", ordinal, devices));
  }
  GpuTraits traits;
  KVTIER_RETURN_IF_ERROR(cuda_status(calls, calls.open_device(ordinal, traits),
                                     fmt::format("opening GPU {}", ordinal)));
  KVTIER_RETURN_IF_ERROR(
      cuda_status(calls, calls.find_kernel(any_kernel()),
                  fmt::format("GPU {} ({}, sm_{})", ordinal, traits.name, traits.capability)));
  return Gpu(calls, std::move(traits));
}

Status Gpu::launch(const KernelLaunch& launch, const char* kernel_name) const {
  constexpr std::size_t kWithoutAsking = 48 * 1024;
  if (launch.shared_bytes > kWithoutAsking) {
    const std::lock_guard lock(allowed_->mutex);
    std::size_t& allowed = allowed_->bytes[launch.kernel];
    if (allowed < launch.shared_bytes) {
      KVTIER_RETURN_IF_ERROR(cuda_status(
          *calls_, calls_->allow_shared_bytes(launch.kernel, launch.shared_bytes), kernel_name));
      allowed = launch.shared_bytes;
    }
  }
  return cuda_status(*calls_, calls_->launch(launch), kernel_name);
}

Status Gpu::synchronize(StreamRef stream) const {
  return cuda_status(*calls_, calls_->synchronize(stream.get()), "waiting for a stream");
}

}  // namespace kvtier
