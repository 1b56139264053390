#include "tests/transfer/aligned_buffer.h"
#include "tests/transfer/test_files.h"
#include "transfer/transfer_engine.h"

#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <cstdlib>
#include <new>

// Counts what the whole process allocates: every thread of engine and file is included.

namespace {

std::atomic<std::uint64_t> g_allocations{0};

void* counted(std::size_t bytes, std::size_t alignment) {
  g_allocations.fetch_add(1, std::memory_order_relaxed);
  void* const memory =
      alignment <= alignof(std::max_align_t)
          ? std::malloc(bytes == 0 ? 1 : bytes)
          : std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

}  // namespace

void* operator new(std::size_t bytes) { return counted(bytes, 1); }
void* operator new(std::size_t bytes, std::align_val_t alignment) {
  return counted(bytes, static_cast<std::size_t>(alignment));
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept { std::free(memory); }

namespace kvtier {
namespace {

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
  const std::uint64_t before = g_allocations.load();
  for (int round = 0; round < 50; ++round) one_round(**engine, host.bytes(), spans);
  (*engine)->drain();
  EXPECT_EQ(g_allocations.load() - before, 0U);
  EXPECT_TRUE((*engine)->close().ok());
  EXPECT_TRUE(opened.file->close().ok());
}

TEST(AllocationCounterTest, CountsThisTestsOwnAllocations) {
  const std::uint64_t before = g_allocations.load();
  // Called by name: a new-expression that is deleted again may be optimised away.
  void* const memory = ::operator new(64);
  const std::uint64_t after = g_allocations.load();
  ::operator delete(memory);
  EXPECT_GT(after, before) << "a counter that does not count proves nothing";
}

}  // namespace
}  // namespace kvtier
