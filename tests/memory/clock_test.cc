#include "memory/clock.h"

#include <gtest/gtest.h>

namespace kvtier {
namespace {

TEST(ManualClock, MovesOnlyWhenTold) {
  ManualClock clock;
  EXPECT_EQ(clock.now(), Duration{0});
  EXPECT_EQ(clock.now(), Duration{0});
  clock.advance(std::chrono::microseconds(3));
  clock.advance(Duration{4});
  EXPECT_EQ(clock.now(), Duration{3004});
}

TEST(SteadyClock, NeverGoesBackAndMovesOn) {
  const SteadyClock clock;
  const Duration start = clock.now();
  Duration before = start;
  // Ends because the machine's clock ticks.
  while (before == start) {
    const Duration after = clock.now();
    ASSERT_GE(after, before);
    before = after;
  }
  EXPECT_GT(before, start);
}

}  // namespace
}  // namespace kvtier
