#include "transfer/store.h"

#include "tests/transfer/store_world.h"
#include "transfer/extent_format.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>

namespace kvtier {
namespace store_suite {

using test::AlignedBuffer;
using test::ItemShape;
using test::ItemVerdict;
using test::key_of;
using test::put_item;
using test::read_item;
using test::SimulatedDrive;
using testing::HasSubstr;

constexpr std::uint64_t kCapacity = 4 << 20;

class StoreTest : public ::testing::Test {
 protected:
  std::unique_ptr<Store> open(StoreOptions options) {
    auto store = Store::open(drive_.open(), options);
    EXPECT_TRUE(store.ok()) << store.status().to_string();
    return store.ok() ? std::move(*store) : nullptr;
  }
  std::unique_ptr<Store> open(Durability level = Durability::kCrash) {
    return open(test::store_options(kCapacity, level));
  }
  // As after kill -9: what was written stays, nothing is said goodbye to.
  void kill(std::unique_ptr<Store> store) {
    drive_.stop_after(0);
    EXPECT_FALSE(store->close().ok());
    store.reset();
    drive_.restart();
  }

  bool is_whole(Store& store, std::uint64_t number, const ItemShape& shape = {}) {
    const ItemVerdict verdict = read_item(store, layout_, number, shape);
    EXPECT_FALSE(verdict.wrong);
    return verdict.found && verdict.whole;
  }

  BlockLayout layout_ = test::small_layout();
  SimulatedDrive drive_;
};

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

TEST_F(StoreTest, TheIndexIsRebuiltWhenItIsMissingOrDamaged) {
  auto store = open();
  for (std::uint64_t number = 1; number <= 4; ++number) {
    ASSERT_TRUE(put_item(*store, layout_, number).ok());
  }
  ASSERT_TRUE(store->erase(key_of(2)).ok());
  const auto damages = std::to_array<std::function<void()>>({
      [&] { drive_.files().erase("index"); },
      [&] { drive_.files()["index"].written.resize(4096); },
      [&] { drive_.files()["index"].written[100] ^= std::byte{1}; },
      [&] {
        auto& bytes = drive_.files()["index"].written;
        bytes[100] ^= std::byte{1};
        bytes[bytes.size() / 2 + 100] ^= std::byte{1};
      },
      [&] {
        // A record in the middle of both areas.
        auto& bytes = drive_.files()["index"].written;
        bytes[4096 + 128 + 40] ^= std::byte{1};
        bytes[bytes.size() / 2 + 4096 + 128 + 40] ^= std::byte{1};
      },
  });
  for (std::size_t i = 0; i < damages.size(); ++i) {
    SCOPED_TRACE(i);
    if (i % 2 == 0) {
      kill(std::move(store));
    } else {
      ASSERT_TRUE(store->close().ok());
    }
    damages[i]();
    StoreOptions options = test::store_options(kCapacity);
    std::uint64_t seen = 0;
    options.progress = [&](std::uint64_t done, std::uint64_t total) {
      seen = done;
      EXPECT_LE(done, total);
    };
    store = open(options);
    EXPECT_TRUE(store->stats().rebuilt);
    EXPECT_THAT(store->notice(), HasSubstr("rebuilt from the segments"));
    EXPECT_EQ(seen, store->stats().data_bytes);
    for (const std::uint64_t number : {1ul, 3ul, 4ul})
      EXPECT_TRUE(is_whole(*store, number)) << number;
    EXPECT_FALSE(store->contains(key_of(2)));
    EXPECT_EQ(store->stats().items, 3U);
  }
  EXPECT_TRUE(store->close().ok());
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

TEST_F(StoreTest, AFailedWriteMakesNothingVisibleAndTheStoreGoesOn) {
  auto store = open();
  const std::uint64_t free = store->stats().free_bytes;
  for (Status* failure : {&drive_.write_failure, &drive_.index_failure}) {
    for (const Status& status : {no_space("injected enospc"), io_error("injected eio")}) {
      *failure = status;
      EXPECT_EQ(put_item(*store, layout_, 1).code(), status.code());
      *failure = Status();
      EXPECT_FALSE(store->contains(key_of(1)));
      EXPECT_EQ(store->stats().free_bytes, free);
    }
  }
  EXPECT_GT(store->stats().write_failures, 0U);
  EXPECT_TRUE(put_item(*store, layout_, 1).ok());
  kill(std::move(store));
  store = open();
  EXPECT_TRUE(is_whole(*store, 1));
  EXPECT_TRUE(store->close().ok());
}

TEST_F(StoreTest, DamageIsNamedBlockByBlock) {
  auto store = open();
  ASSERT_TRUE(put_item(*store, layout_, 1).ok());
  ASSERT_TRUE(put_item(*store, layout_, 2).ok());
  std::vector<std::byte>& bytes = drive_.files()["segment-0000"].written;
  AlignedBuffer extent(layout_.extent_bytes());
  test::fill_extent(extent.bytes(), layout_, 1, {LayerIndex{0}, HeadGroup{1}, 0});
  const auto place =
      std::search(bytes.begin(), bytes.end(), extent.bytes().begin(), extent.bytes().end()) -
      bytes.begin();
  ASSERT_LT(static_cast<std::size_t>(place), bytes.size());
  const std::size_t at = static_cast<std::size_t>(place) + layout_.block_offset(5) + 3;
  bytes[at] ^= std::byte{4};
  ItemVerdict verdict = read_item(*store, layout_, 1);
  EXPECT_EQ(verdict.bad_blocks, 1U);
  EXPECT_FALSE(verdict.wrong);
  EXPECT_EQ(verdict.status.code(), StatusCode::kCorrupt);
  EXPECT_THAT(verdict.status.message(), HasSubstr("the first in place 5"));
  EXPECT_EQ(store->stats().blocks_corrupt, 1U);
  bytes[at] ^= std::byte{4};
  EXPECT_TRUE(is_whole(*store, 1));
  // A sound extent of another item, of the same layer and head group.
  test::fill_extent(extent.bytes(), layout_, 2, {LayerIndex{0}, HeadGroup{1}, 0});
  std::copy(extent.bytes().begin(), extent.bytes().end(), bytes.begin() + place);
  verdict = read_item(*store, layout_, 1);
  EXPECT_EQ(verdict.bad_blocks, layout_.blocks_per_extent());
  EXPECT_FALSE(verdict.wrong);
  drive_.read_failure = io_error("injected eio");
  verdict = read_item(*store, layout_, 2);
  EXPECT_EQ(verdict.status.code(), StatusCode::kIoError);
  EXPECT_GT(store->stats().read_failures, 0U);
  drive_.read_failure = Status();
  // A file that was cut short while it is open.
  bytes.resize(SegmentHeader::kDataOffset);
  verdict = read_item(*store, layout_, 2);
  EXPECT_TRUE(verdict.found);
  EXPECT_EQ(verdict.status.code(), StatusCode::kIoError);
  EXPECT_THAT(verdict.status.message(), HasSubstr("came short"));
  EXPECT_TRUE(store->close().ok());
}

TEST_F(StoreTest, OtherSizesAndTooLittleRoomAreRefusedWithFigures) {
  drive_.free_bytes = kCapacity + 1000;
  StoreOptions options = test::store_options(kCapacity);
  options.free_bytes_min = 1 << 20;
  auto refused = Store::open(drive_.open(), options);
  ASSERT_FALSE(refused.ok());
  EXPECT_EQ(refused.status().code(), StatusCode::kNoSpace);
  EXPECT_THAT(refused.status().message(), HasSubstr("1048576 B are to stay free"));
  EXPECT_TRUE(drive_.files().empty());
  drive_.free_bytes = 8 << 20;
  auto store = open(options);
  EXPECT_TRUE(store->close().ok());
  drive_.free_bytes = 1 << 19;
  EXPECT_EQ(Store::open(drive_.open(), options).status().code(), StatusCode::kNoSpace);
  drive_.free_bytes = 8 << 20;
  options.capacity_bytes = 2 * kCapacity;
  refused = Store::open(drive_.open(), options);
  EXPECT_EQ(refused.status().code(), StatusCode::kUnsupported);
  options.capacity_bytes = 0;
  store = open(options);
  EXPECT_TRUE(store->close().ok());
  EXPECT_EQ(Store::open(drive_.open(), test::store_options(1000)).status().code(),
            StatusCode::kUnsupported);
  drive_.files().clear();
  EXPECT_EQ(Store::open(drive_.open(), test::store_options(1000)).status().code(),
            StatusCode::kInvalidArgument);
}

TEST_F(StoreTest, ALostSegmentIsMadeAnewAndTheRestStays) {
  StoreOptions options = test::store_options(kCapacity);
  options.segment_bytes = 1 << 20;
  auto store = open(options);
  for (std::uint64_t number = 1; number <= 12; ++number) {
    ASSERT_TRUE(put_item(*store, layout_, number).ok());
  }
  ASSERT_TRUE(store->close().ok());
  drive_.files().erase("segment-0001");
  EXPECT_EQ(Store::open(drive_.open(), {.read_only = true}).status().code(), StatusCode::kIoError);
  store = open(options);
  EXPECT_THAT(store->notice(), HasSubstr("segment-0001 is missing"));
  std::uint32_t whole = 0;
  for (std::uint64_t number = 1; number <= 12; ++number) {
    const ItemVerdict verdict = read_item(*store, layout_, number);
    EXPECT_FALSE(verdict.wrong);
    whole += verdict.whole;
  }
  EXPECT_GE(whole, 3U);
  EXPECT_LT(whole, 12U);
  EXPECT_TRUE(store->close().ok());
  // The first page of a header is damaged: its copy serves.
  drive_.files()["segment-0000"].written[20] ^= std::byte{1};
  drive_.files()["segment-0001"].written[20] ^= std::byte{1};
  drive_.files()["segment-0002"].written[20] ^= std::byte{1};
  store = open(options);
  EXPECT_EQ(store->stats().items, whole);
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
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
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
