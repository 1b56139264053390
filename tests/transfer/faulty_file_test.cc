#include "transfer/faulty_file.h"

#include "tests/transfer/aligned_buffer.h"
#include "tests/transfer/test_files.h"
#include "transfer/link.h"
#include "transfer/memory_file.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <bit>
#include <map>
#include <random>

namespace kvtier {
namespace {

using test::AlignedBuffer;
using test::fill_pattern;
using test::has_pattern;
using test::kPage;
using test::kPatience;
using test::read_operation;
using test::run_all;
using test::run_one;
using test::write_operation;

constexpr std::size_t kPlace = 2 * kPage;
constexpr std::size_t kPlaces = 64;
constexpr std::uint64_t kFileBytes = kPlaces * kPlace;
constexpr std::uint32_t kDepth = 16;

FaultPlan plan_of(FaultKind kind, double rate, std::uint64_t seed = 1) {
  FaultPlan plan;
  plan.disk_rate[static_cast<std::size_t>(kind)] = rate;
  plan.seed = seed;
  return plan;
}

std::uint64_t fired(const FaultCounts& counts, FaultKind kind) {
  return counts.fired[static_cast<std::size_t>(kind)].load();
}

// A file in memory whose places hold their patterns, under a plan.
class FaultyStore {
 public:
  explicit FaultyStore(const FaultPlan& plan) {
    auto memory = std::make_unique<MemoryFile>(
        MemoryFile::Options{.bytes = kFileBytes, .queue_depth = kDepth});
    stored = memory->bytes();
    for (std::size_t place = 0; place < kPlaces; ++place) fill_pattern(at(place), place);
    file = std::make_unique<FaultyFile>(std::move(memory), plan, &counts);
  }
  ~FaultyStore() { EXPECT_TRUE(file->close().ok()); }

  std::span<std::byte> at(std::size_t place) const {
    return stored.subspan(place * kPlace, kPlace);
  }

  FaultCounts counts;
  std::span<std::byte> stored;
  std::unique_ptr<File> file;
};

std::size_t different_bits(std::span<const std::byte> bytes, std::uint64_t key) {
  AlignedBuffer expected(bytes.size());
  fill_pattern(expected.bytes(), key);
  std::size_t bits = 0;
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    bits += static_cast<std::size_t>(
        std::popcount(static_cast<unsigned char>(bytes[i] ^ expected.bytes()[i])));
  }
  return bits;
}

TEST(FaultyFileTest, EveryKindFiresAtAboutItsRate) {
  constexpr int kRounds = 40;
  for (int i = 0; i < kFaultKindCount; ++i) {
    const auto kind = static_cast<FaultKind>(i);
    FaultyStore store(plan_of(kind, 0.1));
    AlignedBuffer buffer(kPlace);
    for (int round = 0; round < kRounds; ++round) {
      for (std::size_t place = 0; place < kPlaces; ++place) {
        FileOperation read = read_operation(place * kPlace, buffer.bytes());
        run_one(*store.file, read);
        fill_pattern(buffer.bytes(), place);
        FileOperation write = write_operation(place * kPlace, buffer.bytes());
        run_one(*store.file, write);
      }
    }
    // 2560 reads and as many writes, of which one kind (for delay: both) are tried at 0.1. Six
    // standard deviations of a binomial are 91 (129 for delay).
    const double expected = kind == FaultKind::kDelay ? 512 : 256;
    EXPECT_NEAR(static_cast<double>(fired(store.counts, kind)), expected,
                kind == FaultKind::kDelay ? 129 : 91)
        << to_string(kind);
  }
}

TEST(FaultyFileTest, BitFlipDamagesOneReadAndNotTheStore) {
  FaultyStore store(plan_of(FaultKind::kBitFlip, 1.0));
  AlignedBuffer buffer(kPlace);
  FileOperation read = read_operation(3 * kPlace, buffer.bytes());
  run_one(*store.file, read);
  EXPECT_TRUE(read.status.ok());
  EXPECT_EQ(read.transferred, kPlace);
  EXPECT_EQ(different_bits(buffer.bytes(), 3), 1U);
  EXPECT_TRUE(has_pattern(store.at(3), 3));
}

TEST(FaultyFileTest, RotDamagesTheStoreAndNotTheSource) {
  FaultyStore store(plan_of(FaultKind::kRot, 1.0));
  AlignedBuffer buffer(kPlace);
  fill_pattern(buffer.bytes(), 500);
  FileOperation write = write_operation(3 * kPlace, buffer.bytes());
  run_one(*store.file, write);
  EXPECT_TRUE(write.status.ok());
  EXPECT_EQ(write.transferred, kPlace);
  EXPECT_TRUE(has_pattern(buffer.bytes(), 500));
  EXPECT_EQ(different_bits(store.at(3), 500), 1U);
}

TEST(FaultyFileTest, ShortReadIsShortAndDoesNotLookWhole) {
  FaultyStore store(plan_of(FaultKind::kShortRead, 1.0));
  AlignedBuffer buffer(kPlace);
  for (std::size_t place = 0; place < kPlaces; ++place) {
    // Holds the right bytes already: only a trace of the fault may be left behind its end.
    fill_pattern(buffer.bytes(), place);
    FileOperation read = read_operation(place * kPlace, buffer.bytes());
    run_one(*store.file, read);
    ASSERT_TRUE(read.status.ok());
    ASSERT_LT(read.transferred, kPlace);
    EXPECT_FALSE(has_pattern(buffer.bytes(), place));
  }
}

TEST(FaultyFileTest, ErrorsAreMarkedAsInjected) {
  struct Case {
    FaultKind kind;
    StatusCode code;
  };
  for (const Case& expected : {Case{FaultKind::kIoError, StatusCode::kIoError},
                               Case{FaultKind::kWriteError, StatusCode::kIoError},
                               Case{FaultKind::kNoSpace, StatusCode::kNoSpace}}) {
    FaultyStore store(plan_of(expected.kind, 1.0));
    AlignedBuffer buffer(kPlace);
    fill_pattern(buffer.bytes(), 700);
    FileOperation operation = read_operation(kPlace, buffer.bytes());
    if (expected.kind != FaultKind::kIoError) operation.kind = FileOperation::Kind::kWrite;
    run_one(*store.file, operation);
    EXPECT_EQ(operation.status.code(), expected.code);
    EXPECT_NE(operation.status.message().find("injected"), std::string::npos);
    EXPECT_FALSE(has_pattern(store.at(1), 700)) << "a failed write is never whole";
    if (expected.kind == FaultKind::kNoSpace) {
      EXPECT_TRUE(has_pattern(store.at(1), 1));
    }
  }
}

TEST(FaultyFileTest, MisplacedReadReturnsAnotherWholePlace) {
  FaultyStore store(plan_of(FaultKind::kMisplaced, 1.0));
  AlignedBuffer buffer(kPlace);
  for (std::size_t place = 0; place < kPlaces; ++place) {
    FileOperation read = read_operation(place * kPlace, buffer.bytes());
    run_one(*store.file, read);
    ASSERT_TRUE(read.status.ok());
    EXPECT_EQ(read.transferred, kPlace);
    EXPECT_EQ(read.offset, place * kPlace) << "the caller's operation was changed";
    EXPECT_FALSE(has_pattern(buffer.bytes(), place));
    std::size_t matches = 0;
    for (std::size_t other = 0; other < kPlaces; ++other) {
      if (has_pattern(buffer.bytes(), other)) ++matches;
    }
    EXPECT_EQ(matches, 1U) << "the bytes of exactly one other place";
  }
}

TEST(FaultyFileTest, LostWriteClaimsSuccessAndStoresNothing) {
  FaultyStore store(plan_of(FaultKind::kLostWrite, 1.0));
  AlignedBuffer buffer(kPlace);
  fill_pattern(buffer.bytes(), 700);
  FileOperation write = write_operation(kPlace, buffer.bytes());
  run_one(*store.file, write);
  EXPECT_TRUE(write.status.ok());
  EXPECT_EQ(write.transferred, kPlace);
  EXPECT_TRUE(has_pattern(store.at(1), 1));
}

TEST(FaultyFileTest, DelayReordersAndNeverLoses) {
  FaultyStore store(plan_of(FaultKind::kDelay, 0.5));
  AlignedBuffer memory(kFileBytes);
  std::vector<FileOperation> reads;
  for (std::size_t place = 0; place < kPlaces; ++place) {
    reads.push_back(read_operation(place * kPlace, memory.part(place * kPlace, kPlace)));
  }
  const auto order = run_all(*store.file, reads);
  ASSERT_EQ(order.size(), kPlaces);
  EXPECT_FALSE(std::is_sorted(order.begin(), order.end()));
  for (std::size_t place = 0; place < kPlaces; ++place) {
    EXPECT_TRUE(has_pattern(reads[place].buffer, place));
  }
}

TEST(FaultyFileTest, DelayAloneInFlightComesOutInOneReap) {
  FaultyStore store(plan_of(FaultKind::kDelay, 1.0));
  AlignedBuffer buffer(kPlace);
  FileOperation read = read_operation(0, buffer.bytes());
  FileOperation* const pointer = &read;
  ASSERT_EQ(store.file->submit({&pointer, 1}), 1U);
  std::array<FileOperation*, 4> done{};
  EXPECT_EQ(store.file->reap(done, kPatience), 1U);
}

// What each (place, use) got, as text.
std::map<std::pair<std::uint64_t, int>, std::string> outcomes(const FaultPlan& plan,
                                                              std::uint64_t order_seed) {
  FaultyStore store(plan);
  std::map<std::pair<std::uint64_t, int>, std::string> results;
  std::mt19937_64 random(order_seed);
  for (int use = 0; use < 4; ++use) {
    AlignedBuffer memory(kFileBytes);
    std::vector<FileOperation> reads;
    for (std::size_t place = 0; place < kPlaces; ++place) {
      reads.push_back(read_operation(place * kPlace, memory.part(place * kPlace, kPlace)));
    }
    std::shuffle(reads.begin(), reads.end(), random);
    run_all(*store.file, reads);
    for (const FileOperation& read : reads) {
      results[{read.offset, use}] =
          fmt::format("{} {} {}", read.status.to_string(), read.transferred,
                      different_bits(read.buffer, read.offset / kPlace));
    }
  }
  return results;
}

TEST(FaultyFileTest, DecisionsFollowTheSeedAndNotTheOrder) {
  auto plan = FaultPlan::parse("bitflip:0.2,shortread:0.2,eio:0.2,misplaced:0.2,delay:0.3,seed=5");
  ASSERT_TRUE(plan.ok());
  const auto first = outcomes(*plan, 1);
  EXPECT_EQ(first, outcomes(*plan, 1));
  EXPECT_EQ(first, outcomes(*plan, 2)) << "the order of submission changed a decision";
  plan->seed = 6;
  EXPECT_NE(first, outcomes(*plan, 1)) << "the seed changes nothing";
}

TEST(FaultyFileTest, RetryDrawsAnew) {
  FaultyStore store(plan_of(FaultKind::kIoError, 0.5));
  AlignedBuffer buffer(kPlace);
  int failures = 0;
  for (int i = 0; i < 100; ++i) {
    FileOperation read = read_operation(0, buffer.bytes());
    run_one(*store.file, read);
    failures += read.status.ok() ? 0 : 1;
  }
  EXPECT_GT(failures, 20);
  EXPECT_LT(failures, 80);
}

// Copies `count` different contents in the given order; which of them were damaged.
std::vector<bool> damaged_copies(const FaultPlan& plan, FaultCounts& counts, bool backwards) {
  constexpr std::size_t kCopies = 400;
  const auto link = make_faulty_link(make_memory_link(8), plan, &counts);
  AlignedBuffer source(kPage);
  AlignedBuffer target(kPage);
  std::vector<bool> damaged(kCopies);
  for (std::size_t i = 0; i < kCopies; ++i) {
    const std::size_t key = backwards ? kCopies - 1 - i : i;
    fill_pattern(source.bytes(), key);
    const std::array<CopySpan, 2> spans = {
        CopySpan{source.bytes().data(), target.bytes().data() + 1024, 1024},
        CopySpan{source.bytes().data() + 1024, target.bytes().data(), 1024}};
    LinkOperation copy;
    copy.spans = spans;
    LinkOperation* const pointer = &copy;
    EXPECT_EQ(link->submit({&pointer, 1}), 1U);
    std::array<LinkOperation*, 1> done{};
    EXPECT_EQ(link->reap(done, kPatience), 1U);
    EXPECT_TRUE(copy.status.ok());
    EXPECT_EQ(copy.transferred, 2048U);
    AlignedBuffer swapped(kPage);
    std::copy_n(target.bytes().data() + 1024, 1024, swapped.bytes().data());
    std::copy_n(target.bytes().data(), 1024, swapped.bytes().data() + 1024);
    damaged[key] = !has_pattern(swapped.part(0, 2048), key);
    EXPECT_TRUE(has_pattern(source.bytes(), key)) << "a copy changed its source";
  }
  return damaged;
}

TEST(FaultyLinkTest, FlipsBitsByContentAndSeed) {
  FaultPlan plan;
  plan.link_bitflip_rate = 0.1;
  plan.seed = 3;
  FaultCounts counts;
  const auto first = damaged_copies(plan, counts, false);
  const auto hit = std::count(first.begin(), first.end(), true);
  // 40 expected; five standard deviations are 30.
  EXPECT_NEAR(static_cast<double>(hit), 40, 30);
  EXPECT_EQ(static_cast<std::uint64_t>(hit), fired(counts, FaultKind::kBitFlip));
  EXPECT_EQ(first, damaged_copies(plan, counts, true));
  plan.link_bitflip_rate = 0;
  const auto none = damaged_copies(plan, counts, false);
  EXPECT_EQ(std::count(none.begin(), none.end(), true), 0);
}

}  // namespace
}  // namespace kvtier
