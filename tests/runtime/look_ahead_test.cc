#include "tests/runtime/harness.h"

#include <gtest/gtest.h>

namespace kvtier::testing {
namespace {

struct Outcome {
  RuntimeStats stats;
  std::vector<float> out;
};

Outcome decode(std::uint64_t look_ahead_bytes, const char* selector, std::size_t host_bytes) {
  HarnessOptions options;
  options.selector = selector;
  options.look_ahead_bytes = look_ahead_bytes;
  options.host_bytes = host_bytes;
  options.deterministic = true;
  Harness harness(options);
  EXPECT_TRUE(harness.append(960).ok());
  Outcome outcome;
  for (int token = 0; token < 30; ++token) {
    EXPECT_TRUE(harness.append(1).ok());
    for (std::uint32_t layer : {0u, 1u}) EXPECT_TRUE(harness.step(layer, 150).ok());
  }
  outcome.out = harness.out();
  EXPECT_EQ(harness.device().wrong_blocks(), 0u);
  EXPECT_TRUE(harness.close().ok());
  outcome.stats = harness.runtime().stats();
  return outcome;
}

constexpr std::size_t kExtent = 12 * 1024;

TEST(LookAhead, OffMovesNothing) {
  const Outcome off = decode(0, "landmark(tokens=4)", 16 * kExtent);
  EXPECT_EQ(off.stats.prefetch.issued_bytes, 0u);
  EXPECT_EQ(off.stats.prefetch.late, 0u);
}

TEST(LookAhead, BytesAreUsefulOrWastedAndNothingElse) {
  const Outcome off = decode(0, "landmark(tokens=4)", 16 * kExtent);
  const Outcome on = decode(4 * kExtent, "landmark(tokens=4)", 16 * kExtent);
  EXPECT_EQ(on.out, off.out);
  EXPECT_GT(on.stats.prefetch.useful_bytes, 0u);
  EXPECT_EQ(on.stats.prefetch.useful_bytes + on.stats.prefetch.wasted_bytes,
            on.stats.prefetch.issued_bytes);
  EXPECT_LT(on.stats.tiers[2].hits, off.stats.tiers[2].hits) << "it spared no demand read";
}

TEST(LookAhead, StaysWithinItsBudget) {
  for (std::uint64_t extents : {1u, 2u, 3u}) {
    const Outcome on = decode(extents * kExtent + 100, "landmark(tokens=4)", 16 * kExtent);
    EXPECT_LE(on.stats.prefetch.issued_bytes, on.stats.steps * extents * kExtent);
    EXPECT_GT(on.stats.prefetch.issued_bytes, 0u);
  }
}

TEST(LookAhead, WhatTheBudgetLeftOutIsLate) {
  const Outcome scarce = decode(kExtent, "landmark(tokens=4)", 16 * kExtent);
  const Outcome ample = decode(40 * kExtent, "landmark(tokens=4)", 40 * kExtent);
  EXPECT_GT(scarce.stats.prefetch.late, ample.stats.prefetch.late);
}

TEST(LookAhead, WrongPredictionsAreWaste) {
  const Outcome on = decode(4 * kExtent, "random", 10 * kExtent);
  EXPECT_GT(on.stats.prefetch.wasted_bytes, 0u);
}

}  // namespace
}  // namespace kvtier::testing
