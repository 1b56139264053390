#pragma once

#include <compare>
#include <cstdint>
#include <functional>
#include <limits>

namespace kvtier {

/// An index that cannot be mistaken for another kind of index. Trivial to copy, free to use.
/// The largest value is reserved and means "none".
template <typename Tag, typename Rep>
struct Id {
  using rep = Rep;
  static constexpr Rep kNone = std::numeric_limits<Rep>::max();

  Rep value = kNone;

  constexpr Id() = default;
  explicit constexpr Id(Rep v) : value(v) {}

  constexpr bool is_none() const { return value == kNone; }
  friend constexpr auto operator<=>(const Id&, const Id&) = default;
};

/// A request's tokens, in one runtime.
using SequenceId = Id<struct SequenceTag, std::uint32_t>;
/// A layer as the runtime numbers them: 0 .. layers-1 of those it was opened with.
using LayerIndex = Id<struct LayerTag, std::uint32_t>;
/// `BlockLayout::kv_heads_per_block` consecutive KV heads of one layer: what one block holds.
using HeadGroup = Id<struct HeadGroupTag, std::uint32_t>;
/// Which block of one (sequence, layer, head group): block i holds tokens [i*T, (i+1)*T).
using BlockIndex = Id<struct BlockIndexTag, std::uint32_t>;
/// A row of the block table: one run of blocks that shares a frame and a place on disk.
using ExtentId = Id<struct ExtentTag, std::uint32_t>;
/// Any sealed or open block of the runtime: extent * blocks_per_extent + place in the extent.
using BlockId = Id<struct BlockTag, std::uint64_t>;
/// A place for one block in the device slab.
using SlotId = Id<struct SlotTag, std::uint32_t>;
/// A place for one extent in host memory.
using FrameId = Id<struct FrameTag, std::uint32_t>;
/// A place for one extent in a segment file.
using ExtentPlace = Id<struct ExtentPlaceTag, std::uint32_t>;
/// How often the content of a block's place was reopened: truncation makes it grow.
using Generation = Id<struct GenerationTag, std::uint32_t>;

/// Where a block can be.
enum class Tier : unsigned char { kDevice, kHost, kDisk };
inline constexpr int kTierCount = 3;
constexpr const char* to_string(Tier tier) {
  constexpr const char* kNames[kTierCount] = {"device", "host", "disk"};
  return kNames[static_cast<int>(tier)];
}

/// Where a sequence's content came from: a 128-bit name that two contents never share.
struct Origin {
  std::uint64_t high = 0;
  std::uint64_t low = 0;
  friend constexpr auto operator<=>(const Origin&, const Origin&) = default;
};

/// What a block holds, independent of where it lies: compared after every arrival.
struct BlockIdentity {
  Origin origin;
  LayerIndex layer;
  HeadGroup head_group;
  BlockIndex index;
  friend constexpr auto operator<=>(const BlockIdentity&, const BlockIdentity&) = default;
};

}  // namespace kvtier

template <typename Tag, typename Rep>
struct std::hash<kvtier::Id<Tag, Rep>> {
  std::size_t operator()(const kvtier::Id<Tag, Rep>& id) const noexcept {
    return std::hash<Rep>{}(id.value);
  }
};
