#include "memory/timeline.h"

#include <gtest/gtest.h>

#include <barrier>
#include <set>
#include <string>
#include <thread>
#include <vector>

namespace kvtier {
namespace {

TimelineEvent event(std::uint64_t bytes) {
  return {.track = Track::kFetch,
          .name = "fetch",
          .start = Duration{1},
          .duration = Duration{2},
          .bytes = bytes};
}

TEST(Timeline, KeepsEventsInOrder) {
  Timeline timeline(3);
  EXPECT_TRUE(timeline.events().empty());
  timeline.record(event(10));
  timeline.record(event(11));
  ASSERT_EQ(timeline.events().size(), 2u);
  EXPECT_EQ(timeline.events()[0].bytes, 10u);
  EXPECT_EQ(timeline.events()[1].bytes, 11u);
  EXPECT_STREQ(timeline.events()[1].name, "fetch");
  EXPECT_EQ(timeline.events()[1].duration, Duration{2});
  EXPECT_EQ(timeline.dropped(), 0u);
}

TEST(Timeline, CountsWhatItCannotKeep) {
  Timeline timeline(2);
  for (std::uint64_t i = 0; i < 5; ++i) timeline.record(event(i));
  ASSERT_EQ(timeline.events().size(), 2u);
  EXPECT_EQ(timeline.events()[1].bytes, 1u);
  EXPECT_EQ(timeline.dropped(), 3u);

  Timeline none(0);
  none.record(event(1));
  EXPECT_TRUE(none.events().empty());
  EXPECT_EQ(none.dropped(), 1u);
}

TEST(Timeline, ThreadsRecordWithoutLosingAnything) {
  constexpr std::uint64_t kThreads = 4;
  constexpr std::uint64_t kEach = 1000;
  constexpr std::uint64_t kCapacity = 3500;
  Timeline timeline(kCapacity);
  std::barrier start(static_cast<std::ptrdiff_t>(kThreads));
  std::vector<std::thread> threads;
  for (std::uint64_t thread = 0; thread < kThreads; ++thread) {
    threads.emplace_back([&, thread] {
      start.arrive_and_wait();
      for (std::uint64_t i = 0; i < kEach; ++i) timeline.record(event(thread * kEach + i));
    });
  }
  for (std::thread& thread : threads) thread.join();

  ASSERT_EQ(timeline.events().size(), kCapacity);
  EXPECT_EQ(timeline.dropped(), kThreads * kEach - kCapacity);
  std::set<std::uint64_t> seen;
  std::vector<std::uint64_t> last(kThreads, 0);
  for (const TimelineEvent& recorded : timeline.events()) {
    EXPECT_TRUE(seen.insert(recorded.bytes).second) << recorded.bytes << " is kept twice";
    // Within one thread the order of recording is the order of the events.
    EXPECT_GE(recorded.bytes, last[recorded.bytes / kEach]);
    last[recorded.bytes / kEach] = recorded.bytes;
  }
}

TEST(Track, EveryTrackHasItsOwnName) {
  std::set<std::string> names;
  for (int track = 0; track < kTrackCount; ++track) {
    EXPECT_TRUE(names.insert(to_string(static_cast<Track>(track))).second);
  }
  EXPECT_EQ(names.count("disk_to_host"), 1u);
}

}  // namespace
}  // namespace kvtier
