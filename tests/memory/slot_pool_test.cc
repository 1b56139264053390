#include "memory/slot_pool.h"

#include <gtest/gtest.h>

#include <set>
#include <vector>

namespace kvtier {
namespace {

TEST(SlotPool, HandsOutEverySlotOnceLowestFirst) {
  std::vector<std::byte> memory(10 * 64 + 63);
  SlotPool pool(memory, 64);
  ASSERT_EQ(pool.capacity(), 10u);
  std::set<std::byte*> addresses;
  for (std::uint32_t expected = 0; expected < 10; ++expected) {
    EXPECT_EQ(pool.used(), expected);
    EXPECT_EQ(pool.free(), 10 - expected);
    EXPECT_FALSE(pool.is_reserved(expected));
    const auto slot = pool.reserve();
    ASSERT_TRUE(slot.has_value());
    EXPECT_EQ(*slot, expected);
    EXPECT_TRUE(pool.is_reserved(*slot));
    EXPECT_TRUE(addresses.insert(pool.address(*slot)).second);
    EXPECT_GE(pool.address(*slot), memory.data());
    EXPECT_LE(pool.address(*slot) + pool.slot_bytes(), memory.data() + memory.size());
  }
  EXPECT_FALSE(pool.reserve().has_value());
  for (std::uint32_t slot = 1; slot < 10; ++slot) {
    EXPECT_EQ(pool.address(slot) - pool.address(slot - 1), 64);
  }
}

TEST(SlotPool, ReusesTheLastReleasedFirstAndKeepsThePeak) {
  std::vector<std::byte> memory(4 * 64);
  SlotPool pool(memory, 64);
  for (int i = 0; i < 3; ++i) ASSERT_TRUE(pool.reserve().has_value());
  pool.release(0);
  pool.release(2);
  EXPECT_EQ(pool.used(), 1u);
  EXPECT_EQ(pool.peak(), 3u);
  EXPECT_EQ(pool.reserve(), 2u);
  EXPECT_EQ(pool.reserve(), 0u);
  EXPECT_EQ(pool.peak(), 3u);
  EXPECT_EQ(pool.reserve(), 3u);
  EXPECT_EQ(pool.peak(), 4u);
}

TEST(SlotPool, TooLittleMemoryHasNoSlots) {
  std::vector<std::byte> memory(63);
  SlotPool pool(memory, 64);
  EXPECT_EQ(pool.capacity(), 0u);
  EXPECT_FALSE(pool.reserve().has_value());
}

TEST(SlotPoolDeathTest, MisuseStopsTheProcess) {
  std::vector<std::byte> memory(2 * 64);
  SlotPool pool(memory, 64);
  ASSERT_EQ(pool.reserve(), 0u);
  EXPECT_DEATH(pool.release(1), "slot 1 of 2 is not reserved");
  EXPECT_DEATH(pool.release(2), "slot 2 of 2 is not reserved");
  EXPECT_DEATH(pool.address(2), "slot 2 of 2");
  EXPECT_DEATH(SlotPool(memory, 0), "slots need a size");
  pool.release(0);
  EXPECT_DEATH(pool.release(0), "slot 0 of 2 is not reserved");
}

}  // namespace
}  // namespace kvtier
