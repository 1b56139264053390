#include "transfer/transfer_engine.h"

#include "tests/transfer/aligned_buffer.h"
#include "tests/transfer/test_files.h"

#include <gtest/gtest.h>

#include <array>
#include <vector>

// The engine over files that really hold bytes, with and without threads.

namespace kvtier {
namespace transfer_engine {

using test::AlignedBuffer;
using test::fill_pattern;
using test::has_pattern;
using test::kPage;
using test::OpenedFile;

constexpr std::size_t kPlace = 4 * kPage;
constexpr std::size_t kPlaces = 64;

struct Setting {
  const char* name;
  bool threads;
  OpenedFile (*open)(std::uint64_t, std::uint32_t);
};

class TransferEngineTest : public ::testing::TestWithParam<Setting> {
 protected:
  void SetUp() override {
    OpenedFile opened = GetParam().open(kPlaces * kPlace, 8);
    if (opened.file == nullptr) GTEST_SKIP() << opened.refusal;
    file_ = std::move(opened.file);
    link_ = make_memory_link();
    open_engine({});
  }

  void TearDown() override {
    if (file_ == nullptr) return;
    if (engine_ != nullptr) {
      EXPECT_TRUE(engine_->close().ok());
    }
    engine_.reset();
    EXPECT_TRUE(file_->close().ok());
  }

  void open_engine(TransferEngine::Options options) {
    if (engine_ != nullptr) {
      ASSERT_TRUE(engine_->close().ok());
    }
    options.threads = GetParam().threads;
    auto opened = TransferEngine::open(options, clock_, file_.get(), link_.get());
    ASSERT_TRUE(opened.ok()) << opened.status().to_string();
    engine_ = std::move(opened).value();
  }

  Transfer submit(const TransferRequest& request) {
    auto transfer = engine_->submit(request);
    EXPECT_TRUE(transfer.ok()) << transfer.status().to_string();
    return std::move(transfer).value();
  }

  static TransferRequest disk(Route route, std::size_t place, std::span<std::byte> buffer,
                              Priority priority = Priority::kDemand) {
    return {.route = route,
            .priority = priority,
            .offset = place * kPlace,
            .buffer = buffer,
            .spans = {}};
  }

  static TransferRequest link(Route route, std::span<const CopySpan> spans) {
    return {
        .route = route, .priority = Priority::kDemand, .offset = 0, .buffer = {}, .spans = spans};
  }

  SteadyClock clock_;
  std::unique_ptr<File> file_;
  std::unique_ptr<Link> link_;
  std::unique_ptr<TransferEngine> engine_;
};

INSTANTIATE_TEST_SUITE_P(All, TransferEngineTest,
                         ::testing::Values(Setting{"inline_memory", false, test::open_memory},
                                           Setting{"inline_uring", false, test::open_uring},
                                           Setting{"inline_posix", false, test::open_posix},
                                           Setting{"threads_memory", true, test::open_memory},
                                           Setting{"threads_uring", true, test::open_uring},
                                           Setting{"threads_posix", true, test::open_posix}),
                         [](const auto& info) { return info.param.name; });

TEST_P(TransferEngineTest, BytesGoRoundAllFourRoutes) {
  AlignedBuffer device(kPlace);
  AlignedBuffer host(kPlace);
  AlignedBuffer back(kPlace);
  for (std::size_t place = 0; place < kPlaces; ++place) {
    fill_pattern(device.bytes(), place);
    // Two spans, crossed over, so that an order or a length that is ignored shows.
    const std::array<CopySpan, 2> down = {
        CopySpan{device.bytes().data() + kPage, host.bytes().data(), kPlace - kPage},
        CopySpan{device.bytes().data(), host.bytes().data() + kPlace - kPage, kPage}};
    EXPECT_TRUE(submit(link(Route::kDeviceToHost, down)).wait().ok());
    EXPECT_TRUE(submit(disk(Route::kHostToDisk, place, host.bytes())).wait().ok());
    fill_pattern(host.bytes(), 777);
    EXPECT_TRUE(submit(disk(Route::kDiskToHost, place, host.bytes())).wait().ok());
    const std::array<CopySpan, 2> up = {
        CopySpan{host.bytes().data() + kPlace - kPage, back.bytes().data(), kPage},
        CopySpan{host.bytes().data(), back.bytes().data() + kPage, kPlace - kPage}};
    EXPECT_TRUE(submit(link(Route::kHostToDevice, up)).wait().ok());
    EXPECT_TRUE(has_pattern(back.bytes(), place));
  }
  for (int route = 0; route < kRouteCount; ++route) {
    const RouteStats stats = engine_->stats(static_cast<Route>(route));
    EXPECT_EQ(stats.transfers, kPlaces) << to_string(static_cast<Route>(route));
    EXPECT_EQ(stats.bytes, kPlaces * kPlace);
    EXPECT_EQ(stats.in_flight_bytes_peak, kPlace);
    EXPECT_EQ(stats.failures + stats.cancelled + stats.short_transfers, 0U);
  }
}

TEST_P(TransferEngineTest, ManyAtOnceAllArrive) {
  AlignedBuffer memory(kPlaces * kPlace);
  std::vector<Transfer> transfers;
  for (std::size_t place = 0; place < kPlaces; ++place) {
    fill_pattern(memory.part(place * kPlace, kPlace), place);
    transfers.push_back(submit(disk(Route::kHostToDisk, place, memory.part(place * kPlace, kPlace),
                                    static_cast<Priority>(place % kPriorityCount))));
  }
  for (Transfer& transfer : transfers) {
    EXPECT_TRUE(transfer.wait().ok());
  }
  AlignedBuffer back(kPlaces * kPlace);
  transfers.clear();
  for (std::size_t place = 0; place < kPlaces; ++place) {
    transfers.push_back(submit(disk(Route::kDiskToHost, place, back.part(place * kPlace, kPlace),
                                    static_cast<Priority>(place % kPriorityCount))));
  }
  // Waiting for the last first must not need the others to be waited for.
  for (std::size_t place = kPlaces; place > 0; --place) {
    EXPECT_TRUE(transfers[place - 1].wait().ok());
    EXPECT_FALSE(transfers[place - 1]) << "a handle that was waited for is empty";
    EXPECT_TRUE(has_pattern(back.part((place - 1) * kPlace, kPlace), place - 1));
  }
}

TEST_P(TransferEngineTest, DroppedHandlesStillMoveBytes) {
  AlignedBuffer memory(kPlaces * kPlace);
  for (std::size_t place = 0; place < kPlaces; ++place) {
    fill_pattern(memory.part(place * kPlace, kPlace), place + 5);
    submit(disk(Route::kHostToDisk, place, memory.part(place * kPlace, kPlace)));
  }
  engine_->drain();
  EXPECT_EQ(engine_->stats(Route::kHostToDisk).transfers, kPlaces);
  AlignedBuffer back(kPlace);
  for (std::size_t place = 0; place < kPlaces; ++place) {
    EXPECT_TRUE(submit(disk(Route::kDiskToHost, place, back.bytes())).wait().ok());
    EXPECT_TRUE(has_pattern(back.bytes(), place + 5));
  }
}

TEST_P(TransferEngineTest, RecordsAreUsedAgainAndRunOutLoudly) {
  open_engine({.max_transfers = 4});
  AlignedBuffer buffer(kPlace);
  for (int round = 0; round < 10; ++round) {
    std::vector<Transfer> transfers;
    for (int i = 0; i < 4; ++i) {
      transfers.push_back(submit(disk(Route::kDiskToHost, 0, buffer.part(0, 0))));
    }
    const auto refused = engine_->submit(disk(Route::kDiskToHost, 0, buffer.bytes()));
    ASSERT_FALSE(refused.ok());
    EXPECT_EQ(refused.status().code(), StatusCode::kBusy);
    // A terminal transfer keeps its record until its handle goes.
    EXPECT_EQ(transfers.front().poll(), TransferState::kDone);
    transfers.pop_back();
    transfers.push_back(submit(disk(Route::kDiskToHost, 0, buffer.bytes())));
    for (Transfer& transfer : transfers) {
      EXPECT_TRUE(transfer.wait().ok());
    }
  }
}

TEST_P(TransferEngineTest, MovedHandlesStandForOneTransfer) {
  AlignedBuffer dropped(kPlace);
  AlignedBuffer kept(kPage);
  Transfer first = submit(disk(Route::kDiskToHost, 0, dropped.bytes()));
  Transfer second = std::move(first);
  EXPECT_FALSE(first);  // NOLINT(bugprone-use-after-move): emptiness is the promise.
  EXPECT_TRUE(second);
  first = submit(disk(Route::kDiskToHost, 1, kept.bytes()));
  second = std::move(first);
  EXPECT_TRUE(second.wait().ok());
  EXPECT_FALSE(second);
  engine_->drain();  // A dropped transfer still writes into its memory.
}

TEST_P(TransferEngineTest, NothingToMoveIsDoneAtOnce) {
  Transfer transfer = submit(link(Route::kHostToDevice, {}));
  EXPECT_EQ(transfer.poll(), TransferState::kDone);
  EXPECT_TRUE(transfer.wait().ok());
}

TEST_P(TransferEngineTest, MissingTierIsUnsupported) {
  auto opened = TransferEngine::open({.threads = GetParam().threads}, clock_, nullptr, link_.get());
  ASSERT_TRUE(opened.ok());
  AlignedBuffer buffer(kPlace);
  const auto refused = (*opened)->submit(disk(Route::kDiskToHost, 0, buffer.bytes()));
  EXPECT_EQ(refused.status().code(), StatusCode::kUnsupported);
  EXPECT_TRUE((*opened)->close().ok());
}

TEST_P(TransferEngineTest, CancelAlwaysEndsInATerminalState) {
  AlignedBuffer memory(kPlaces * kPlace);
  for (int round = 0; round < 5; ++round) {
    std::vector<Transfer> transfers;
    for (std::size_t place = 0; place < kPlaces; ++place) {
      transfers.push_back(
          submit(disk(Route::kDiskToHost, place, memory.part(place * kPlace, kPlace))));
    }
    if (round % 2 == 1) engine_->progress();
    for (Transfer& transfer : transfers) transfer.cancel();
    for (Transfer& transfer : transfers) {
      const Status status = transfer.wait();
      EXPECT_TRUE(status.ok() || status.code() == StatusCode::kCancelled) << status.to_string();
    }
  }
  const RouteStats stats = engine_->stats(Route::kDiskToHost);
  EXPECT_EQ(stats.transfers + stats.cancelled, 5 * kPlaces);
  EXPECT_EQ(stats.failures, 0U);
}

TEST_P(TransferEngineTest, ReadBehindTheEndFailsAfterItsRestarts) {
  AlignedBuffer buffer(2 * kPlace);
  const Status status = submit(disk(Route::kDiskToHost, kPlaces - 1, buffer.bytes())).wait();
  EXPECT_EQ(status.code(), StatusCode::kIoError);
  const RouteStats stats = engine_->stats(Route::kDiskToHost);
  EXPECT_EQ(stats.short_transfers, 3U);
  EXPECT_EQ(stats.failures, 1U);
}

TEST_P(TransferEngineTest, CloseFinishesWhatIsQueuedAndRefusesMore) {
  AlignedBuffer memory(kPlaces * kPlace);
  std::vector<Transfer> transfers;
  for (std::size_t place = 0; place < kPlaces; ++place) {
    fill_pattern(memory.part(place * kPlace, kPlace), place);
    transfers.push_back(submit(disk(Route::kHostToDisk, place, memory.part(place * kPlace, kPlace),
                                    Priority::kWriteBack)));
  }
  ASSERT_TRUE(engine_->close().ok());
  for (Transfer& transfer : transfers) {
    EXPECT_EQ(transfer.poll(), TransferState::kDone);
  }
  EXPECT_EQ(engine_->submit(disk(Route::kHostToDisk, 0, memory.part(0, kPlace))).status().code(),
            StatusCode::kCancelled);
  transfers.clear();
  engine_.reset();
}

TEST_P(TransferEngineTest, TimelineGetsOneEventPerTransfer) {
  Timeline timeline(64);
  open_engine({.timeline = &timeline});
  AlignedBuffer host(kPlace);
  AlignedBuffer device(kPlace);
  const std::array<CopySpan, 1> spans = {
      CopySpan{device.bytes().data(), host.bytes().data(), kPlace}};
  const Duration before = clock_.now();
  EXPECT_TRUE(submit(link(Route::kDeviceToHost, spans)).wait().ok());
  EXPECT_TRUE(submit(disk(Route::kHostToDisk, 1, host.bytes(), Priority::kWriteBack)).wait().ok());
  EXPECT_TRUE(submit(disk(Route::kDiskToHost, 1, host.bytes(), Priority::kPrefetch)).wait().ok());
  const Duration after = clock_.now();
  const struct {
    Track track;
    const char* name;
  } kExpected[] = {{Track::kDeviceToHost, "demand"},
                   {Track::kHostToDisk, "write_back"},
                   {Track::kDiskToHost, "prefetch"}};
  ASSERT_EQ(timeline.events().size(), 3U);
  for (std::size_t i = 0; i < 3; ++i) {
    const TimelineEvent& event = timeline.events()[i];
    EXPECT_EQ(event.track, kExpected[i].track);
    EXPECT_STREQ(event.name, kExpected[i].name);
    EXPECT_EQ(event.bytes, kPlace);
    EXPECT_GE(event.start, before);
    EXPECT_GE(event.duration, Duration::zero());
    EXPECT_LE(event.start + event.duration, after);
  }
  // The engine must let go of the timeline before it ends.
  open_engine({});
}

TEST_P(TransferEngineTest, EngineLeftOpenIsABug) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_DEATH(engine_.reset(), "without close");
}

}  // namespace transfer_engine
}  // namespace kvtier
