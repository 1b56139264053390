#include "tests/transfer/aligned_buffer.h"
#include "tests/transfer/test_files.h"
#include "transfer/transfer_engine.h"

#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <random>
#include <thread>
#include <vector>

// Several clients at once; every load is checked against the history of stores.

namespace kvtier {
namespace transfer_stress {

using test::AlignedBuffer;
using test::fill_pattern;
using test::has_pattern;
using test::kPage;
using test::OpenedFile;

constexpr std::size_t kPlace = 2 * kPage;
constexpr std::size_t kClients = 4;
constexpr std::size_t kPlacesPerClient = 16;
constexpr std::uint64_t kFileBytes = kClients * kPlacesPerClient * kPlace;
constexpr int kSteps = 400;
constexpr std::size_t kWindow = 4;
// Fewer than the clients want together, so that they meet `busy`, and one more than they can all
// hold while each waits for its last, so that somebody always gets on.
constexpr std::uint32_t kTransfersMax = kClients * (kWindow - 1) + 1;

OpenedFile open_faulty(std::uint64_t bytes, std::uint32_t queue_depth) {
  // Kinds that the engine must report or repair; those that lie are for the runtime's checksums.
  const auto plan =
      FaultPlan::parse("shortread:0.1,eio:0.02,writeeio:0.02,enospc:0.02,delay:0.3,seed=11");
  return test::wrap_faulty(test::open_memory(bytes, queue_depth), *plan, nullptr);
}

struct Setting {
  const char* name;
  OpenedFile (*open)(std::uint64_t, std::uint32_t);
};

// One client: its own places, its own memory, a window of transfers in flight.
class Client {
 public:
  Client(TransferEngine& engine, std::size_t number)
      : engine_(engine), first_place_(number * kPlacesPerClient), random_(number + 1) {
    history_.fill(kUnknown);
  }

  void run() {
    for (int step = 0; step < kSteps; ++step) {
      start(static_cast<std::size_t>(step) % kWindow);
    }
    for (std::size_t slot = 0; slot < kWindow; ++slot) finish(slot);
  }

  int loads() const { return loads_; }
  int wrong() const { return wrong_; }

 private:
  static constexpr std::uint64_t kUnknown = 0;

  struct Pending {
    Transfer transfer;
    std::size_t place = 0;
    bool is_store = false;
    std::uint64_t version = kUnknown;
  };

  std::span<std::byte> memory(std::size_t slot) const {
    return memory_.part(slot * kPlace, kPlace);
  }

  void start(std::size_t slot) {
    finish(slot);
    Pending& pending = pending_[slot];
    // A place belongs to one slot: nothing else may be under way there.
    pending.place = random_() % (kPlacesPerClient / kWindow) * kWindow + slot;
    pending.is_store = history_[pending.place] == kUnknown || random_() % 2 == 0;
    pending.version = pending.is_store ? ++versions_ : history_[pending.place];
    if (pending.is_store) {
      fill_pattern(memory(slot), key(pending));
    } else {
      fill_pattern(memory(slot), 0);
    }
    while (true) {
      auto submitted =
          engine_.submit({.route = pending.is_store ? Route::kHostToDisk : Route::kDiskToHost,
                          .priority = static_cast<Priority>(random_() % 3),
                          .offset = (first_place_ + pending.place) * kPlace,
                          .buffer = memory(slot),
                          .spans = {}});
      if (submitted.ok()) {
        pending.transfer = std::move(submitted).value();
        break;
      }
      std::this_thread::yield();
    }
    if (random_() % 16 == 0) pending.transfer.cancel();
  }

  void finish(std::size_t slot) {
    Pending& pending = pending_[slot];
    if (!pending.transfer) return;
    const Status status = pending.transfer.wait();
    if (pending.is_store) {
      // What a failed or cancelled store left behind is anybody's guess.
      history_[pending.place] = status.ok() ? pending.version : kUnknown;
    } else if (status.ok()) {
      ++loads_;
      if (!has_pattern(memory(slot), key(pending))) ++wrong_;
    }
  }

  std::uint64_t key(const Pending& pending) const {
    return (first_place_ + pending.place) * 1000000 + pending.version;
  }

  TransferEngine& engine_;
  const std::size_t first_place_;
  std::mt19937_64 random_;
  AlignedBuffer memory_{kWindow * kPlace};
  std::array<Pending, kWindow> pending_;
  std::array<std::uint64_t, kPlacesPerClient> history_;
  std::uint64_t versions_ = kUnknown;
  int loads_ = 0;
  int wrong_ = 0;
};

class TransferStressTest : public ::testing::TestWithParam<Setting> {};

INSTANTIATE_TEST_SUITE_P(All, TransferStressTest,
                         ::testing::Values(Setting{"memory", test::open_memory},
                                           Setting{"uring", test::open_uring},
                                           Setting{"posix", test::open_posix},
                                           Setting{"faulty", open_faulty}),
                         [](const auto& info) { return info.param.name; });

TEST_P(TransferStressTest, EveryLoadIsWhatWasStored) {
  OpenedFile opened = GetParam().open(kFileBytes, 8);
  if (opened.file == nullptr) GTEST_SKIP() << opened.refusal;
  SteadyClock clock;
  auto engine =
      TransferEngine::open({.max_transfers = kTransfersMax, .in_flight_bytes_max = 4 * kPlace},
                           clock, opened.file.get(), nullptr);
  ASSERT_TRUE(engine.ok());
  std::vector<std::unique_ptr<Client>> clients;
  for (std::size_t i = 0; i < kClients; ++i) {
    clients.push_back(std::make_unique<Client>(**engine, i));
  }
  std::vector<std::thread> threads;
  for (const auto& client : clients) threads.emplace_back([&client] { client->run(); });
  for (std::thread& thread : threads) thread.join();
  for (const auto& client : clients) {
    EXPECT_GT(client->loads(), kSteps / 8) << "hardly anything was checked";
    EXPECT_EQ(client->wrong(), 0);
  }
  for (const Route route : {Route::kDiskToHost, Route::kHostToDisk}) {
    EXPECT_LE((*engine)->stats(route).in_flight_bytes_peak, 4 * kPlace);
  }
  EXPECT_TRUE((*engine)->close().ok());
  EXPECT_TRUE(opened.file->close().ok());
}

}  // namespace transfer_stress
}  // namespace kvtier
