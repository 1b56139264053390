#include "runtime/block_table.h"
#include "runtime/device_map.h"

#include <gtest/gtest.h>

#include <set>
#include <vector>

namespace kvtier {
namespace {

BlockLayout small_layout() {
  return BlockLayout::make({.dtype = DType::kF32,
                            .head_dim = 8,
                            .value_dim = 8,
                            .kv_heads = 1,
                            .kv_heads_per_block = 1,
                            .tokens_per_block = 4,
                            .extent_bytes = 8192})
      .value();
}

class Tables : public ::testing::Test {
 protected:
  static constexpr std::uint32_t kSlots = 4;
  static constexpr std::uint32_t kFrames = 3;
  static constexpr std::uint32_t kPlaces = 2;

  Tables()
      : layout_(small_layout()),
        slab_(kSlots * layout_.block_bytes()),
        frames_(kFrames * layout_.extent_bytes()),
        map_(layout_, slab_, 64, make_eviction_policy("lru", kSlots).value()),
        table_(layout_, frames_, kPlaces, make_eviction_policy("lru", kFrames).value()) {}

  ExtentId create() {
    return table_
        .create({.sequence = SequenceId{0}, .layer = LayerIndex{1}, .first_block = BlockIndex{32}},
                table_.take_free_frame().value())
        .value();
  }
  // Filled, written and droppable.
  ExtentId create_stored() {
    const ExtentId id = create();
    table_.advance(id, HomeEvent::kComplete);
    EXPECT_TRUE(table_.take_place(id));
    table_.advance(id, HomeEvent::kStartWrite);
    table_.unhold_frame(id);
    table_.advance(id, HomeEvent::kWriteDone);
    return id;
  }

  BlockLayout layout_;
  std::vector<std::byte> slab_;
  std::vector<std::byte> frames_;
  DeviceMap map_;
  BlockTable table_;
};

TEST_F(Tables, MapTakesTheLeastRecentlyUsedAndNeverTheHeld) {
  std::vector<SlotId> slots;
  for (std::uint64_t block = 0; block < kSlots; ++block) {
    slots.push_back(map_.reserve(BlockId{block}).value());
    map_.arrive(slots.back());
  }
  EXPECT_EQ(map_.available(), 0u);
  EXPECT_FALSE(map_.reserve(BlockId{10}).has_value());
  for (SlotId slot : slots) map_.unhold(slot);
  EXPECT_EQ(map_.available(), kSlots);
  map_.touch(slots[0]);
  map_.hold(slots[1]);
  const SlotId taken = map_.reserve(BlockId{10}).value();
  EXPECT_EQ(taken, slots[2]);
  EXPECT_TRUE(map_.find(BlockId{2}).is_none());
  EXPECT_EQ(map_.state(BlockId{10}), ResidencyState::kArriving);
  EXPECT_EQ(map_.evictions(), 1u);
}

TEST_F(Tables, MapGivesBackWhatDidNotArrive) {
  const SlotId slot = map_.reserve(BlockId{5}).value();
  map_.fail(slot);
  EXPECT_EQ(map_.available(), kSlots);
  EXPECT_EQ(map_.state(BlockId{5}), ResidencyState::kAbsent);
}

TEST_F(Tables, MapReleasesFromEveryState) {
  const SlotId open = map_.open(BlockId{1}).value();
  const SlotId resident = map_.open(BlockId{2}).value();
  map_.seal(resident);
  map_.hold(resident);
  map_.release(BlockId{1});
  map_.release(BlockId{2});
  map_.release(BlockId{3});
  EXPECT_EQ(map_.available(), kSlots);
  EXPECT_NE(open, resident);
  EXPECT_EQ(map_.slots_peak(), 2u);
}

TEST_F(Tables, MapReopensASealedBlock) {
  const SlotId slot = map_.open(BlockId{1}).value();
  map_.seal(slot);
  map_.unhold(slot);
  EXPECT_EQ(map_.available(), kSlots);
  map_.reopen(slot);
  EXPECT_EQ(map_.state(BlockId{1}), ResidencyState::kOpen);
  EXPECT_EQ(map_.available(), kSlots - 1);
}

TEST_F(Tables, OnlyWhatIsOnDiskIsDropped) {
  const ExtentId filling = create();
  EXPECT_FALSE(table_.choose_victim().has_value());
  const ExtentId stored = create_stored();
  EXPECT_EQ(table_.frames_available(), 2u);
  EXPECT_EQ(table_.choose_victim(), stored);
  table_.advance(stored, HomeEvent::kDropFrame);
  table_.detach_frame(stored);
  EXPECT_EQ(table_.frames_used(), 1u);
  EXPECT_EQ(table_.places_used(), 1u);
  EXPECT_TRUE(table_.is_held(filling));
}

TEST_F(Tables, PlacesAreBoundedAndComeBack) {
  const ExtentId first = create_stored();
  const ExtentId second = create_stored();
  const ExtentId third = create();
  EXPECT_FALSE(table_.take_place(third));
  EXPECT_NE(table_.disk_offset(first), table_.disk_offset(second));
  table_.release(first);
  EXPECT_TRUE(table_.take_place(third));
  EXPECT_EQ(table_.places_peak(), kPlaces);
  EXPECT_EQ(table_.frames_used(), 2u);
}

TEST_F(Tables, IdentityNamesTheBlock) {
  const ExtentId id = create();
  const BlockIdentity identity = table_.identity(layout_.block_id(id, 5));
  EXPECT_EQ(identity.index, BlockIndex{37});
  EXPECT_EQ(identity.layer, LayerIndex{1});
  EXPECT_EQ(table_.header(id).entry(5).length_bytes, 0u);
}

TEST_F(Tables, DamageIsCountedAndForgottenWithTheFrame) {
  const ExtentId id = create_stored();
  const BlockId block = layout_.block_id(id, 7);
  table_.set_damaged(block, true);
  table_.set_damaged(block, true);
  EXPECT_TRUE(table_.has_damage(id));
  EXPECT_TRUE(table_.is_damaged(block));
  EXPECT_EQ(table_.choose_victim(), id);
  table_.advance(id, HomeEvent::kDropFrame);
  table_.detach_frame(id);
  table_.admit(id, table_.take_free_frame().value(), Admission::kUsed);
  EXPECT_FALSE(table_.has_damage(id));
  EXPECT_FALSE(table_.is_damaged(block));
}

}  // namespace
}  // namespace kvtier
