#include "runtime/device_map.h"

#include "memory/check.h"

namespace kvtier {

DeviceMap::DeviceMap(const BlockLayout& layout, std::span<std::byte> slab, std::uint64_t blocks,
                     std::unique_ptr<EvictionPolicy> policy)
    : pool_(slab, layout.block_bytes()), policy_(std::move(policy)) {
  slots_.resize(pool_.capacity());
  held_.assign(pool_.capacity(), 0);
  slot_of_block_.assign(blocks, SlotId{});
}

ResidencyState DeviceMap::state(BlockId id) const {
  const SlotId slot = find(id);
  return slot.is_none() ? ResidencyState::kAbsent : slots_[slot.value].state;
}

void DeviceMap::advance(SlotId slot, ResidencyEvent event) {
  ResidencyState& state = slots_[slot.value].state;
  state = kvtier::advance(state, event);
}

std::optional<SlotId> DeviceMap::take(BlockId id, ResidencyEvent event) {
  KVTIER_CHECK(find(id).is_none(), "block {} is on the device already", id.value);
  std::optional<std::uint32_t> place = pool_.reserve();
  if (!place) {
    const std::optional<std::uint32_t> victim = policy_->evict(held_);
    if (!victim) return std::nullopt;
    --evictable_;
    ++evictions_;
    advance(SlotId{*victim}, ResidencyEvent::kEvict);
    vacate(SlotId{*victim});
    place = pool_.reserve();
  }
  const SlotId slot{*place};
  slots_[slot.value].block = id;
  slot_of_block_[id.value] = slot;
  held_[slot.value] = 1;
  advance(slot, event);
  return slot;
}

void DeviceMap::mark_guess(SlotId slot, GuessSource source) {
  slots_[slot.value].is_guess = true;
  slots_[slot.value].source = source;
}

void DeviceMap::end_guess(Slot& slot, bool used) {
  if (!slot.is_guess) return;
  slot.is_guess = false;
  GuessEnds& ends = guess_ends_[static_cast<std::size_t>(slot.source)];
  ++(used ? ends.used : ends.unused);
}

void DeviceMap::vacate(SlotId slot) {
  end_guess(slots_[slot.value], false);
  slot_of_block_[slots_[slot.value].block.value] = SlotId{};
  slots_[slot.value].block = BlockId{};
  slots_[slot.value].whole = true;
  held_[slot.value] = 0;
  pool_.release(slot.value);
}

std::optional<SlotId> DeviceMap::open(BlockId id) { return take(id, ResidencyEvent::kOpen); }

std::optional<SlotId> DeviceMap::reserve(BlockId id, BlockPart part) {
  KVTIER_CHECK(part != BlockPart::kKeys, "a slot for the keys of block {} alone", id.value);
  const std::optional<SlotId> slot = take(id, ResidencyEvent::kReserve);
  if (slot) slots_[slot->value].whole = part == BlockPart::kWhole;
  return slot;
}

void DeviceMap::arrive(SlotId slot, Admission why) {
  advance(slot, ResidencyEvent::kArrive);
  policy_->admit(slot.value, slots_[slot.value].block.value, why);
}

void DeviceMap::complete(SlotId slot) {
  KVTIER_CHECK(slots_[slot.value].state == ResidencyState::kResident && !is_whole(slot),
               "slot {} is '{}' and wants no keys", slot.value,
               to_string(slots_[slot.value].state));
  slots_[slot.value].whole = true;
}

void DeviceMap::fail(SlotId slot) {
  advance(slot, ResidencyEvent::kFail);
  slots_[slot.value].is_guess = false;
  vacate(slot);
}

void DeviceMap::seal(SlotId slot) {
  advance(slot, ResidencyEvent::kSeal);
  policy_->admit(slot.value, slots_[slot.value].block.value, Admission::kUsed);
}

void DeviceMap::reopen(SlotId slot) {
  KVTIER_CHECK(is_whole(slot), "slot {} is reopened without its keys", slot.value);
  hold(slot);
  advance(slot, ResidencyEvent::kReopen);
  policy_->remove(slot.value);
}

void DeviceMap::release(BlockId id) {
  const SlotId slot = find(id);
  if (slot.is_none()) return;
  const bool resident = slots_[slot.value].state == ResidencyState::kResident;
  if (resident) {
    if (held_[slot.value] == 0) --evictable_;
    policy_->remove(slot.value);
  }
  advance(slot, ResidencyEvent::kRelease);
  vacate(slot);
}

void DeviceMap::touch(SlotId slot) {
  end_guess(slots_[slot.value], true);
  if (slots_[slot.value].state == ResidencyState::kResident) policy_->touch(slot.value);
}

void DeviceMap::hold(SlotId slot) {
  std::uint16_t& held = held_[slot.value];
  if (held == 0) --evictable_;
  ++held;
}

void DeviceMap::unhold(SlotId slot) {
  std::uint16_t& held = held_[slot.value];
  KVTIER_CHECK(held > 0, "slot {} is not held", slot.value);
  --held;
  if (held == 0) {
    KVTIER_CHECK(slots_[slot.value].state == ResidencyState::kResident,
                 "slot {} is '{}' and nobody holds it", slot.value,
                 to_string(slots_[slot.value].state));
    ++evictable_;
  }
}

}  // namespace kvtier
