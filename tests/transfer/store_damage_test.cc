// What a store does about damage, failing drives and files that others take away.

#include "tests/transfer/store_on_drive.h"
#include "transfer/extent_format.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>

namespace kvtier {
namespace store_damage {

using test::AlignedBuffer;
using test::ItemVerdict;
using test::key_of;
using test::put_item;
using test::read_item;
using testing::HasSubstr;

using StoreDamageTest = test::StoreOnDrive;
constexpr std::uint64_t kCapacity = test::StoreOnDrive::kCapacity;

TEST_F(StoreDamageTest, TheIndexIsRebuiltWhenItIsMissingOrDamaged) {
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

TEST_F(StoreDamageTest, AFailedWriteMakesNothingVisibleAndTheStoreGoesOn) {
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

TEST_F(StoreDamageTest, DamageIsNamedBlockByBlock) {
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

TEST_F(StoreDamageTest, OtherSizesAndTooLittleRoomAreRefusedWithFigures) {
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

TEST_F(StoreDamageTest, ALostSegmentIsMadeAnewAndTheRestStays) {
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

TEST_F(StoreDamageTest, AStoreWhoseMakingWasCutOffIsMadeAnew) {
  for (const std::size_t bytes : {0ul, 4096ul, 1ul << 20}) {
    drive_.files().clear();
    drive_.files()["segment-0000"].written.resize(bytes);
    auto store = open();
    ASSERT_TRUE(put_item(*store, layout_, 1).ok());
    EXPECT_TRUE(is_whole(*store, 1));
    EXPECT_TRUE(store->close().ok());
  }
  // What has content is not taken for that.
  drive_.files().clear();
  drive_.files()["segment-0000"].written.resize(1 << 20, std::byte{7});
  EXPECT_EQ(Store::open(drive_.open(), test::store_options(kCapacity)).status().code(),
            StatusCode::kCorrupt);
}

}  // namespace store_damage
}  // namespace kvtier
