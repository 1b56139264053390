#include "tests/allocation_counter.h"
#include "tests/transfer/aligned_buffer.h"
#include "tests/transfer/test_files.h"
#include "transfer/transfer_engine.h"

#include <gtest/gtest.h>

#include <array>

namespace kvtier {
namespace transfer_allocation {

using test::AlignedBuffer;
using test::kPage;
using test::OpenedFile;

constexpr std::size_t kPlaces = 16;

struct Setting {
  const char* name;
  bool threads;
  OpenedFile (*open)(std::uint64_t, std::uint32_t);
};

class TransferAllocationTest : public ::testing::TestWithParam<Setting> {};

INSTANTIATE_TEST_SUITE_P(All, TransferAllocationTest,
                         ::testing::Values(Setting{"inline_memory", false, test::open_memory},
                                           Setting{"inline_uring", false, test::open_uring},
                                           Setting{"threads_memory", true, test::open_memory},
                                           Setting{"threads_uring", true, test::open_uring},
                                           Setting{"threads_posix", true, test::open_posix}),
                         [](const auto& info) { return info.param.name; });

// One round over all routes, with more transfers than there are records.
void one_round(TransferEngine& engine, std::span<std::byte> host, std::span<const CopySpan> spans) {
  std::array<Transfer, kPlaces> transfers;
  for (int route = 0; route < kRouteCount; ++route) {
    for (std::size_t i = 0; i < kPlaces; ++i) {
      TransferRequest request{.route = static_cast<Route>(route),
                              .priority = static_cast<Priority>(i % kPriorityCount),
                              .offset = i * kPage,
                              .buffer = host.subspan(i * kPage, kPage),
                              .spans = spans};
      auto submitted = engine.submit(request);
      if (!submitted.ok()) {
        ASSERT_EQ(submitted.status().code(), StatusCode::kBusy);
        continue;
      }
      transfers[i] = std::move(submitted).value();
      if (i % 5 == 4) transfers[i] = Transfer();
    }
    for (Transfer& transfer : transfers) {
      if (transfer) {
        ASSERT_TRUE(transfer.wait().ok());
      }
    }
    // Those whose handles were dropped still use the memory that the next route reads.
    engine.drain();
  }
}

TEST_P(TransferAllocationTest, SteadyStateAllocatesNothing) {
  OpenedFile opened = GetParam().open(kPlaces * kPage, 4);
  if (opened.file == nullptr) GTEST_SKIP() << opened.refusal;
  const auto link = make_memory_link();
  SteadyClock clock;
  Timeline timeline(1 << 16);
  auto engine = TransferEngine::open(
      {.max_transfers = 12, .threads = GetParam().threads, .timeline = &timeline}, clock,
      opened.file.get(), link.get());
  ASSERT_TRUE(engine.ok());
  AlignedBuffer host(kPlaces * kPage);
  AlignedBuffer device(kPage);
  const std::array<CopySpan, 1> spans = {
      CopySpan{host.bytes().data(), device.bytes().data(), kPage}};
  one_round(**engine, host.bytes(), spans);
  (*engine)->drain();
  const std::uint64_t before = testing::allocation_count();
  for (int round = 0; round < 50; ++round) one_round(**engine, host.bytes(), spans);
  (*engine)->drain();
  EXPECT_EQ(testing::allocation_count() - before, 0U);
  EXPECT_TRUE((*engine)->close().ok());
  EXPECT_TRUE(opened.file->close().ok());
}

TEST(AllocationCounterTest, CountsThisTestsOwnAllocations) {
  const std::uint64_t before = testing::allocation_count();
  // Called by name: a new-expression that is deleted again may be optimised away.
  void* const memory = ::operator new(64);
  const std::uint64_t after = testing::allocation_count();
  ::operator delete(memory);
  EXPECT_GT(after, before) << "a counter that does not count proves nothing";
}

}  // namespace transfer_allocation
}  // namespace kvtier
