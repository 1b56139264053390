#include "tests/transfer/aligned_buffer.h"
#include "tests/transfer/test_files.h"
#include "transfer/faulty_file.h"
#include "transfer/memory_file.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <numeric>
#include <set>
#include <thread>

// One contract (transfer/file.h), run over everything that claims to keep it.

namespace kvtier {
namespace file_contract {

using test::AlignedBuffer;
using test::fill_pattern;
using test::has_pattern;
using test::kPage;
using test::kPatience;
using test::OpenedFile;
using test::read_operation;
using test::run_all;
using test::run_one;
using test::write_operation;

constexpr std::uint32_t kDepth = 4;
constexpr std::size_t kPlace = 4 * kPage;
constexpr std::size_t kPlaces = 32;
constexpr std::uint64_t kFileBytes = kPlaces * kPlace;

struct Memory {
  static constexpr const char* kName = "memory";
  static OpenedFile open() { return test::open_memory(kFileBytes, kDepth); }
};
struct Uring {
  static constexpr const char* kName = "io_uring";
  static OpenedFile open() { return test::open_uring(kFileBytes, kDepth); }
};
struct Posix {
  static constexpr const char* kName = "posix";
  static OpenedFile open() { return test::open_posix(kFileBytes, kDepth); }
};
struct FaultyMemory {
  static constexpr const char* kName = "faulty(memory)";
  static OpenedFile open() { return test::wrap_faulty(Memory::open(), FaultPlan{}, nullptr); }
};
struct FaultyUring {
  static constexpr const char* kName = "faulty(io_uring)";
  static OpenedFile open() { return test::wrap_faulty(Uring::open(), FaultPlan{}, nullptr); }
};

struct FaultyPosix {
  static constexpr const char* kName = "faulty(posix)";
  static OpenedFile open() { return test::wrap_faulty(Posix::open(), FaultPlan{}, nullptr); }
};

template <typename Kind>
class FileContractTest : public ::testing::Test {
 protected:
  void SetUp() override {
    OpenedFile opened = Kind::open();
    if (opened.file == nullptr) GTEST_SKIP() << opened.refusal;
    file_ = std::move(opened.file);
  }

  void TearDown() override {
    if (file_ != nullptr) {
      EXPECT_TRUE(file_->close().ok());
    }
  }

  std::unique_ptr<File> file_;
};

struct KindName {
  template <typename Kind>
  static std::string GetName(int) {
    std::string name = Kind::kName;
    std::replace_if(
        name.begin(), name.end(), [](char c) { return c == '(' || c == ')'; }, '_');
    return name;
  }
};

using Kinds = ::testing::Types<Memory, Uring, Posix, FaultyMemory, FaultyUring, FaultyPosix>;
TYPED_TEST_SUITE(FileContractTest, Kinds, KindName);

TYPED_TEST(FileContractTest, SaysWhatItIs) {
  EXPECT_EQ(this->file_->traits().backend, TypeParam::kName);
  EXPECT_EQ(this->file_->traits().queue_depth, kDepth);
  EXPECT_EQ(this->file_->traits().alignment, kPage);
  EXPECT_EQ(this->file_->size_bytes(), kFileBytes);
}

TYPED_TEST(FileContractTest, ReadsBackWhatWasWritten) {
  AlignedBuffer buffer(kPlace);
  for (const std::size_t place : {std::size_t{0}, std::size_t{7}, kPlaces - 1}) {
    fill_pattern(buffer.bytes(), place);
    FileOperation write = write_operation(place * kPlace, buffer.bytes());
    run_one(*this->file_, write);
    ASSERT_TRUE(write.status.ok()) << write.status.to_string();
    EXPECT_EQ(write.transferred, kPlace);
    EXPECT_TRUE(has_pattern(buffer.bytes(), place)) << "a write changed its source";
  }
  EXPECT_TRUE(this->file_->sync().ok());
  for (const std::size_t place : {kPlaces - 1, std::size_t{0}, std::size_t{7}}) {
    fill_pattern(buffer.bytes(), 12345);
    FileOperation read = read_operation(place * kPlace, buffer.bytes());
    run_one(*this->file_, read);
    ASSERT_TRUE(read.status.ok()) << read.status.to_string();
    EXPECT_EQ(read.transferred, kPlace);
    EXPECT_TRUE(has_pattern(buffer.bytes(), place)) << "place " << place;
  }
}

TYPED_TEST(FileContractTest, StartsAsZeros) {
  AlignedBuffer buffer(kPlace);
  fill_pattern(buffer.bytes(), 1);
  FileOperation read = read_operation(3 * kPlace, buffer.bytes());
  run_one(*this->file_, read);
  ASSERT_TRUE(read.status.ok()) << read.status.to_string();
  EXPECT_TRUE(std::all_of(buffer.bytes().begin(), buffer.bytes().end(),
                          [](std::byte byte) { return byte == std::byte{0}; }));
}

TYPED_TEST(FileContractTest, BatchLargerThanTheQueueIsAcceptedInPartsAndEndsOnce) {
  AlignedBuffer memory(kFileBytes);
  std::vector<FileOperation> operations;
  for (std::size_t place = 0; place < kPlaces; ++place) {
    fill_pattern(memory.part(place * kPlace, kPlace), place);
    operations.push_back(write_operation(place * kPlace, memory.part(place * kPlace, kPlace)));
  }
  const auto finished = run_all(*this->file_, operations);
  EXPECT_EQ(std::set<FileOperation*>(finished.begin(), finished.end()).size(), kPlaces);

  AlignedBuffer back(kFileBytes);
  for (std::size_t place = 0; place < kPlaces; ++place) {
    operations[place] = read_operation(place * kPlace, back.part(place * kPlace, kPlace));
    operations[place].owner = &operations[place];
  }
  for (FileOperation* read : run_all(*this->file_, operations)) {
    EXPECT_EQ(read->owner, read) << "the owner's pointer was changed";
    ASSERT_TRUE(read->status.ok()) << read->status.to_string();
    EXPECT_TRUE(has_pattern(read->buffer, read->offset / kPlace));
  }
}

TYPED_TEST(FileContractTest, NeverAcceptsMoreThanTheQueueHolds) {
  AlignedBuffer memory(2 * kDepth * kPage);
  std::vector<FileOperation> operations;
  std::vector<FileOperation*> pointers;
  for (std::size_t i = 0; i < 2 * kDepth; ++i) {
    operations.push_back(read_operation(i * kPage, memory.part(i * kPage, kPage)));
  }
  for (FileOperation& operation : operations) pointers.push_back(&operation);
  const std::span<FileOperation* const> all = pointers;

  EXPECT_EQ(this->file_->submit(all.first(1)), 1U);
  EXPECT_EQ(this->file_->submit(all.subspan(1)), kDepth - 1);
  EXPECT_EQ(this->file_->submit(all.subspan(kDepth)), 0U);
  std::array<FileOperation*, 1> one{};
  ASSERT_EQ(this->file_->reap(one, kPatience), 1U);
  EXPECT_EQ(this->file_->submit(all.subspan(kDepth)), 1U) << "one place is free again";
  std::size_t reaped = 1;
  while (reaped < kDepth + 1) reaped += this->file_->reap(one, kPatience);
  EXPECT_EQ(this->file_->reap(one, kPatience), 0U);
}

TYPED_TEST(FileContractTest, ReapsInAnyPortionsWithoutLosingOne) {
  AlignedBuffer memory(kDepth * kPage);
  std::vector<FileOperation> operations;
  for (std::size_t i = 0; i < kDepth; ++i) {
    operations.push_back(read_operation(i * kPage, memory.part(i * kPage, kPage)));
  }
  std::vector<FileOperation*> pointers;
  for (FileOperation& operation : operations) pointers.push_back(&operation);
  ASSERT_EQ(this->file_->submit(pointers), kDepth);
  std::set<FileOperation*> seen;
  std::array<FileOperation*, 3> some{};
  while (seen.size() < kDepth) {
    const std::size_t count = this->file_->reap(some, kPatience);
    ASSERT_LE(count, some.size());
    for (std::size_t i = 0; i < count; ++i) {
      EXPECT_TRUE(seen.insert(some[i]).second);
    }
  }
}

TYPED_TEST(FileContractTest, ReapWithNothingInFlightReturnsAtOnce) {
  std::array<FileOperation*, 4> done{};
  // An hour: a file that waits here does not come back within the test's limit.
  EXPECT_EQ(this->file_->reap(done, std::chrono::hours(1)), 0U);
}

TYPED_TEST(FileContractTest, ReapWithoutTimeoutDoesNotWait) {
  AlignedBuffer buffer(kPage);
  FileOperation read = read_operation(0, buffer.bytes());
  FileOperation* const pointer = &read;
  ASSERT_EQ(this->file_->submit({&pointer, 1}), 1U);
  std::array<FileOperation*, 1> done{};
  std::size_t reaped = 0;
  while (reaped == 0) reaped = this->file_->reap(done, Duration::zero());
  EXPECT_EQ(done[0], &read);
}

TYPED_TEST(FileContractTest, CancelledOperationsReachATerminalState) {
  AlignedBuffer memory(kDepth * kPlace);
  std::vector<FileOperation> operations;
  std::vector<FileOperation*> pointers;
  for (std::size_t i = 0; i < kDepth; ++i) {
    operations.push_back(read_operation(i * kPlace, memory.part(i * kPlace, kPlace)));
  }
  for (FileOperation& operation : operations) pointers.push_back(&operation);
  for (int round = 0; round < 20; ++round) {
    ASSERT_EQ(this->file_->submit(pointers), kDepth);
    for (FileOperation& operation : operations) this->file_->cancel(&operation);
    std::size_t reaped = 0;
    std::array<FileOperation*, kDepth> done{};
    while (reaped < kDepth) {
      const std::size_t count = this->file_->reap(done, kPatience);
      for (FileOperation* operation : std::span(done).first(count)) {
        if (operation->status.ok()) {
          EXPECT_EQ(operation->transferred, kPlace);
        } else {
          EXPECT_EQ(operation->status.code(), StatusCode::kCancelled);
        }
      }
      reaped += count;
    }
  }
}

TYPED_TEST(FileContractTest, ReadsAtTheEndAreShort) {
  AlignedBuffer buffer(kPlace);
  FileOperation crossing = read_operation(kFileBytes - kPage, buffer.bytes());
  run_one(*this->file_, crossing);
  ASSERT_TRUE(crossing.status.ok()) << crossing.status.to_string();
  EXPECT_EQ(crossing.transferred, kPage);
  FileOperation behind = read_operation(kFileBytes, buffer.bytes());
  run_one(*this->file_, behind);
  ASSERT_TRUE(behind.status.ok()) << behind.status.to_string();
  EXPECT_EQ(behind.transferred, 0U);
}

TYPED_TEST(FileContractTest, WritesAcrossTheEndStoreNothing) {
  AlignedBuffer buffer(2 * kPage);
  fill_pattern(buffer.bytes(), 7);
  FileOperation write = write_operation(kFileBytes - kPage, buffer.bytes());
  run_one(*this->file_, write);
  EXPECT_EQ(write.status.code(), StatusCode::kIoError);
  EXPECT_NE(write.status.message().find("crosses the end"), std::string::npos)
      << write.status.message();
  FileOperation read = read_operation(kFileBytes - kPage, buffer.part(0, kPage));
  run_one(*this->file_, read);
  EXPECT_FALSE(has_pattern(buffer.part(0, kPage), 7));
}

TYPED_TEST(FileContractTest, RegisteredAndOtherMemoryWorkSideBySide) {
  AlignedBuffer registered(4 * kPlace);
  AlignedBuffer other(kPlace);
  const std::array<std::span<std::byte>, 2> ranges = {registered.part(2 * kPlace, 2 * kPlace),
                                                      registered.part(0, kPlace)};
  ASSERT_TRUE(this->file_->register_buffers(ranges).ok());
  // Inside a range, at its end, between two ranges, across the border of one, and outside of all.
  const std::array<std::span<std::byte>, 5> buffers = {
      registered.part(2 * kPlace, kPlace), registered.part(3 * kPlace, kPlace),
      registered.part(kPlace, kPlace), registered.part(kPlace + kPage, kPlace), other.bytes()};
  for (std::size_t i = 0; i < buffers.size(); ++i) {
    fill_pattern(buffers[i], i);
    FileOperation write = write_operation(i * kPlace, buffers[i]);
    run_one(*this->file_, write);
    ASSERT_TRUE(write.status.ok()) << i << ": " << write.status.to_string();
    fill_pattern(buffers[i], 99);
    FileOperation read = read_operation(i * kPlace, buffers[i]);
    run_one(*this->file_, read);
    ASSERT_TRUE(read.status.ok()) << i << ": " << read.status.to_string();
    EXPECT_TRUE(has_pattern(buffers[i], i)) << "buffer " << i;
  }
}

TYPED_TEST(FileContractTest, WakeEndsAWaitAndHarmsNothing) {
  AlignedBuffer buffer(kPage);
  std::thread other([this] {
    for (int i = 0; i < 1000; ++i) this->file_->wake();
  });
  for (int round = 0; round < 50; ++round) {
    FileOperation read = read_operation(0, buffer.bytes());
    run_one(*this->file_, read);
    EXPECT_TRUE(read.status.ok());
  }
  other.join();
}

TYPED_TEST(FileContractTest, MisalignedOperationsAreBugs) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  AlignedBuffer buffer(2 * kPage);
  FileOperation read = read_operation(512, buffer.part(0, kPage));
  EXPECT_DEATH(run_one(*this->file_, read), "not aligned");
}

}  // namespace file_contract
}  // namespace kvtier
