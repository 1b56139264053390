#include "tests/transfer/store_on_drive.h"
#include "tests/transfer/store_world.h"
#include "transfer/store.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <vector>

// What a store knows when it is opened again: content, order of use, who continues whom.

namespace kvtier {
namespace store_reopen {

using test::ItemShape;
using test::key_of;
using test::put_item;

class StoreReopenTest : public test::StoreOnDrive {};

TEST_F(StoreReopenTest, ACleanStopIsOpenedWithoutReadingASegment) {
  auto store = open();
  const ItemShape large{.extents = 5, .blob_bytes = 300'000};
  for (std::uint64_t number = 1; number <= 6; ++number) {
    ASSERT_TRUE(put_item(*store, layout_, number, number == 3 ? large : ItemShape{}).ok());
  }
  ASSERT_TRUE(store->close().ok());
  // Only segments' headers are read: nothing else could be.
  for (int life = 0; life < 2; ++life) {
    store = open();
    EXPECT_EQ(store->notice(), "");
    EXPECT_EQ(store->stats().items, 6U);
    EXPECT_EQ(store->stats().read_bytes, 0U);
    for (std::uint64_t number = 1; number <= 6; ++number) {
      EXPECT_TRUE(is_whole(*store, number, number == 3 ? large : ItemShape{}));
    }
    ASSERT_TRUE(store->close().ok());
  }
  // After a kill the list has no details, and manifests are read.
  store = open();
  ASSERT_TRUE(store->erase(key_of(2)).ok());
  kill(std::move(store));
  store = open();
  EXPECT_EQ(store->stats().items, 5U);
  EXPECT_TRUE(is_whole(*store, 3, large));
  EXPECT_TRUE(store->close().ok());
}

TEST_F(StoreReopenTest, TheOrderOfUseSurvives) {
  auto store = open();
  for (std::uint64_t number = 1; number <= 4; ++number) {
    ASSERT_TRUE(put_item(*store, layout_, number).ok());
  }
  EXPECT_TRUE(is_whole(*store, 1));  // Used: now 2 is the longest unused, then 3.
  ASSERT_TRUE(store->close().ok());
  store = open();
  std::uint64_t number = 100;
  while (store->stats().evicted_items < 2) {
    ASSERT_TRUE(put_item(*store, layout_, ++number).ok());
  }
  EXPECT_TRUE(store->contains(key_of(1)));
  EXPECT_FALSE(store->contains(key_of(2)));
  EXPECT_FALSE(store->contains(key_of(3)));
  EXPECT_TRUE(store->close().ok());
}

TEST_F(StoreReopenTest, WhatContinuesAnItemIsKnown) {
  auto store = open();
  const auto continuations = [&](std::uint64_t number) {
    std::vector<StoreKey> keys = store->continuations(key_of(number));
    std::ranges::sort(keys);
    return keys;
  };
  const auto keys_of = [](std::vector<std::uint64_t> numbers) {
    std::vector<StoreKey> keys;
    for (const std::uint64_t number : numbers) keys.push_back(key_of(number));
    std::ranges::sort(keys);
    return keys;
  };
  ASSERT_TRUE(put_item(*store, layout_, 1).ok());
  for (const std::uint64_t child : {2U, 3U, 4U}) {
    ASSERT_TRUE(put_item(*store, layout_, child, {.parent = 1}).ok());
  }
  ASSERT_TRUE(put_item(*store, layout_, 5, {.parent = 3}).ok());
  EXPECT_EQ(continuations(1), keys_of({2, 3, 4}));
  EXPECT_EQ(continuations(3), keys_of({5}));
  EXPECT_EQ(continuations(2), keys_of({}));
  ASSERT_TRUE(store->close().ok());
  store = open();
  EXPECT_EQ(continuations(1), keys_of({2, 3, 4}));
  // From the middle, the front and the end of the list.
  for (const std::uint64_t child : {3U, 4U, 2U}) ASSERT_TRUE(store->erase(key_of(child)).ok());
  EXPECT_EQ(continuations(1), keys_of({}));
  EXPECT_EQ(continuations(3), keys_of({5})) << "what it continues is gone, it is not";
  {
    auto fill = store->fill({.key = key_of(6), .parent = key_of(1)});
    ASSERT_TRUE(fill.ok());
    EXPECT_EQ(continuations(1), keys_of({})) << "nobody sees what is being written";
  }
  EXPECT_TRUE(store->close().ok());
}

}  // namespace store_reopen
}  // namespace kvtier
