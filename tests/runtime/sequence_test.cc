#include "tests/runtime/harness.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <string>

namespace kvtier::testing {
namespace {

HarnessOptions options_for(const std::string& selector) {
  HarnessOptions options;
  options.selector = selector;
  options.deterministic = true;
  return options;
}

TEST(Sequence, AnyChunkingOfAnAppendIsTheSame) {
  Harness whole(options_for("landmark(tokens=4)"));
  Harness pieces(options_for("landmark(tokens=4)"));
  ASSERT_TRUE(whole.append(777).ok());
  std::mt19937 random(5);
  for (std::uint32_t done = 0; done < 777;) {
    const std::uint32_t count = std::min<std::uint32_t>(777 - done, 1 + random() % 37);
    ASSERT_TRUE(pieces.append(count).ok());
    done += count;
  }
  // Versions differ between the two only if a truncation came between; none did.
  for (std::uint32_t layer : {0u, 1u}) {
    ASSERT_TRUE(whole.step(layer, 200).ok());
    ASSERT_TRUE(pieces.step(layer, 200).ok());
    EXPECT_EQ(whole.out(), pieces.out());
    EXPECT_EQ(whole.lse(), pieces.lse());
  }
  EXPECT_EQ(whole.device().wrong_blocks() + pieces.device().wrong_blocks(), 0u);
}

TEST(Sequence, AppendBeyondTheLongestIsRefusedAndHarmless) {
  HarnessOptions options = options_for("recency");
  options.tokens_max = 100;
  Harness harness(options);
  ASSERT_TRUE(harness.append(100).ok());
  EXPECT_EQ(harness.append(1).code(), StatusCode::kInvalidArgument);
  // The harness has noted the refused token; the sequence has not.
  ASSERT_TRUE(harness.truncate(100).ok());
  ASSERT_TRUE(harness.step(0, 100).ok());
  EXPECT_LE(max_difference(harness.out(), harness.reference_out()), kOutputTolerance);
}

// Drafts of every length against every block boundary: what was rejected leaves no trace.
TEST(Sequence, TruncatedDraftsLeaveNoTrace) {
  for (const char* selector : {"landmark(tokens=4)", "oracle", "recency"}) {
    Harness harness(options_for(selector));
    ASSERT_TRUE(harness.append(330).ok());
    for (std::uint32_t draft = 1; draft <= 13; ++draft) {
      const std::uint32_t kept = harness.tokens();
      ASSERT_TRUE(harness.append(draft).ok());
      ASSERT_TRUE(harness.step(0, 90).ok());
      ASSERT_TRUE(harness.truncate(kept).ok());
      ASSERT_TRUE(harness.append(1).ok());
      for (std::uint32_t layer : {0u, 1u}) {
        ASSERT_TRUE(harness.step(layer, 90).ok());
        EXPECT_LE(max_difference(harness.out(), harness.reference_out()), kOutputTolerance)
            << selector << ", draft of " << draft;
      }
    }
    EXPECT_EQ(harness.device().wrong_blocks(), 0u) << selector;
    EXPECT_TRUE(harness.close().ok());
  }
}

// A retry that goes far back cuts blocks whose extents are on disk only, with every mix of places.
TEST(Sequence, DeepCutsReachBlocksOnDisk) {
  HarnessOptions options = options_for("landmark(tokens=4)");
  options.host_bytes = 12 * 12 * 1024;
  Harness harness(options);
  std::mt19937 random(11);
  ASSERT_TRUE(harness.append(1000).ok());
  for (int round = 0; round < 60; ++round) {
    const std::uint32_t target = 20 + random() % (harness.tokens() - 20);
    const Status cut = harness.truncate(target);
    ASSERT_TRUE(cut.ok()) << cut.to_string();
    ASSERT_TRUE(harness.append(std::min<std::uint32_t>(1000 - target, 1 + random() % 300)).ok());
    for (std::uint32_t layer : {0u, 1u}) {
      ASSERT_TRUE(harness.step(layer, 25 + random() % 400).ok());
      ASSERT_LE(max_difference(harness.out(), harness.reference_out()), kOutputTolerance) << round;
    }
  }
  EXPECT_EQ(harness.device().wrong_blocks(), 0u);
  EXPECT_GT(harness.runtime().stats().tiers[2].hits, 0u);
  const RuntimeStats stats = harness.runtime().stats();
  for (const TierStats& tier : stats.tiers) EXPECT_LE(tier.peak_bytes, tier.capacity_bytes);
  EXPECT_TRUE(harness.close().ok());
}

TEST(Sequence, TruncateToNothingAndToTheSame) {
  Harness harness(options_for("recency"));
  ASSERT_TRUE(harness.append(100).ok());
  ASSERT_TRUE(harness.truncate(100).ok());
  ASSERT_TRUE(harness.step(0, 50).ok());
  ASSERT_TRUE(harness.truncate(0).ok());
  EXPECT_EQ(harness.step(0, 50).code(), StatusCode::kInvalidArgument);
  ASSERT_TRUE(harness.append(60).ok());
  ASSERT_TRUE(harness.step(1, 50).ok());
  EXPECT_LE(max_difference(harness.out(), harness.reference_out()), kOutputTolerance);
  EXPECT_EQ(harness.device().wrong_blocks(), 0u);
}

TEST(Sequence, FullHostAndDiskRefuseTheNextTokenAndLoseNothing) {
  HarnessOptions options = options_for("recency");
  options.disk_bytes = 4 * 12 * 1024;
  Harness harness(options);
  Status status;
  std::uint32_t appended = 0;
  while (status.ok() && appended < 1024) {
    status = harness.append(1);
    appended += status.ok() ? 1u : 0u;
  }
  ASSERT_EQ(status.code(), StatusCode::kNoSpace) << status.to_string();
  EXPECT_GT(appended, 4u * 31u);
  // The version of the refused token is known to the harness only where it was appended.
  ASSERT_TRUE(harness.truncate(appended).ok());
  ASSERT_TRUE(harness.step(0, 1024).ok());
  EXPECT_EQ(harness.report().attended_tokens_max, appended);
  EXPECT_LE(max_difference(harness.out(), harness.reference_out()), kOutputTolerance);
  EXPECT_EQ(harness.device().wrong_blocks(), 0u);
}

TEST(Sequence, DiskThatFillsUpUnderneathIsAClearFailure) {
  for (bool threads : {false, true}) {
    HarnessOptions options = options_for("recency");
    options.transfer_threads = threads;
    options.faults = FaultPlan::parse("enospc:1,seed=3").value();
    Harness harness(options);
    Status status;
    for (int i = 0; i < 1024 && status.ok(); ++i) status = harness.append(1);
    EXPECT_EQ(status.code(), StatusCode::kNoSpace) << status.to_string();
    EXPECT_EQ(harness.close().code(), StatusCode::kNoSpace);
  }
}

}  // namespace
}  // namespace kvtier::testing
