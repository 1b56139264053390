#pragma once

#include "kernels/merge_states.h"
#include "kernels/partial_attention.h"
#include "kernels/worker_pool.h"
#include "memory/region.h"
#include "memory/status.h"

#include <cstddef>
#include <span>
#include <string>

namespace kvtier {

/// Where blocks are attended: gives the memory of the device and host tiers and runs the attention.
///
/// Injected into the runtime; a build without CUDA has `HostDevice`, the simulator one that charges
/// time instead of (or besides) computing. One thread at a time.
class Device {
 public:
  virtual ~Device() = default;

  /// "memory", later "cuda:0 ...".
  virtual const std::string& name() const = 0;

  /// Memory for the slots of the device tier.
  virtual Result<Region> allocate_slab(std::size_t bytes) = 0;
  /// Memory for the frames of the host tier: near the device and readable by its link.
  virtual Result<Region> allocate_frames(std::size_t bytes) = 0;

  /// `partial_attention` over blocks in the slab.
  virtual Status attend(const AttentionParams& params, std::span<const AttentionTask> tasks) = 0;
  /// The threads that selection may use.
  virtual WorkerPool& workers() = 0;
};

/// The device of a build without a GPU: ordinary memory and the CPU kernels.
class HostDevice final : public Device {
 public:
  /// `threads` counts the calling thread; 0 takes what the process may use.
  explicit HostDevice(unsigned threads);

  const std::string& name() const override { return name_; }
  Result<Region> allocate_slab(std::size_t bytes) override;
  Result<Region> allocate_frames(std::size_t bytes) override;
  Status attend(const AttentionParams& params, std::span<const AttentionTask> tasks) override;
  WorkerPool& workers() override { return workers_; }

 private:
  std::string name_ = "memory";
  WorkerPool workers_;
  AttentionWorkspace workspace_;
};

}  // namespace kvtier
