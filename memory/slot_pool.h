#pragma once

#include "memory/check.h"

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

namespace kvtier {

/// Fixed places of equal size in one range of memory, handed out and taken back by number.
///
/// Lowest number first on a fresh pool, last released first afterwards: the order depends on the
/// calls alone. Does not own the memory. One writer; not thread-safe. Only the constructor
/// allocates.
class SlotPool {
 public:
  /// `memory` is cut into slots of `slot_bytes`; a remainder at the end is left unused.
  SlotPool(std::span<std::byte> memory, std::size_t slot_bytes);

  std::uint32_t capacity() const { return capacity_; }
  std::uint32_t used() const { return capacity_ - static_cast<std::uint32_t>(free_.size()); }
  std::uint32_t free() const { return static_cast<std::uint32_t>(free_.size()); }
  std::uint32_t peak() const { return peak_; }
  std::size_t slot_bytes() const { return slot_bytes_; }

  /// None when every slot is taken.
  std::optional<std::uint32_t> reserve();
  /// Aborts when the slot is not taken.
  void release(std::uint32_t slot);
  bool is_reserved(std::uint32_t slot) const { return reserved_.at(slot); }

  std::byte* address(std::uint32_t slot) const {
    KVTIER_CHECK(slot < capacity_, "slot {} of {}", slot, capacity_);
    return memory_.data() + slot * slot_bytes_;
  }

 private:
  std::span<std::byte> memory_;
  std::size_t slot_bytes_;
  std::uint32_t capacity_;
  std::uint32_t peak_ = 0;
  std::vector<std::uint32_t> free_;
  std::vector<bool> reserved_;
};

}  // namespace kvtier
