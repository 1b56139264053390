#include "transfer/store.h"

#include "tests/transfer/store_on_drive.h"
#include "transfer/extent_format.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <algorithm>
#include <limits>

namespace kvtier {
namespace store_suite {

using test::AlignedBuffer;
using test::ItemShape;
using test::key_of;
using test::put_item;
using testing::HasSubstr;

constexpr std::uint64_t kCapacity = test::StoreOnDrive::kCapacity;

using StoreTest = test::StoreOnDrive;

TEST_F(StoreTest, WhatIsCommittedIsReadBack) {
  auto store = open();
  for (std::uint64_t number = 1; number <= 5; ++number) {
    ASSERT_TRUE(put_item(*store, layout_, number).ok());
  }
  for (std::uint64_t number = 1; number <= 5; ++number) EXPECT_TRUE(is_whole(*store, number));
  EXPECT_FALSE(store->contains(key_of(6)));
  EXPECT_EQ(store->find(key_of(6)).status().code(), StatusCode::kNotFound);
  EXPECT_EQ(store->stats().blocks_corrupt, 0U);
  EXPECT_EQ(store->stats().blocks_verified, 5U * 2 * layout_.blocks_per_extent());
  EXPECT_TRUE(store->close().ok());
}

TEST_F(StoreTest, NothingIsVisibleBeforeItsCommitAndADroppedFillLeavesNoTrace) {
  auto store = open();
  const std::uint64_t free = store->stats().free_bytes;
  {
    auto fill = store->fill({.key = key_of(1),
                             .layout_fingerprint = layout_.fingerprint(),
                             .extents = 3,
                             .extent_bytes = layout_.extent_bytes()});
    ASSERT_TRUE(fill.ok());
    EXPECT_FALSE(store->contains(key_of(1)));
    EXPECT_LT(store->stats().free_bytes, free);
    EXPECT_EQ(put_item(*store, layout_, 1).code(), StatusCode::kBusy);
    AlignedBuffer memory(layout_.extent_bytes());
    test::fill_extent(memory.bytes(), layout_, 1, {LayerIndex{0}, HeadGroup{0}, 0});
    const StoreExtentWrite write{{LayerIndex{0}, HeadGroup{0}, 0}, memory.bytes()};
    EXPECT_TRUE(store->write(*fill, {&write, 1}).ok());
    // Two of three are missing.
    const Store::Commit commit{.fill = &*fill, .blobs = {}};
    EXPECT_EQ(store->commit({&commit, 1}).code(), StatusCode::kInvalidArgument);
    EXPECT_FALSE(static_cast<bool>(*fill));
  }
  EXPECT_EQ(store->stats().free_bytes, free);
  EXPECT_TRUE(put_item(*store, layout_, 1).ok());
  EXPECT_EQ(put_item(*store, layout_, 1).code(), StatusCode::kBusy);
  EXPECT_TRUE(store->close().ok());
}

TEST_F(StoreTest, DamagedOrWrongExtentsAreNotStored) {
  auto store = open();
  AlignedBuffer memory(layout_.extent_bytes());
  const StoreExtentKey key{LayerIndex{1}, HeadGroup{1}, 0};
  test::fill_extent(memory.bytes(), layout_, 1, key);
  const auto refused = [&](const StoreExtentKey& as) {
    auto fill = store->fill({.key = key_of(1),
                             .layout_fingerprint = layout_.fingerprint(),
                             .extents = 1,
                             .extent_bytes = layout_.extent_bytes()});
    const StoreExtentWrite write{as, memory.bytes()};
    return store->write(*fill, {&write, 1}).code();
  };
  EXPECT_EQ(refused({LayerIndex{1}, HeadGroup{0}, 0}), StatusCode::kCorrupt);
  EXPECT_EQ(refused({LayerIndex{0}, HeadGroup{1}, 0}), StatusCode::kCorrupt);
  EXPECT_EQ(refused(key), StatusCode::kOk);
  memory.bytes()[layout_.block_offset(3) + 5] ^= std::byte{1};
  EXPECT_EQ(refused(key), StatusCode::kCorrupt);
  EXPECT_TRUE(store->close().ok());
}

TEST_F(StoreTest, LevelsKeepWhatTheyPromise) {
  for (const Durability level : {Durability::kClean, Durability::kCrash, Durability::kPower}) {
    SCOPED_TRACE(to_string(level));
    drive_.files().clear();
    auto store = open(level);
    ASSERT_TRUE(put_item(*store, layout_, 1).ok());
    ASSERT_TRUE(store->close().ok());
    store = open(level);
    EXPECT_EQ(store->notice(), "");
    EXPECT_FALSE(store->stats().rebuilt);
    EXPECT_TRUE(is_whole(*store, 1));
    ASSERT_TRUE(put_item(*store, layout_, 2).ok());
    kill(std::move(store));
    store = open(level);
    EXPECT_FALSE(store->stats().rebuilt);
    const bool survives = level != Durability::kClean;
    EXPECT_EQ(store->contains(key_of(1)), survives);
    EXPECT_EQ(store->contains(key_of(2)), survives);
    EXPECT_EQ(is_whole(*store, 2), survives);
    EXPECT_EQ(store->notice().empty(), survives) << store->notice();
    EXPECT_TRUE(store->close().ok());
  }
}

TEST_F(StoreTest, PowerWaitsForTheDriveAndCrashDoesNot) {
  for (const bool power : {false, true}) {
    drive_.files().clear();
    auto store = open(power ? Durability::kPower : Durability::kCrash);
    const std::uint64_t before = drive_.syncs;
    ASSERT_TRUE(put_item(*store, layout_, 1).ok());
    EXPECT_EQ(drive_.syncs > before, power);
    if (power) {
      drive_.sync_failure = io_error("injected");
      EXPECT_EQ(put_item(*store, layout_, 2).code(), StatusCode::kIoError);
      EXPECT_FALSE(store->contains(key_of(2)));
      drive_.sync_failure = Status();
      EXPECT_TRUE(put_item(*store, layout_, 2).ok());
    }
    EXPECT_TRUE(store->close().ok());
  }
}

TEST_F(StoreTest, CapacityIsNeverExceededAndTheLeastValuableGoFirst) {
  auto store = open();
  const std::uint64_t total = drive_.total_bytes();
  EXPECT_LE(total + 4096, kCapacity);
  // A valuable one, one in use, and one that another continues.
  ASSERT_TRUE(put_item(*store, layout_, 1, {.value = 100.0}).ok());
  ASSERT_TRUE(put_item(*store, layout_, 2).ok());
  auto held = store->find(key_of(2));
  ASSERT_TRUE(put_item(*store, layout_, 3).ok());
  ASSERT_TRUE(put_item(*store, layout_, 4, {.parent = 3, .value = 100.0}).ok());
  for (std::uint64_t number = 10; number < 500; ++number) {
    ASSERT_TRUE(put_item(*store, layout_, number).ok()) << number;
    ASSERT_EQ(drive_.total_bytes(), total);
    for (std::uint64_t kept = 1; kept <= 4; ++kept) ASSERT_TRUE(store->contains(key_of(kept)));
    ASSERT_TRUE(store->contains(key_of(number)));
    // Of equal value the longest unused go: a run of the latest is left.
    if (number > 12) {
      EXPECT_TRUE(store->contains(key_of(number - 1)));
      EXPECT_TRUE(store->contains(key_of(number - 2)));
    }
  }
  EXPECT_FALSE(store->contains(key_of(10)));
  EXPECT_GT(store->stats().evicted_items, 400U);
  *held = StoredItem();
  EXPECT_TRUE(store->close().ok());
}

TEST_F(StoreTest, FullOfWhatIsHeldSaysSo) {
  auto store = open();
  std::vector<StoredItem> held;
  Status status;
  std::uint64_t number = 1;
  for (; number < 100; ++number) {
    status = put_item(*store, layout_, number);
    if (!status.ok()) break;
    held.push_back(std::move(*store->find(key_of(number))));
  }
  EXPECT_EQ(status.code(), StatusCode::kNoSpace);
  EXPECT_THAT(status.message(), HasSubstr(" B wanted"));
  EXPECT_EQ(store->stats().evicted_items, 0U);
  held.pop_back();
  EXPECT_TRUE(put_item(*store, layout_, number).ok());
  const Status never = put_item(*store, layout_, 1000, {.extents = 1000});
  EXPECT_EQ(never.code(), StatusCode::kNoSpace);
  EXPECT_EQ(store->erase(key_of(1)).code(), StatusCode::kBusy);
  held.clear();
  EXPECT_TRUE(store->close().ok());
}

TEST_F(StoreTest, ReferencesKeepChainsAndTheLastOneDropsThem) {
  auto store = open();
  ASSERT_TRUE(put_item(*store, layout_, 1).ok());
  ASSERT_TRUE(put_item(*store, layout_, 2, {.parent = 1}).ok());
  ASSERT_TRUE(put_item(*store, layout_, 3, {.parent = 1}).ok());
  ASSERT_TRUE(store->add_reference(key_of(2)).ok());
  ASSERT_TRUE(store->drop_reference(key_of(1)).ok());  // Continued: stays.
  EXPECT_TRUE(store->contains(key_of(1)));
  kill(std::move(store));
  store = open();
  ASSERT_TRUE(store->drop_reference(key_of(2)).ok());
  EXPECT_TRUE(store->contains(key_of(2)));  // One of two.
  ASSERT_TRUE(store->drop_reference(key_of(2)).ok());
  EXPECT_FALSE(store->contains(key_of(2)));
  EXPECT_TRUE(store->contains(key_of(1)));  // 3 continues it.
  ASSERT_TRUE(store->drop_reference(key_of(3)).ok());
  EXPECT_FALSE(store->contains(key_of(3)));
  EXPECT_FALSE(store->contains(key_of(1)));  // Nobody referred to it any more.
  EXPECT_EQ(store->stats().free_bytes, store->stats().data_bytes);
  EXPECT_TRUE(store->close().ok());
}

TEST_F(StoreTest, BlobsOfEverySizeComeBack) {
  auto store = open();
  std::uint64_t number = 1;
  for (const std::size_t bytes :
       {0ul, 1ul, 4096ul, 60'000ul, 65'536ul, 262'144ul, 262'145ul, 700'001ul}) {
    const ItemShape shape{.extents = 1, .blob_bytes = bytes};
    ASSERT_TRUE(put_item(*store, layout_, number, shape).ok()) << bytes;
    EXPECT_TRUE(is_whole(*store, number, shape)) << bytes;
    ++number;
  }
  EXPECT_TRUE(store->close().ok());
}

// A selector's state can be larger than the manifest has parts for: that shows before its gigabytes
// are written.
TEST_F(StoreTest, BlobsThatNoManifestCouldListAreRefusedUnwritten) {
  auto store = open();
  ASSERT_TRUE(put_item(*store, layout_, 2).ok());
  const std::uint64_t max = Store::blob_bytes_max(1, 1);
  EXPECT_GT(max, std::uint64_t{1} << 30);
  EXPECT_EQ(Store::blob_bytes_max(1 << 20, 1), 0U);
  const std::size_t bytes = std::size_t{3} << 30;
  void* const memory =
      ::mmap(nullptr, bytes, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  ASSERT_NE(memory, MAP_FAILED);
  for (const std::size_t size : {bytes, static_cast<std::size_t>(max)}) {
    auto fill = store->fill({.key = key_of(1)});
    ASSERT_TRUE(fill.ok());
    const std::uint64_t written = store->stats().written_bytes;
    const StoreBlob blob{.tag = 1, .bytes = {static_cast<const std::byte*>(memory), size}};
    const Store::Commit commit{.fill = &*fill, .blobs = {&blob, 1}};
    // This store has no room for what a manifest could list, and evicts nothing to find out.
    EXPECT_EQ(store->commit({&commit, 1}).code(),
              size == max ? StatusCode::kNoSpace : StatusCode::kUnsupported);
    EXPECT_EQ(store->stats().written_bytes, written);
    EXPECT_TRUE(store->contains(key_of(2)));
  }
  ::munmap(memory, bytes);
  EXPECT_TRUE(store->close().ok());
}

// One failure to write the index must not cost a reference that nobody gave up.
TEST_F(StoreTest, AReferenceThatCouldNotBeDroppedIsStillThere) {
  auto store = open();
  ASSERT_TRUE(put_item(*store, layout_, 1).ok());
  ASSERT_TRUE(store->add_reference(key_of(1)).ok());
  drive_.index_failure = io_error("injected");
  EXPECT_FALSE(store->drop_reference(key_of(1)).ok());
  drive_.index_failure = Status();
  EXPECT_TRUE(store->drop_reference(key_of(1)).ok());
  EXPECT_TRUE(store->contains(key_of(1)));
  EXPECT_TRUE(store->drop_reference(key_of(1)).ok());
  EXPECT_FALSE(store->contains(key_of(1)));
  EXPECT_TRUE(store->close().ok());
}

TEST_F(StoreTest, AValueIsANumber) {
  auto store = open();
  const double nan = std::numeric_limits<double>::quiet_NaN();
  EXPECT_EQ(put_item(*store, layout_, 1, {.value = nan}).code(), StatusCode::kInvalidArgument);
  ASSERT_TRUE(put_item(*store, layout_, 1).ok());
  EXPECT_EQ(store->set_value(key_of(1), nan).code(), StatusCode::kInvalidArgument);
  EXPECT_TRUE(store->close().ok());
}

TEST_F(StoreTest, SeveralCommitsAtOnceAreVisibleTogether) {
  auto store = open(Durability::kPower);
  std::vector<StoreFill> fills;
  for (std::uint64_t number = 1; number <= 3; ++number) {
    auto fill = store->fill({.key = key_of(number)});
    ASSERT_TRUE(fill.ok());
    fills.push_back(std::move(*fill));
  }
  std::vector<Store::Commit> commits;
  for (StoreFill& fill : fills) commits.push_back({.fill = &fill, .blobs = {}});
  const std::uint64_t before = drive_.syncs;
  ASSERT_TRUE(store->commit(commits).ok());
  EXPECT_EQ(drive_.syncs - before, 2U);
  for (std::uint64_t number = 1; number <= 3; ++number) {
    EXPECT_TRUE(store->contains(key_of(number)));
  }
  EXPECT_TRUE(store->close().ok());
}

TEST_F(StoreTest, ReadingAloneChangesNothing) {
  auto store = open();
  ASSERT_TRUE(put_item(*store, layout_, 1).ok());
  kill(std::move(store));
  const std::vector<std::byte> index = drive_.files()["index"].written;
  const std::vector<std::byte> segment = drive_.files()["segment-0000"].written;
  store = open({.read_only = true});
  EXPECT_TRUE(is_whole(*store, 1));
  EXPECT_EQ(put_item(*store, layout_, 2).code(), StatusCode::kUnsupported);
  EXPECT_EQ(store->erase(key_of(1)).code(), StatusCode::kUnsupported);
  EXPECT_TRUE(store->close().ok());
  EXPECT_EQ(drive_.files()["index"].written, index);
  EXPECT_EQ(drive_.files()["segment-0000"].written, segment);
}

TEST_F(StoreTest, DefragmentingMovesPlacesAndLosesNothing) {
  auto store = open();
  // Places of one unit; every second item goes, so that chunks are half full.
  std::uint64_t number = 1;
  for (; number <= 15; ++number) {
    ASSERT_TRUE(put_item(*store, layout_, number, {.extents = 1}).ok());
  }
  for (std::uint64_t gone = 1; gone < number; gone += 2) {
    ASSERT_TRUE(store->erase(key_of(gone)).ok());
  }
  const StoreStats before = store->stats();
  auto moves = store->defragment(100);
  ASSERT_TRUE(moves.ok()) << moves.status().to_string();
  EXPECT_GT(*moves, 0U);
  const StoreStats after = store->stats();
  EXPECT_EQ(after.free_bytes, before.free_bytes);
  EXPECT_GT(after.free_256k_bytes, before.free_256k_bytes);
  for (const bool reopened : {false, true}) {
    for (std::uint64_t kept = 2; kept < number; kept += 2) {
      EXPECT_TRUE(is_whole(*store, kept, {.extents = 1})) << kept;
    }
    EXPECT_EQ(store->stats().items, 7U);
    if (reopened) break;
    kill(std::move(store));
    store = open();
    EXPECT_EQ(store->stats().items_dropped, 0U);
  }
  EXPECT_TRUE(store->close().ok());
}

TEST_F(StoreTest, TheIndexIsRewrittenWhenItIsFullAndNothingIsLost) {
  auto store = open(Durability::kPower);
  ASSERT_TRUE(put_item(*store, layout_, 1).ok());
  const std::uint64_t before = store->stats().index_rewrites;
  for (int i = 0; i < 1500; ++i) ASSERT_TRUE(store->add_reference(key_of(1)).ok());
  EXPECT_GT(store->stats().index_rewrites, before);
  kill(std::move(store));
  store = open(Durability::kPower);
  EXPECT_FALSE(store->stats().rebuilt);
  for (int i = 0; i < 1500; ++i) ASSERT_TRUE(store->drop_reference(key_of(1)).ok());
  EXPECT_TRUE(store->contains(key_of(1)));
  ASSERT_TRUE(store->drop_reference(key_of(1)).ok());
  EXPECT_FALSE(store->contains(key_of(1)));
  EXPECT_TRUE(store->close().ok());
}

TEST_F(StoreTest, RandomCallsAgreeWithAMap) {
  for (std::uint64_t seed = 0; seed < 6; ++seed) {
    SCOPED_TRACE(seed);
    drive_.files().clear();
    std::mt19937_64 random(seed);
    const Durability level = seed % 2 == 0 ? Durability::kCrash : Durability::kPower;
    auto store = open(level);
    std::map<std::uint64_t, ItemShape> known;
    for (int step = 0; step < 120; ++step) {
      const std::uint64_t number = 1 + random() % 40;
      const ItemShape shape{.extents = 1 + static_cast<std::uint32_t>(number % 4),
                            .blob_bytes = number * 3001 % 90'000};
      switch (random() % 8) {
        case 0:
          if (known.contains(number) && store->contains(key_of(number))) {
            ASSERT_TRUE(store->erase(key_of(number)).ok());
          }
          known.erase(number);
          break;
        case 1:
          if (random() % 2 == 0) {
            ASSERT_TRUE(store->close().ok());
          } else {
            kill(std::move(store));
          }
          store = open(level);
          ASSERT_EQ(store->stats().items_dropped, 0U);
          break;
        case 2: ASSERT_TRUE(store->defragment(5).ok()); break;
        case 3:
        case 4:
        case 5:
          if (store->contains(key_of(number))) break;
          ASSERT_TRUE(put_item(*store, layout_, number, shape).ok());
          known[number] = shape;
          break;
        default:
          if (known.contains(number) && store->contains(key_of(number))) {
            ASSERT_TRUE(is_whole(*store, number, known[number]));
          } else {
            ASSERT_FALSE(known.contains(number) && store->stats().evicted_items == 0 && step < 20);
          }
      }
      std::uint64_t listed = 0;
      store->for_each([&](const StoreKey&) { ++listed; });
      ASSERT_EQ(listed, store->stats().items);
    }
    ASSERT_TRUE(store->close().ok());
  }
}

}  // namespace store_suite
}  // namespace kvtier
