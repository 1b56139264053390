#include "runtime/block_table.h"

#include "memory/check.h"

#include <algorithm>
#include <limits>

namespace kvtier {

BlockTable::BlockTable(const BlockLayout& layout, std::span<std::byte> frames, std::uint32_t places,
                       std::unique_ptr<EvictionPolicy> policy)
    : layout_(layout),
      frames_(frames, layout.extent_bytes()),
      policy_(std::move(policy)),
      place_count_(places) {
  // Every extent is in a frame or on disk, so this many rows are always enough.
  const std::uint32_t rows = frames_.capacity() + places;
  rows_.resize(rows);
  free_rows_.reserve(rows);
  for (std::uint32_t row = rows; row > 0; --row) free_rows_.push_back(row - 1);
  generations_.assign(std::size_t{rows} * layout.blocks_per_extent(), Generation{0});
  held_.assign(frames_.capacity(), 0);
  retained_.reserve(frames_.capacity());
  extent_of_frame_.assign(frames_.capacity(), ExtentId{});
  damaged_.assign(std::size_t{frames_.capacity()} * layout.blocks_per_extent(), false);
  damaged_count_.assign(frames_.capacity(), 0);
  free_places_.reserve(places);
  for (std::uint32_t place = places; place > 0; --place) free_places_.push_back(place - 1);
}

void BlockTable::advance(ExtentId id, HomeEvent event) {
  Extent& extent = row(id);
  extent.state = kvtier::advance(extent.state, event);
}

std::optional<ExtentId> BlockTable::create(const ExtentOwner& owner, FrameId frame) {
  if (free_rows_.empty()) return std::nullopt;
  const ExtentId id{free_rows_.back()};
  free_rows_.pop_back();
  Extent& extent = row(id);
  extent = Extent{};
  extent.owner = owner;
  advance(id, HomeEvent::kCreate);
  admit(id, frame, Admission::kUsed);
  hold_frame(id);
  header(id).format(owner.layer, owner.head_group);
  return id;
}

void BlockTable::release(ExtentId id) {
  Extent& extent = row(id);
  KVTIER_CHECK(!extent.transfer, "extent {} is released while it moves", id.value);
  KVTIER_CHECK(!is_shared(id), "extent {} is released while it is shared", id.value);
  if (!extent.frame.is_none()) {
    KVTIER_CHECK(held_[extent.frame.value] <= 1, "frame {} is released while it is in use",
                 extent.frame.value);
    lose_frame(id);
  }
  give_back_place(id);
  advance(id, HomeEvent::kRelease);
  free_rows_.push_back(id.value);
}

void BlockTable::share(ExtentId id) {
  Extent& extent = row(id);
  KVTIER_CHECK(extent.state != HomeState::kFree && extent.state != HomeState::kFilling,
               "extent {} is '{}' and cannot be shared", id.value, to_string(extent.state));
  ++extent.sharers;
}

bool BlockTable::unshare(ExtentId id) {
  if (!is_shared(id)) return false;
  --row(id).sharers;
  return true;
}

BlockIdentity BlockTable::identity(BlockId id) const {
  const Extent& extent = row(layout_.extent_of(id));
  return {.origin = extent.owner.origin,
          .layer = extent.owner.layer,
          .head_group = extent.owner.head_group,
          .index = BlockIndex{extent.owner.first_block.value + layout_.place_of(id)}};
}

std::optional<FrameId> BlockTable::take_free_frame() {
  const std::optional<std::uint32_t> frame = frames_.reserve();
  if (!frame) return std::nullopt;
  return FrameId{*frame};
}

std::optional<ExtentId> BlockTable::choose_victim() {
  std::optional<std::uint32_t> frame = policy_->evict(held_);
  if (!frame && !retained_.empty()) {
    // Nothing else is left: a guess must not keep what is asked for from coming in.
    let_go_before(std::numeric_limits<std::uint64_t>::max());
    frame = policy_->evict(held_);
  }
  if (!frame) return std::nullopt;
  const ExtentId id = extent_of_frame_[*frame];
  const HomeState state = row(id).state;
  KVTIER_CHECK(
      state == HomeState::kBoth || state == HomeState::kWriting || state == HomeState::kReading,
      "extent {} is '{}' and was left to the eviction policy", id.value, to_string(state));
  return id;
}

void BlockTable::keep(ExtentId id) {
  policy_->admit(row(id).frame.value, id.value, Admission::kUsed);
  hold_frame(id);
}

void BlockTable::admit(ExtentId id, FrameId frame, Admission why) {
  Extent& extent = row(id);
  KVTIER_CHECK(extent.frame.is_none(), "extent {} has a frame already", id.value);
  extent.frame = frame;
  extent_of_frame_[frame.value] = id;
  held_[frame.value] = 0;
  ++droppable_;
  policy_->admit(frame.value, id.value, why);
  const auto first = std::ptrdiff_t{frame.value} * layout_.blocks_per_extent();
  std::fill_n(damaged_.begin() + first, layout_.blocks_per_extent(), false);
  damaged_count_[frame.value] = 0;
}

void BlockTable::detach_frame(ExtentId id) {
  Extent& extent = row(id);
  KVTIER_CHECK(held_[extent.frame.value] == 0, "frame {} is held", extent.frame.value);
  --droppable_;
  extent_of_frame_[extent.frame.value] = ExtentId{};
  frames_.release(extent.frame.value);
  extent.frame = FrameId{};
}

void BlockTable::lose_frame(ExtentId id) {
  let_go(id);
  const FrameId frame = row(id).frame;
  policy_->remove(frame.value);
  if (held_[frame.value] == 0) --droppable_;
  held_[frame.value] = 0;
  extent_of_frame_[frame.value] = ExtentId{};
  frames_.release(frame.value);
  row(id).frame = FrameId{};
}

void BlockTable::hold_frame(ExtentId id) {
  let_go(id);
  std::uint16_t& held = held_[row(id).frame.value];
  if (held == 0) --droppable_;
  ++held;
}

void BlockTable::unhold_frame(ExtentId id) {
  std::uint16_t& held = held_[row(id).frame.value];
  KVTIER_CHECK(held > 0, "frame {} is not held", row(id).frame.value);
  --held;
  if (held == 0) ++droppable_;
}

void BlockTable::retain(ExtentId id, std::uint64_t until) {
  KVTIER_CHECK(!is_held(id), "extent {} is in use: no guess", id.value);
  Extent& extent = row(id);
  if (extent.retained_until == 0) {
    hold_frame(id);
    retained_.push_back(id);
  }
  extent.retained_until = std::max(extent.retained_until, until);
}

void BlockTable::let_go(ExtentId id) {
  if (row(id).retained_until == 0) return;
  row(id).retained_until = 0;
  unhold_frame(id);
  *std::ranges::find(retained_, id) = retained_.back();
  retained_.pop_back();
}

void BlockTable::let_go_before(std::uint64_t step) {
  for (std::size_t i = retained_.size(); i > 0; --i) {
    const ExtentId id = retained_[i - 1];
    if (row(id).retained_until >= step) continue;
    row(id).retained_until = 0;
    unhold_frame(id);
    retained_[i - 1] = retained_.back();
    retained_.pop_back();
  }
}

ExtentHeader BlockTable::header(ExtentId id) const {
  return {frame_bytes(row(id).frame).first(layout_.extent_header_bytes()), layout_};
}

std::span<std::byte> BlockTable::block_bytes(BlockId id) const {
  const Extent& extent = row(layout_.extent_of(id));
  return frame_bytes(extent.frame)
      .subspan(layout_.block_offset(layout_.place_of(id)), layout_.block_bytes());
}

std::size_t BlockTable::damage_index(BlockId id) const {
  const Extent& extent = row(layout_.extent_of(id));
  return std::size_t{extent.frame.value} * layout_.blocks_per_extent() + layout_.place_of(id);
}

bool BlockTable::is_damaged(BlockId id) const { return damaged_[damage_index(id)]; }

void BlockTable::set_damaged(BlockId id, bool damaged) {
  const std::size_t index = damage_index(id);
  if (damaged_[index] == damaged) return;
  damaged_[index] = damaged;
  std::uint16_t& count = damaged_count_[row(layout_.extent_of(id)).frame.value];
  count = static_cast<std::uint16_t>(damaged ? count + 1 : count - 1);
}

bool BlockTable::take_place(ExtentId id) {
  if (free_places_.empty()) return false;
  row(id).place = ExtentPlace{free_places_.back()};
  free_places_.pop_back();
  places_peak_ = std::max(places_peak_, places_used());
  return true;
}

void BlockTable::change_place(ExtentId id) {
  if (free_places_.empty()) return;
  Extent& extent = row(id);
  const std::uint32_t old = extent.place.value;
  extent.place = ExtentPlace{free_places_.back()};
  // Behind all others, so that it is not the next to be tried.
  free_places_.pop_back();
  free_places_.insert(free_places_.begin(), old);
}

void BlockTable::give_back_place(ExtentId id) {
  Extent& extent = row(id);
  if (extent.place.is_none()) return;
  free_places_.push_back(extent.place.value);
  extent.place = ExtentPlace{};
}

}  // namespace kvtier
