#include "runtime/device.h"

namespace kvtier {

HostDevice::HostDevice(unsigned threads) : workers_(threads) {}

Result<Region> HostDevice::allocate_slab(std::size_t bytes) {
  return Region::allocate({.bytes = bytes});
}

Result<Region> HostDevice::allocate_frames(std::size_t bytes) {
  return Region::allocate({.bytes = bytes, .page_lock = true});
}

Status HostDevice::attend(const AttentionParams& params, std::span<const AttentionTask> tasks) {
  return partial_attention(params, tasks, workspace_, workers_);
}

}  // namespace kvtier
