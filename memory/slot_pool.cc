#include "memory/slot_pool.h"

#include <algorithm>
#include <limits>

namespace kvtier {

SlotPool::SlotPool(std::span<std::byte> memory, std::size_t slot_bytes)
    : memory_(memory), slot_bytes_(slot_bytes) {
  KVTIER_CHECK(slot_bytes > 0, "slots need a size");
  const std::size_t slots = memory.size() / slot_bytes;
  KVTIER_CHECK(slots < std::numeric_limits<std::uint32_t>::max(), "{} slots", slots);
  capacity_ = static_cast<std::uint32_t>(slots);
  free_.reserve(capacity_);
  for (std::uint32_t slot = capacity_; slot > 0; --slot) free_.push_back(slot - 1);
  reserved_.assign(capacity_, false);
}

std::optional<std::uint32_t> SlotPool::reserve() {
  if (free_.empty()) return std::nullopt;
  const std::uint32_t slot = free_.back();
  free_.pop_back();
  reserved_[slot] = true;
  peak_ = std::max(peak_, used());
  return slot;
}

void SlotPool::release(std::uint32_t slot) {
  KVTIER_CHECK(slot < capacity_ && reserved_[slot], "slot {} of {} is not reserved", slot,
               capacity_);
  reserved_[slot] = false;
  free_.push_back(slot);
}

}  // namespace kvtier
