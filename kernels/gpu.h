#pragma once

#include "kernels/cuda_calls.h"
#include "memory/status.h"
#include "memory/stream_ref.h"

#include <memory>

namespace kvtier {

/// A GPU that kernels are launched on: what it is, and the calls to reach it.
///
/// Every launcher takes one, so that shapes follow the device and a test can make calls fail.
/// Copyable view of the `CudaCalls`, which outlive it. Thread-safe.
class Gpu {
 public:
  /// Makes `ordinal` the calling thread's device. `unsupported`, with a line that says what is
  /// missing, without a driver, without that device, with a driver older than the program, or when
  /// the program has no code for the device.
  static Result<Gpu> open(CudaCalls& calls, int ordinal = 0);

  const GpuTraits& traits() const { return traits_; }
  CudaCalls& calls() const { return *calls_; }

  /// Enqueues one kernel; its arguments are copied before this returns.
  Status launch(const KernelLaunch& launch, const char* kernel_name) const;
  /// Waits for everything enqueued on the stream; the first failed kernel's error shows here.
  Status synchronize(StreamRef stream) const;

 private:
  struct Allowed;
  Gpu(CudaCalls& calls, GpuTraits traits);

  CudaCalls* calls_;
  GpuTraits traits_;
  /// Kernels that were given more shared memory than they have without asking: asking at each
  /// launch costs a third of it. Shared by copies.
  std::shared_ptr<Allowed> allowed_;
};

}  // namespace kvtier
