#include "tests/runtime/harness.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

// A fork answers as a sequence of the same tokens does, stores once what it shares, and neither of
// the two notices what becomes of the other.

namespace kvtier::testing {
namespace {

HarnessOptions two_sequences(const std::string& selector = "mean(tokens=4)") {
  HarnessOptions options;
  options.selector = selector;
  options.sequences_max = 4;
  options.deterministic = true;
  options.estimate_rest = EstimateRest::kNever;
  return options;
}

/// Steps of every layer; each is right in itself.
std::vector<float> answers(Harness& harness, std::uint32_t budget) {
  std::vector<float> all;
  for (std::uint32_t layer = 0; layer < harness.options().layers; ++layer) {
    for (const std::uint32_t queries : {1u, 3u}) {
      const Status status = harness.step(layer, std::min(budget, harness.tokens()),
                                         std::min(queries, harness.tokens()));
      EXPECT_TRUE(status.ok()) << status.to_string();
      EXPECT_LE(max_difference(harness.out(), harness.reference_out()), kOutputTolerance);
      all.insert(all.end(), harness.out().begin(), harness.out().end());
      all.insert(all.end(), harness.lse().begin(), harness.lse().end());
    }
  }
  return all;
}

TEST(Fork, AnswersBitForBitAsACopyDoes) {
  for (const char* selector : {"mean(tokens=4)", "scan", "random", "minmax(tokens=8)"}) {
    for (const std::uint32_t at : {1u, 3u, 4u, 100u, 341u, 344u, 600u, 601u}) {
      SCOPED_TRACE(::testing::Message() << selector << " at " << at);
      Harness harness(two_sequences(selector));
      ASSERT_TRUE(harness.append(601).ok());
      ASSERT_TRUE(harness.fork(at).ok());
      ASSERT_TRUE(harness.append(37).ok());
      const std::vector<float> forked = answers(harness, 100);
      ASSERT_TRUE(harness.copy().ok());
      EXPECT_EQ(answers(harness, 100), forked);
      harness.use(0);
      answers(harness, 100);
      EXPECT_EQ(harness.device().wrong_blocks(), 0u);
      EXPECT_TRUE(harness.close().ok());
    }
  }
}

TEST(Fork, OfNothingIsAnEmptySequence) {
  Harness harness(two_sequences());
  ASSERT_TRUE(harness.fork(0).ok());
  ASSERT_TRUE(harness.append(50).ok());
  answers(harness, 50);
  harness.use(0);
  EXPECT_EQ(harness.sequence().tokens(LayerIndex{0}), 0u);
  ASSERT_TRUE(harness.append(20).ok());
  ASSERT_TRUE(harness.fork(0).ok());
  EXPECT_EQ(harness.tokens(), 0u);
  ASSERT_TRUE(harness.append(9).ok());
  answers(harness, 9);
}

TEST(Fork, WhatIsSharedIsStoredAndResidentOnce) {
  HarnessOptions options = two_sequences();
  options.host_bytes = 64 << 20;
  options.device_bytes = 1 << 20;
  Harness harness(options);
  ASSERT_TRUE(harness.append(1000).ok());
  const std::uint32_t per_extent = harness.runtime().layout().tokens_per_extent();
  const std::uint32_t complete = 1000 / per_extent;
  const std::size_t extent = harness.runtime().layout().extent_bytes();
  const auto frames = [&] {
    return harness.runtime().stats().tiers[static_cast<int>(Tier::kHost)].used_bytes / extent;
  };
  const std::uint64_t before = frames();
  ASSERT_TRUE(harness.fork(1000).ok());
  // Four streams, each with one extent that is being filled.
  EXPECT_EQ(frames(), before + 4);
  EXPECT_EQ(harness.sequence().stats().shared_bytes, 4 * complete * extent);
  harness.use(0);
  EXPECT_EQ(harness.sequence().stats().shared_bytes, 4 * complete * extent);
  ASSERT_TRUE(harness.step(0, 1000).ok());
  const auto link = [&] {
    return harness.runtime().stats().routes[static_cast<int>(Route::kHostToDevice)].submitted_bytes;
  };
  const std::uint64_t moved = link();
  harness.use(1);
  ASSERT_TRUE(harness.step(0, 1000).ok());
  EXPECT_LE(link() - moved, 2 * extent) << "but for the copied extents all was there";
  ASSERT_TRUE(harness.end().ok());
  EXPECT_EQ(frames(), before);
  EXPECT_EQ(harness.sequence().stats().shared_bytes, 0u);
  answers(harness, 1000);
}

TEST(Fork, EitherGoesOnWhenTheOtherIsClosed) {
  for (const std::size_t closed : {0u, 1u}) {
    Harness harness(two_sequences());
    ASSERT_TRUE(harness.append(700).ok());
    ASSERT_TRUE(harness.fork(650).ok());
    harness.use(closed);
    ASSERT_TRUE(harness.end().ok());
    ASSERT_TRUE(harness.append(60).ok());
    answers(harness, 90);
    ASSERT_TRUE(harness.truncate(123).ok());
    ASSERT_TRUE(harness.append(100).ok());
    const std::vector<float> answered = answers(harness, 90);
    ASSERT_TRUE(harness.copy().ok());
    EXPECT_EQ(answers(harness, 90), answered);
    EXPECT_EQ(harness.device().wrong_blocks(), 0u);
  }
}

TEST(Fork, ATruncationBelowWhatIsSharedLeavesTheOtherAsItWas) {
  for (const std::size_t cut : {0u, 1u}) {
    for (const std::uint32_t at : {0u, 2u, 5u, 90u, 256u, 341u, 342u, 344u}) {
      SCOPED_TRACE(::testing::Message() << "sequence " << cut << " at " << at);
      Harness harness(two_sequences());
      ASSERT_TRUE(harness.append(700).ok());
      ASSERT_TRUE(harness.fork(700).ok());
      const std::vector<float> before = answers(harness, 100);
      harness.use(cut);
      ASSERT_TRUE(harness.truncate(at).ok());
      ASSERT_TRUE(harness.append(300).ok());
      const std::vector<float> answered = answers(harness, 90);
      ASSERT_TRUE(harness.copy().ok());
      EXPECT_EQ(answers(harness, 90), answered);
      harness.use(1 - cut);
      EXPECT_EQ(answers(harness, 100), before);
      EXPECT_EQ(harness.device().wrong_blocks(), 0u);
    }
  }
}

TEST(Fork, BeamsAreReorderedByForksAndCloses) {
  HarnessOptions options = two_sequences();
  options.sequences_max = 4;
  Harness harness(options);
  ASSERT_TRUE(harness.append(300).ok());
  for (int beam = 1; beam < 3; ++beam) {
    harness.use(0);
    ASSERT_TRUE(harness.fork(300).ok());
  }
  for (int token = 0; token < 40; ++token) {
    for (std::size_t beam = 0; beam < 3; ++beam) {
      harness.use(beam);
      ASSERT_TRUE(harness.append(1).ok());
      ASSERT_TRUE(harness.step(0, 80).ok());
      EXPECT_LE(max_difference(harness.out(), harness.reference_out()), kOutputTolerance);
    }
    // The second beam goes on twice, the third ends.
    harness.use(2);
    ASSERT_TRUE(harness.end().ok());
    harness.use(1);
    ASSERT_TRUE(harness.fork(harness.tokens()).ok());
  }
  EXPECT_EQ(harness.device().wrong_blocks(), 0u);
}

TEST(Fork, MisuseEndsInAStatus) {
  HarnessOptions options = two_sequences();
  options.sequences_max = 2;
  Harness harness(options);
  ASSERT_TRUE(harness.append(100).ok());
  Sequence& sequence = harness.sequence();
  EXPECT_EQ(sequence.fork(101, {.high = 9, .low = 9}).status().code(),
            StatusCode::kInvalidArgument);
  EXPECT_EQ(sequence.fork(50, {.high = options.seed, .low = 42}).status().code(),
            StatusCode::kInvalidArgument);
  ASSERT_TRUE(harness.fork(100).ok());
  const Status full = sequence.fork(50, {.high = 9, .low = 9}).status();
  EXPECT_EQ(full.code(), StatusCode::kNoSpace);
  EXPECT_NE(full.to_string().find("sequences_max"), std::string::npos) << full.to_string();
}

}  // namespace
}  // namespace kvtier::testing
