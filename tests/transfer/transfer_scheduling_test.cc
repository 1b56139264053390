#include "tests/transfer/aligned_buffer.h"
#include "tests/transfer/recording_file.h"
#include "transfer/transfer_engine.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <thread>
#include <vector>

// What starts when: seen by a file that records and ends operations when told to.

namespace kvtier {
namespace {

using test::AlignedBuffer;
using test::kPage;
using test::RecordingFile;
using Offsets = std::vector<std::uint64_t>;

class TransferSchedulingTest : public ::testing::TestWithParam<bool> {
 protected:
  bool threads() const { return GetParam(); }

  void TearDown() override {
    if (engine_ == nullptr) return;
    file_->finish_all();
    EXPECT_TRUE(engine_->close().ok());
  }

  void open(std::uint32_t queue_depth, TransferEngine::Options options = {}) {
    file_ = std::make_unique<RecordingFile>(
        RecordingFile::Options{.queue_depth = queue_depth, .waits = threads()});
    options.threads = threads();
    auto opened = TransferEngine::open(options, clock_, file_.get(), nullptr);
    ASSERT_TRUE(opened.ok()) << opened.status().to_string();
    engine_ = std::move(opened).value();
  }

  Transfer submit(std::uint64_t page, Priority priority, Route route = Route::kDiskToHost,
                  std::size_t pages = 1) {
    auto transfer = engine_->submit({.route = route,
                                     .priority = priority,
                                     .offset = page * kPage,
                                     .buffer = memory_.part(0, pages * kPage),
                                     .spans = {}});
    EXPECT_TRUE(transfer.ok()) << transfer.status().to_string();
    return std::move(transfer).value();
  }

  // Returns when the file has seen `count` operations.
  void until_started(std::size_t count) {
    if (threads()) {
      file_->wait_for_started(count);
    } else {
      while (file_->started().size() < count) engine_->progress();
    }
  }

  void until_terminal(const Transfer& transfer) {
    while (transfer.poll() == TransferState::kQueued ||
           transfer.poll() == TransferState::kInFlight) {
      engine_->progress();
      std::this_thread::yield();
    }
  }

  Offsets started_pages() const {
    Offsets pages;
    for (const std::uint64_t offset : file_->started_offsets()) pages.push_back(offset / kPage);
    return pages;
  }

  ManualClock clock_;
  AlignedBuffer memory_{64 * kPage};
  std::unique_ptr<RecordingFile> file_;
  std::unique_ptr<TransferEngine> engine_;
};

INSTANTIATE_TEST_SUITE_P(All, TransferSchedulingTest, ::testing::Bool(),
                         [](const auto& info) { return info.param ? "threads" : "inline"; });

TEST_P(TransferSchedulingTest, DemandOvertakesWhatIsQueued) {
  open(1);
  std::vector<Transfer> transfers;
  transfers.push_back(submit(0, Priority::kWriteBack));
  until_started(1);
  transfers.push_back(submit(1, Priority::kWriteBack));
  transfers.push_back(submit(2, Priority::kPrefetch));
  transfers.push_back(submit(3, Priority::kPrefetch));
  transfers.push_back(submit(4, Priority::kDemand));
  transfers.push_back(submit(5, Priority::kDemand));
  EXPECT_EQ(transfers.back().poll(), TransferState::kQueued);
  file_->finish_all();
  for (Transfer& transfer : transfers) {
    EXPECT_TRUE(transfer.wait().ok());
  }
  EXPECT_EQ(started_pages(), (Offsets{0, 4, 5, 2, 3, 1}));
}

TEST_P(TransferSchedulingTest, DemandWritesOvertakePrefetchReads) {
  open(1);
  std::vector<Transfer> transfers;
  transfers.push_back(submit(0, Priority::kPrefetch));
  until_started(1);
  transfers.push_back(submit(1, Priority::kPrefetch));
  transfers.push_back(submit(2, Priority::kWriteBack, Route::kHostToDisk));
  transfers.push_back(submit(3, Priority::kDemand, Route::kHostToDisk));
  file_->finish_all();
  for (Transfer& transfer : transfers) {
    EXPECT_TRUE(transfer.wait().ok());
  }
  EXPECT_EQ(started_pages(), (Offsets{0, 3, 1, 2}));
}

TEST_P(TransferSchedulingTest, NewDemandStartsWhileOthersAreInFlight) {
  open(8);
  std::vector<Transfer> transfers;
  transfers.push_back(submit(0, Priority::kDemand));
  until_started(1);
  // Nothing has finished: only a wake-up can bring the driver to this one.
  transfers.push_back(submit(1, Priority::kDemand));
  until_started(2);
  EXPECT_EQ(transfers[0].poll(), TransferState::kInFlight);
  EXPECT_EQ(transfers[1].poll(), TransferState::kInFlight);
}

TEST_P(TransferSchedulingTest, BytesInFlightStayUnderTheBoundOfTheirRoute) {
  open(64, {.in_flight_bytes_max = 4 * kPage});
  std::vector<Transfer> transfers;
  for (std::uint64_t page = 0; page < 40; ++page) {
    transfers.push_back(submit(page, Priority::kDemand));
    transfers.push_back(submit(100 + page, Priority::kDemand, Route::kHostToDisk, 3));
  }
  until_started(5);
  for (int i = 0; i < 40; ++i) {
    until_started(static_cast<std::size_t>(i) + 5);
    file_->finish_oldest();
    engine_->progress();
  }
  file_->finish_all();
  for (Transfer& transfer : transfers) {
    EXPECT_TRUE(transfer.wait().ok());
  }
  EXPECT_EQ(file_->in_flight_bytes_peak(FileOperation::Kind::kRead), 4 * kPage);
  EXPECT_EQ(file_->in_flight_bytes_peak(FileOperation::Kind::kWrite), 3 * kPage);
  EXPECT_EQ(engine_->stats(Route::kDiskToHost).in_flight_bytes_peak, 4 * kPage);
  EXPECT_EQ(engine_->stats(Route::kHostToDisk).in_flight_bytes_peak, 3 * kPage);
}

TEST_P(TransferSchedulingTest, TransferLargerThanTheBoundRunsAlone) {
  open(64, {.in_flight_bytes_max = 2 * kPage});
  std::vector<Transfer> transfers;
  transfers.push_back(submit(0, Priority::kDemand));
  until_started(1);
  transfers.push_back(submit(1, Priority::kDemand, Route::kDiskToHost, 8));
  transfers.push_back(submit(2, Priority::kPrefetch));
  transfers.push_back(submit(3, Priority::kDemand));
  EXPECT_EQ(started_pages(), (Offsets{0})) << "the small ones behind it must not starve it";
  file_->finish_oldest();
  until_started(2);
  EXPECT_EQ(started_pages(), (Offsets{0, 1}));
  file_->finish_all();
  for (Transfer& transfer : transfers) {
    EXPECT_TRUE(transfer.wait().ok());
  }
  EXPECT_EQ(started_pages(), (Offsets{0, 1, 3, 2}));
  EXPECT_EQ(file_->in_flight_bytes_peak(FileOperation::Kind::kRead), 8 * kPage);
}

TEST_P(TransferSchedulingTest, BackgroundLeavesRoomForDemand) {
  open(64, {.in_flight_bytes_max = 8 * kPage, .background_share = 0.25});
  std::vector<Transfer> transfers;
  for (std::uint64_t page = 0; page < 10; ++page) {
    transfers.push_back(submit(page, page % 2 == 0 ? Priority::kPrefetch : Priority::kWriteBack));
  }
  until_started(2);
  for (std::uint64_t page = 20; page < 26; ++page) {
    transfers.push_back(submit(page, Priority::kDemand));
  }
  until_started(8);
  const Offsets pages = started_pages();
  EXPECT_EQ(std::count_if(pages.begin(), pages.end(), [](auto page) { return page < 20; }), 2);
  EXPECT_EQ(pages.size(), 8U);
  file_->finish_all();
  for (Transfer& transfer : transfers) {
    EXPECT_TRUE(transfer.wait().ok());
  }
}

TEST_P(TransferSchedulingTest, BackgroundLeavesPlacesInTheQueue) {
  open(4, {.background_share = 0.5});
  std::vector<Transfer> transfers;
  for (std::uint64_t page = 0; page < 6; ++page) {
    transfers.push_back(submit(page, Priority::kPrefetch));
  }
  until_started(2);
  transfers.push_back(submit(20, Priority::kDemand));
  transfers.push_back(submit(21, Priority::kDemand));
  until_started(4);
  EXPECT_EQ(started_pages(), (Offsets{0, 1, 20, 21}));
  file_->finish_all();
  for (Transfer& transfer : transfers) {
    EXPECT_TRUE(transfer.wait().ok());
  }
}

TEST_P(TransferSchedulingTest, PartialAcceptanceKeepsTheOrder) {
  open(8);
  file_->set_accepted_per_call(2);
  std::vector<Transfer> transfers;
  transfers.push_back(submit(0, Priority::kDemand));
  until_started(1);
  for (std::uint64_t page = 1; page < 12; ++page) {
    transfers.push_back(submit(page, Priority::kDemand));
  }
  file_->finish_all();
  for (Transfer& transfer : transfers) {
    EXPECT_TRUE(transfer.wait().ok());
  }
  EXPECT_EQ(started_pages(), (Offsets{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11}));
}

TEST_P(TransferSchedulingTest, QueuedTransferThatIsCancelledNeverStarts) {
  open(1);
  Transfer first = submit(0, Priority::kDemand);
  until_started(1);
  Transfer second = submit(1, Priority::kDemand);
  Transfer third = submit(2, Priority::kDemand);
  second.cancel();
  EXPECT_EQ(second.poll(), TransferState::kCancelled);
  EXPECT_EQ(second.wait().code(), StatusCode::kCancelled);
  file_->finish_all();
  EXPECT_TRUE(first.wait().ok());
  EXPECT_TRUE(third.wait().ok());
  EXPECT_EQ(started_pages(), (Offsets{0, 2}));
  EXPECT_EQ(engine_->stats(Route::kDiskToHost).cancelled, 1U);
}

TEST_P(TransferSchedulingTest, CancelInFlightReachesTheFile) {
  open(4);
  Transfer first = submit(0, Priority::kDemand);
  Transfer second = submit(1, Priority::kDemand);
  until_started(2);
  second.cancel();
  second.cancel();
  until_terminal(second);
  EXPECT_EQ(second.poll(), TransferState::kCancelled);
  EXPECT_EQ(file_->cancels(), 1U);
  EXPECT_EQ(first.poll(), TransferState::kInFlight);
  file_->finish_all();
  EXPECT_TRUE(first.wait().ok());
}

TEST_P(TransferSchedulingTest, FailureReachesItsOwnerAlone) {
  open(8);
  file_->script(1 * kPage, {{io_error("disk broke"), 0}});
  file_->script(2 * kPage, {{no_space("disk full"), 0}});
  std::vector<Transfer> transfers;
  for (std::uint64_t page = 0; page < 4; ++page) {
    transfers.push_back(submit(page, Priority::kDemand));
  }
  file_->finish_all();
  EXPECT_TRUE(transfers[0].wait().ok());
  until_terminal(transfers[1]);
  EXPECT_EQ(transfers[1].poll(), TransferState::kFailed);
  const Status broken = transfers[1].wait();
  EXPECT_EQ(broken.code(), StatusCode::kIoError);
  EXPECT_EQ(broken.message(), "disk broke");
  EXPECT_EQ(transfers[2].wait().code(), StatusCode::kNoSpace);
  EXPECT_TRUE(transfers[3].wait().ok());
  const RouteStats stats = engine_->stats(Route::kDiskToHost);
  EXPECT_EQ(stats.failures, 2U);
  EXPECT_EQ(stats.transfers, 2U);
  EXPECT_EQ(stats.bytes, 2 * kPage);
}

TEST_P(TransferSchedulingTest, ShortTransfersStartAgainFromTheBeginning) {
  open(8);
  file_->script(0, {{{}, 1024}, {{}, kPage}, {{}, 512}});
  file_->script(9 * kPage, {{{}, 1}, {{}, 1}, {{}, 1}, {{}, 1}});
  Transfer lucky = submit(0, Priority::kDemand);
  Transfer hopeless = submit(9, Priority::kPrefetch);
  file_->finish_all();
  EXPECT_TRUE(lucky.wait().ok());
  EXPECT_EQ(hopeless.wait().code(), StatusCode::kIoError);
  const Offsets pages = started_pages();
  EXPECT_EQ(std::count(pages.begin(), pages.end(), 0U), 4);
  EXPECT_EQ(std::count(pages.begin(), pages.end(), 9U), 4);
  for (const RecordingFile::Started& one : file_->started()) {
    EXPECT_EQ(one.bytes, kPage);
  }
  EXPECT_EQ(engine_->stats(Route::kDiskToHost).short_transfers, 6U);
}

TEST_P(TransferSchedulingTest, DroppedHandleDoesNotCancel) {
  open(1);
  Transfer first = submit(0, Priority::kDemand);
  until_started(1);
  submit(1, Priority::kDemand);
  { const Transfer dropped = std::move(first); }
  file_->finish_all();
  engine_->drain();
  EXPECT_EQ(started_pages(), (Offsets{0, 1}));
  EXPECT_EQ(engine_->stats(Route::kDiskToHost).transfers, 2U);
}

TEST_P(TransferSchedulingTest, CloseServesWhatIsQueued) {
  open(1);
  Transfer first = submit(0, Priority::kDemand);
  until_started(1);
  Transfer second = submit(1, Priority::kWriteBack, Route::kHostToDisk);
  file_->finish_all();
  EXPECT_TRUE(engine_->close().ok());
  EXPECT_EQ(first.poll(), TransferState::kDone);
  EXPECT_EQ(second.poll(), TransferState::kDone);
  EXPECT_TRUE(first.wait().ok());
  EXPECT_TRUE(second.wait().ok());
  engine_.reset();
}

}  // namespace
}  // namespace kvtier
