#pragma once

#include "memory/block_layout.h"
#include "memory/ids.h"
#include "memory/slot_pool.h"
#include "runtime/block_state.h"
#include "runtime/guess_source.h"
#include "selectors/eviction_policy.h"
#include "transfer/extent_format.h"
#include "transfer/transfer_engine.h"

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

namespace kvtier {

/// Whose blocks an extent holds.
struct ExtentOwner {
  SequenceId sequence;
  Origin origin;
  LayerIndex layer;
  HeadGroup head_group;
  BlockIndex first_block;
};

/// One row of the table: a run of blocks that shares a home.
struct Extent {
  HomeState state = HomeState::kFree;
  ExtentOwner owner;
  FrameId frame;
  ExtentPlace place;
  /// Sequences that it belongs to: more than one after a fork, and then it is complete.
  std::uint32_t sharers = 1;
  /// Places [0, sealed) of the extent hold sealed blocks.
  std::uint32_t sealed = 0;
  /// Of the write (kWriting) or read (kReading) that is under way.
  Transfer transfer;
  /// Brought in by look-ahead and not used yet, and on whose word.
  bool prefetched = false;
  GuessSource guess = GuessSource::kPreviousSet;
  /// Its frame is kept for a step up to this one; 0 when it is not (see `BlockTable::retain`).
  std::uint64_t retained_until = 0;
  /// Look-ahead wanted this extent for a step up to this one, but had no budget left for it.
  std::uint64_t predicted_until = 0;
  /// How often steps have missed blocks of it, fading, as of a step (`LookAhead::note_miss`).
  float misses = 0.0f;
  std::uint64_t misses_step = 0;
};

/// Where every extent's home is: the only writer of homes, frames and places on disk.
///
/// Bookkeeping alone: moves no bytes and waits for nothing (see `HostTier`). Decisions depend on
/// the calls alone. One thread at a time; memory is taken by the constructor.
class BlockTable {
 public:
  /// `frames` is the memory of the host tier; `places` the number of extents that fit on disk.
  BlockTable(const BlockLayout& layout, std::span<std::byte> frames, std::uint32_t places,
             std::unique_ptr<EvictionPolicy> policy);

  // --- Rows.

  /// Extents that there can be: ids are below this.
  std::uint32_t rows() const { return static_cast<std::uint32_t>(rows_.size()); }
  Extent& row(ExtentId id) { return rows_.at(id.value); }
  const Extent& row(ExtentId id) const { return rows_.at(id.value); }
  /// Applies one event of the state machine.
  void advance(ExtentId id, HomeEvent event);

  /// A new, filling extent in `frame`, held. None when every row is taken (cannot happen while
  /// rows = frames + places).
  std::optional<ExtentId> create(const ExtentOwner& owner, FrameId frame);
  /// Gives the row, its frame and its place back. Nothing may be in flight, and nobody shares it.
  void release(ExtentId id);

  /// A fork has the extent too. It is complete: what is shared never changes.
  void share(ExtentId id);
  bool is_shared(ExtentId id) const { return row(id).sharers > 1; }
  /// One sequence less has the extent; false when it was the only one, which must release it.
  bool unshare(ExtentId id);

  BlockIdentity identity(BlockId id) const;
  Generation generation(BlockId id) const { return generations_[id.value]; }
  void set_generation(BlockId id, Generation generation) { generations_[id.value] = generation; }

  /// Checksums of the values alone, where blocks are moved so and the move is verified: of each
  /// sealed block, seeded like that of the whole. In memory and not in the extent's header: what
  /// comes from disk comes whole, and is verified whole. 8 bytes a block, kept once asked for.
  void keep_values_checksums() { values_checksums_.resize(generations_.size()); }
  bool keeps_values_checksums() const { return !values_checksums_.empty(); }
  std::uint64_t values_checksum(BlockId id) const { return values_checksums_.at(id.value); }
  void set_values_checksum(BlockId id, std::uint64_t sum) { values_checksums_.at(id.value) = sum; }

  // --- Host frames.

  std::uint32_t frames() const { return frames_.capacity(); }
  std::uint32_t frames_used() const { return frames_.used(); }
  std::uint32_t frames_peak() const { return frames_.peak(); }
  /// Frames that are free, or hold what nobody holds on to but look-ahead.
  std::uint32_t frames_available() const { return frames_.free() + droppable_ + frames_retained(); }

  std::optional<FrameId> take_free_frame();
  void give_back_frame(FrameId frame) { frames_.release(frame.value); }
  /// The extent to drop next; it leaves the eviction policy here, so the caller must drop it (or
  /// `keep` it, where its only other copy turned out not to exist).
  std::optional<ExtentId> choose_victim();
  void keep(ExtentId id);

  /// Puts an extent that is arriving in its frame under the eviction policy.
  void admit(ExtentId id, FrameId frame, Admission why);
  void touch(ExtentId id) { policy_->touch(row(id).frame.value); }
  /// Takes the frame from an extent that `choose_victim` named.
  void detach_frame(ExtentId id);
  /// Takes the frame from an extent whose bytes did not come, whatever holds it.
  void lose_frame(ExtentId id);
  /// A held frame is not chosen as a victim. Counts.
  void hold_frame(ExtentId id);
  void unhold_frame(ExtentId id);
  /// Retained frames do not count as held.
  bool is_held(ExtentId id) const {
    return row(id).retained_until == 0 && held_.at(row(id).frame.value) > 0;
  }

  /// Keeps the frame of a guess from leaving until step `until` has passed, unless nothing else is
  /// left to leave. Whoever holds the frame meanwhile ends this: the guess has come true. The frame
  /// is not held.
  void retain(ExtentId id, std::uint64_t until);
  void let_go(ExtentId id);
  /// Lets go of what was retained for steps before `step`.
  void let_go_before(std::uint64_t step);
  std::uint32_t frames_retained() const { return static_cast<std::uint32_t>(retained_.size()); }

  std::span<std::byte> frame_bytes(FrameId frame) const {
    return {frames_.address(frame.value), layout_.extent_bytes()};
  }
  ExtentHeader header(ExtentId id) const;
  std::span<std::byte> block_bytes(BlockId id) const;

  /// A block that arrived damaged and whose place in the frame must not be read.
  bool is_damaged(BlockId id) const;
  void set_damaged(BlockId id, bool damaged);
  /// Whether any block of the extent in its frame is.
  bool has_damage(ExtentId id) const { return damaged_count_[row(id).frame.value] > 0; }

  // --- Places on disk.

  std::uint32_t places() const { return place_count_; }
  std::uint32_t places_used() const {
    return place_count_ - static_cast<std::uint32_t>(free_places_.size());
  }
  std::uint32_t places_peak() const { return places_peak_; }
  /// Takes a place for the extent; false when the disk is full.
  bool take_place(ExtentId id);
  void give_back_place(ExtentId id);
  /// Takes another place in exchange for the extent's own, where one is free.
  void change_place(ExtentId id);
  std::uint64_t disk_offset(ExtentId id) const {
    return std::uint64_t{row(id).place.value} * layout_.extent_bytes();
  }

 private:
  std::size_t damage_index(BlockId id) const;

  // Invariants: a row that has a frame is in exactly one of: held (held_ > 0) or droppable; a
  // droppable frame is known to the policy; droppable_ counts them. Rows in kFilling and kHost are
  // always held, because no other copy exists. A row with retained_until > 0 is in retained_, and
  // its frame is held once, by that alone.
  BlockLayout layout_;
  std::vector<Extent> rows_;
  std::vector<std::uint32_t> free_rows_;
  std::vector<Generation> generations_;
  std::vector<std::uint64_t> values_checksums_;
  SlotPool frames_;
  std::unique_ptr<EvictionPolicy> policy_;
  std::vector<std::uint16_t> held_;
  std::vector<ExtentId> retained_;
  std::vector<ExtentId> extent_of_frame_;
  std::uint32_t droppable_ = 0;
  std::vector<bool> damaged_;
  std::vector<std::uint16_t> damaged_count_;  // Per frame.
  std::uint32_t place_count_;
  std::uint32_t places_peak_ = 0;
  std::vector<std::uint32_t> free_places_;
};

}  // namespace kvtier
