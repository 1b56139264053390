#include "memory/region.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

namespace kvtier {
namespace {

constexpr std::size_t kMebibyte = std::size_t{1} << 20;

std::size_t page_bytes() { return static_cast<std::size_t>(sysconf(_SC_PAGESIZE)); }

// How many of the region's pages are in memory.
std::size_t pages_present(std::span<const std::byte> memory) {
  std::vector<unsigned char> present((memory.size() + page_bytes() - 1) / page_bytes());
  auto* start = const_cast<std::byte*>(memory.data());
  if (mincore(start, memory.size(), present.data()) != 0) return 0;
  return static_cast<std::size_t>(
      std::count_if(present.begin(), present.end(), [](unsigned char page) { return page & 1; }));
}

TEST(Region, IsZeroedAlignedAndTouched) {
  for (std::size_t bytes : {std::size_t{1}, std::size_t{4096}, 3 * kMebibyte, 5 * kMebibyte + 17}) {
    for (bool huge_pages : {false, true}) {
      auto region = Region::allocate({.bytes = bytes, .huge_pages = huge_pages});
      ASSERT_TRUE(region.ok()) << region.status().to_string();
      ASSERT_EQ(region->bytes().size(), bytes);
      EXPECT_EQ(reinterpret_cast<std::uintptr_t>(region->bytes().data()) % page_bytes(), 0u);
      EXPECT_EQ(pages_present(region->bytes()), (bytes + page_bytes() - 1) / page_bytes());
      EXPECT_TRUE(std::all_of(region->bytes().begin(), region->bytes().end(),
                              [](std::byte byte) { return byte == std::byte{0}; }));
      std::fill(region->bytes().begin(), region->bytes().end(), std::byte{0xA5});
      EXPECT_EQ(region->bytes().back(), std::byte{0xA5});
    }
  }
}

TEST(Region, StatsSayWhatWasGiven) {
  auto region = Region::allocate({.bytes = 4 * kMebibyte, .page_lock = true});
  ASSERT_TRUE(region.ok()) << region.status().to_string();
  const RegionStats& stats = region->stats();
  EXPECT_EQ(stats.bytes, 4 * kMebibyte);
  EXPECT_LE(stats.huge_page_bytes, 4 * kMebibyte);
  // What was asked for and not given must stand in the note; what was given must not.
  EXPECT_EQ(!stats.page_locked, stats.note.find("page-locking refused") != std::string::npos);
  EXPECT_EQ(!stats.numa_node.has_value(), stats.note.find("NUMA") != std::string::npos ||
                                              stats.note.find("hwloc") != std::string::npos);
}

TEST(Region, NodeThatIsNotThereIsNotedAndMemoryGivenAnyway) {
  auto region = Region::allocate({.bytes = kMebibyte, .numa_node = 4095u});
  ASSERT_TRUE(region.ok()) << region.status().to_string();
  EXPECT_FALSE(region->stats().numa_node.has_value());
  EXPECT_THAT(region->stats().note, testing::HasSubstr("binding to NUMA node 4095 refused"));
  EXPECT_EQ(pages_present(region->bytes()), kMebibyte / page_bytes());
}

TEST(Region, AbsurdSizesAreRefused) {
  constexpr std::size_t kMost = std::numeric_limits<std::size_t>::max();
  for (std::size_t bytes : {kMost, kMost - 4096, kMost / 2 + 1, std::size_t{1} << 50}) {
    for (bool huge_pages : {false, true}) {
      auto region = Region::allocate({.bytes = bytes, .huge_pages = huge_pages});
      ASSERT_FALSE(region.ok()) << bytes;
      EXPECT_EQ(region.status().code(), StatusCode::kNoSpace);
      EXPECT_THAT(region.status().message(), testing::HasSubstr(std::to_string(bytes)));
      EXPECT_THAT(region.status().message(), testing::HasSubstr("choose a smaller capacity"));
    }
  }
}

TEST(Region, NothingIsRefused) {
  auto region = Region::allocate({.bytes = 0});
  ASSERT_FALSE(region.ok());
  EXPECT_EQ(region.status().code(), StatusCode::kInvalidArgument);
}

TEST(Region, MoveHandsTheMemoryOver) {
  Region first = Region::allocate({.bytes = kMebibyte}).value();
  std::byte* const memory = first.bytes().data();
  first.bytes()[5] = std::byte{42};
  Region second = std::move(first);
  EXPECT_EQ(second.bytes().data(), memory);
  EXPECT_EQ(second.bytes()[5], std::byte{42});

  Region third = Region::allocate({.bytes = 2 * kMebibyte}).value();
  third = std::move(second);
  EXPECT_EQ(third.bytes().data(), memory);
  EXPECT_EQ(third.bytes().size(), kMebibyte);
  EXPECT_EQ(third.bytes()[5], std::byte{42});
}

TEST(Region, ReleaseGivesThePagesBack) {
  std::byte* memory = nullptr;
  {
    Region region = Region::allocate({.bytes = kMebibyte, .huge_pages = false}).value();
    memory = region.bytes().data();
    ASSERT_EQ(pages_present({memory, kMebibyte}), kMebibyte / page_bytes());
  }
  EXPECT_EQ(pages_present({memory, kMebibyte}), 0u);
}

}  // namespace
}  // namespace kvtier
