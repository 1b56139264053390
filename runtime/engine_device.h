#pragma once

#include "runtime/device.h"
#include "runtime/kvtier.h"

#include <string>

namespace kvtier {

/// The device behind the C ABI in a build without a GPU: a `HostDevice` whose memory may come from
/// the engine.
class EngineDevice final : public Device {
 public:
  /// Null allocators: the device's own memory. What they point to is copied.
  EngineDevice(unsigned threads, const kvtier_allocator* slab, const kvtier_allocator* frames);

  const std::string& name() const override { return host_.name(); }
  Result<Region> allocate_slab(std::size_t bytes) override;
  Result<Region> allocate_frames(std::size_t bytes) override;
  Status attend(const AttentionParams& params, std::span<const AttentionTask> tasks) override {
    return host_.attend(params, tasks);
  }
  WorkerPool& workers() override { return host_.workers(); }

 private:
  HostDevice host_;
  kvtier_allocator slab_{};
  kvtier_allocator frames_{};
};

}  // namespace kvtier
