#pragma once

#include "memory/block_layout.h"
#include "memory/ids.h"
#include "memory/slot_pool.h"
#include "runtime/block_state.h"
#include "runtime/guess_source.h"
#include "selectors/eviction_policy.h"

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

namespace kvtier {

/// How guesses of one source ended, in blocks.
struct GuessEnds {
  std::uint64_t used = 0;
  std::uint64_t unused = 0;
};

/// Which blocks are on the device, and in which slots: the only writer of device residency.
///
/// The device is a cache: dropping a resident block loses nothing, so eviction happens here and
/// costs nothing. Bookkeeping alone. One thread at a time; memory is taken by the constructor.
class DeviceMap {
 public:
  /// `blocks` bounds the ids that will be asked for.
  DeviceMap(const BlockLayout& layout, std::span<std::byte> slab, std::uint64_t blocks,
            std::unique_ptr<EvictionPolicy> policy);

  /// The block's slot in whatever state; none when it is absent.
  SlotId find(BlockId id) const { return slot_of_block_[id.value]; }
  ResidencyState state(BlockId id) const;
  BlockId block_in(SlotId slot) const { return slots_[slot.value].block; }
  std::byte* address(SlotId slot) const { return pool_.address(slot.value); }
  /// Whether keys and values are there, or will be once they arrive; otherwise values alone.
  bool is_whole(SlotId slot) const { return slots_[slot.value].whole; }
  /// Whether all of the block can be read here.
  bool has_whole(BlockId id) const {
    return state(id) == ResidencyState::kResident && is_whole(find(id));
  }

  /// Slots that are free, or hold a resident block that nobody holds on to.
  std::uint32_t available() const { return pool_.free() + evictable_; }

  /// Takes a slot for an absent block, evicting if need be; held once until `unhold`. None when
  /// every slot is held. `open` makes the tail of a sequence, `reserve` a block that will arrive,
  /// whole or its values alone.
  std::optional<SlotId> open(BlockId id);
  std::optional<SlotId> reserve(BlockId id, BlockPart part = BlockPart::kWhole);
  /// The reserved bytes are in: readable from now on.
  void arrive(SlotId slot, Admission why = Admission::kUsed);
  /// The keys of a resident block that had its values alone are in as well.
  void complete(SlotId slot);
  /// The reserved bytes did not come: the slot is free again, whatever held it.
  void fail(SlotId slot);
  /// The open tail is full: readable and immutable.
  void seal(SlotId slot);
  /// A truncation cut into a resident block: writable again, held once more.
  void reopen(SlotId slot);
  /// The block's tokens are gone. Any state but arriving; whatever held it holds no more.
  void release(BlockId id);

  /// What was reserved is only a guess: its first `touch` makes it a used one, leaving before that
  /// an unused one. One that fails is neither.
  void mark_guess(SlotId slot, GuessSource source);
  const GuessEnds& guess_ends(GuessSource source) const {
    return guess_ends_[static_cast<std::size_t>(source)];
  }

  void touch(SlotId slot);
  /// A held slot is not evicted. Counts.
  void hold(SlotId slot);
  void unhold(SlotId slot);
  bool is_held(SlotId slot) const { return held_[slot.value] > 0; }

  std::uint32_t slots() const { return pool_.capacity(); }
  std::uint32_t slots_used() const { return pool_.used(); }
  std::uint32_t slots_peak() const { return pool_.peak(); }
  std::uint64_t evictions() const { return evictions_; }

 private:
  struct Slot {
    BlockId block;
    ResidencyState state = ResidencyState::kAbsent;
    bool is_guess = false;
    GuessSource source = GuessSource::kPreviousSet;
    bool whole = true;
  };

  std::optional<SlotId> take(BlockId id, ResidencyEvent event);
  void vacate(SlotId slot);
  void end_guess(Slot& slot, bool used);
  void advance(SlotId slot, ResidencyEvent event);

  // Invariants: slot_of_block_ and slots_[].block are inverse to each other; the policy knows
  // exactly the resident slots; evictable_ counts those of them that are not held.
  SlotPool pool_;
  std::vector<Slot> slots_;
  std::vector<SlotId> slot_of_block_;
  std::vector<std::uint16_t> held_;
  std::uint32_t evictable_ = 0;
  std::unique_ptr<EvictionPolicy> policy_;
  std::uint64_t evictions_ = 0;
  std::array<GuessEnds, kGuessSourceCount> guess_ends_{};
};

}  // namespace kvtier
