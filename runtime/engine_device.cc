#include "runtime/engine_device.h"

#include <cstdint>

namespace kvtier {
namespace {

Result<Region> take(const kvtier_allocator& allocator, std::size_t bytes, const char* what) {
  void* const memory = allocator.allocate(allocator.context, bytes);
  if (memory == nullptr) {
    return no_space(fmt::format("the engine's allocator has not {} B for the {}", bytes, what));
  }
  auto* const start = static_cast<std::byte*>(memory);
  Region region = Region::adopt({start, bytes}, [allocator, memory, bytes] {
    allocator.release(allocator.context, memory, bytes);
  });
  if (reinterpret_cast<std::uintptr_t>(memory) % 4096 != 0) {
    return invalid_argument(fmt::format(
        "the engine's allocator gave memory for the {} that is not aligned to 4096", what));
  }
  return region;
}

}  // namespace

EngineDevice::EngineDevice(unsigned threads, const kvtier_allocator* slab,
                           const kvtier_allocator* frames)
    : host_(threads),
      slab_(slab != nullptr ? *slab : kvtier_allocator{}),
      frames_(frames != nullptr ? *frames : kvtier_allocator{}) {}

Result<Region> EngineDevice::allocate_slab(std::size_t bytes) {
  if (slab_.allocate == nullptr) return host_.allocate_slab(bytes);
  return take(slab_, bytes, "device tier");
}

Result<Region> EngineDevice::allocate_frames(std::size_t bytes) {
  if (frames_.allocate == nullptr) return host_.allocate_frames(bytes);
  return take(frames_, bytes, "host tier");
}

}  // namespace kvtier
