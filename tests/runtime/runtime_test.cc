#include "tests/runtime/harness.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <string>

namespace kvtier::testing {
namespace {

// Everything through all three tiers: the device holds a tenth, the host under a third.
HarnessOptions three_tiers() {
  HarnessOptions options;
  options.tokens_max = 2048;
  options.selector = "landmark(tokens=4)";
  return options;
}

TEST(Runtime, FullBudgetIsExactThroughAllTiers) {
  for (bool deterministic : {false, true}) {
    for (bool threads : {false, true}) {
      HarnessOptions options = three_tiers();
      options.deterministic = deterministic;
      options.transfer_threads = threads;
      Harness harness(options);
      ASSERT_TRUE(harness.append(1500).ok());
      for (int token = 0; token < 3; ++token) {
        ASSERT_TRUE(harness.append(1).ok());
        for (std::uint32_t layer = 0; layer < 2; ++layer) {
          ASSERT_TRUE(harness.step(layer, 2048).ok());
          EXPECT_EQ(harness.report().attended_tokens_max, harness.tokens());
          EXPECT_LE(max_difference(harness.out(), harness.reference_out()), kOutputTolerance);
        }
      }
      EXPECT_EQ(harness.device().wrong_blocks(), 0u);
      const RuntimeStats stats = harness.runtime().stats();
      EXPECT_GT(stats.tiers[2].hits, 0u) << "nothing was read from disk";
      EXPECT_GT(stats.waves, stats.steps) << "everything fitted at once";
      EXPECT_TRUE(harness.close().ok());
    }
  }
}

TEST(Runtime, SeveralQueriesAreCausal) {
  HarnessOptions options = three_tiers();
  Harness harness(options);
  ASSERT_TRUE(harness.append(501).ok());
  for (std::uint32_t queries : {2u, 5u, 8u}) {
    ASSERT_TRUE(harness.append(queries).ok());
    ASSERT_TRUE(harness.step(1, 120, queries).ok());
    EXPECT_LE(max_difference(harness.out(), harness.reference_out()), kOutputTolerance);
  }
  EXPECT_EQ(harness.step(1, 120, 9).code(), StatusCode::kInvalidArgument);
}

TEST(Runtime, SoftCapAndSinkLogits) {
  HarnessOptions options = three_tiers();
  options.softmax.logit_cap = 0.7f;
  options.sink_logits = {0.5f, -1.0f, 2.0f, 0.0f, 1.0f, 0.25f, -0.5f, 3.0f};
  Harness harness(options);
  ASSERT_TRUE(harness.append(300).ok());
  for (std::uint32_t layer : {0u, 1u}) {
    ASSERT_TRUE(harness.step(layer, 100).ok());
    EXPECT_LE(max_difference(harness.out(), harness.reference_out()), kOutputTolerance);
  }
}

TEST(Runtime, BudgetCountsSinksAndWindow) {
  Harness harness(three_tiers());
  ASSERT_TRUE(harness.append(700).ok());
  for (std::uint32_t budget : {20u, 21u, 57u, 200u, 699u, 700u, 5000u}) {
    ASSERT_TRUE(harness.step(0, budget).ok());
    const std::uint32_t most = std::min(budget, 700u);
    EXPECT_LE(harness.report().attended_tokens_max, most);
    EXPECT_GT(harness.report().attended_tokens_max + 4, most);
  }
  EXPECT_EQ(harness.step(0, 19).code(), StatusCode::kInvalidArgument);
}

TEST(Runtime, MergedLseIsThatOfTheWhole) {
  Harness small(three_tiers());
  HarnessOptions roomy = three_tiers();
  roomy.device_bytes = std::size_t{8} << 20;
  Harness large(roomy);
  for (Harness* harness : {&small, &large}) {
    ASSERT_TRUE(harness->append(900).ok());
    ASSERT_TRUE(harness->step(0, 900).ok());
  }
  for (std::size_t i = 0; i < small.lse().size(); ++i) {
    EXPECT_NEAR(small.lse()[i], large.lse()[i], 1e-5);
  }
}

struct RunResult {
  std::vector<std::vector<float>> outs;
  std::vector<std::vector<std::uint32_t>> attended;
  RuntimeStats stats;
};

RunResult run(const HarnessOptions& options) {
  Harness harness(options);
  RunResult result;
  EXPECT_TRUE(harness.append(1200).ok());
  for (int token = 0; token < 12; ++token) {
    EXPECT_TRUE(harness.append(1).ok());
    for (std::uint32_t layer = 0; layer < 2; ++layer) {
      EXPECT_TRUE(harness.step(layer, 300).ok());
      result.outs.push_back(harness.out());
      std::vector<std::uint32_t> blocks;
      for (const AttendedRange& range : harness.report().attended) {
        blocks.insert(blocks.end(),
                      {range.head_group.value, range.block.value, range.first_token, range.tokens});
      }
      result.attended.push_back(blocks);
    }
  }
  EXPECT_EQ(harness.device().wrong_blocks(), 0u);
  EXPECT_TRUE(harness.close().ok());
  result.stats = harness.runtime().stats();
  return result;
}

TEST(Runtime, ResidencyChangesNothingThatIsAttended) {
  for (bool deterministic : {false, true}) {
    HarnessOptions small = three_tiers();
    small.deterministic = deterministic;
    small.look_ahead_bytes = 24 * 1024;
    HarnessOptions large = small;
    large.device_bytes = std::size_t{8} << 20;
    large.host_bytes = std::size_t{8} << 20;
    const RunResult few = run(small);
    const RunResult all = run(large);
    EXPECT_GT(few.stats.tiers[2].hits, few.stats.tiers[1].hits) << "most misses come from disk";
    EXPECT_EQ(all.stats.tiers[2].hits, 0u);
    EXPECT_EQ(few.attended, all.attended);
    for (std::size_t i = 0; i < few.outs.size(); ++i) {
      for (std::size_t j = 0; j < few.outs[i].size(); ++j) {
        if (deterministic) {
          EXPECT_EQ(few.outs[i][j], all.outs[i][j]);
        } else {
          EXPECT_NEAR(few.outs[i][j], all.outs[i][j], kOutputTolerance);
        }
      }
    }
  }
}

TEST(Runtime, SameCallsSameDecisionsWithAndWithoutThreads) {
  HarnessOptions options = three_tiers();
  options.look_ahead_bytes = 24 * 1024;
  const RunResult inline_run = run(options);
  options.transfer_threads = true;
  for (int repeat = 0; repeat < 3; ++repeat) {
    const RunResult threaded = run(options);
    EXPECT_EQ(threaded.outs, inline_run.outs);
    for (std::size_t tier = 0; tier < kTierCount; ++tier) {
      EXPECT_EQ(threaded.stats.tiers[tier].hits, inline_run.stats.tiers[tier].hits);
      EXPECT_EQ(threaded.stats.tiers[tier].evictions, inline_run.stats.tiers[tier].evictions);
      EXPECT_EQ(threaded.stats.tiers[tier].peak_bytes, inline_run.stats.tiers[tier].peak_bytes);
    }
    EXPECT_EQ(threaded.stats.prefetch.useful_bytes, inline_run.stats.prefetch.useful_bytes);
    EXPECT_EQ(threaded.stats.prefetch.wasted_bytes, inline_run.stats.prefetch.wasted_bytes);
    EXPECT_EQ(threaded.stats.prefetch.late, inline_run.stats.prefetch.late);
    EXPECT_EQ(threaded.stats.verification.verified, inline_run.stats.verification.verified);
  }
}

// Flat attention over few blocks, so that each of them counts: whatever is left out, repeated or
// taken for another shows in the output.
TEST(Runtime, EverySingleBlockMatters) {
  using Tamper = CheckingDevice::Tamper;
  HarnessOptions options = three_tiers();
  options.content_scale = 0.05f;
  Harness harness(options);
  ASSERT_TRUE(harness.append(256).ok());
  ASSERT_TRUE(harness.step(0, 256).ok());
  EXPECT_LE(max_difference(harness.out(), harness.reference_out()), 1e-4);
  const std::size_t blocks = harness.report().attended.size();
  ASSERT_EQ(blocks, 2u * 64u);
  for (Tamper how : {Tamper::kLeaveOut, Tamper::kRepeat, Tamper::kSwap}) {
    for (std::size_t block = 0; block < blocks; ++block) {
      harness.device().tamper(how, block);
      ASSERT_TRUE(harness.step(0, 256).ok());
      EXPECT_GT(max_difference(harness.out(), harness.reference_out()), 1e-4) << "block " << block;
    }
  }
}

TEST(Runtime, PeaksStayWithinCapacities) {
  HarnessOptions options = three_tiers();
  options.look_ahead_bytes = 1 << 20;
  const RunResult result = run(options);
  for (const TierStats& tier : result.stats.tiers) {
    EXPECT_GT(tier.peak_bytes, 0u);
    EXPECT_LE(tier.peak_bytes, tier.capacity_bytes);
  }
}

void expect_refused(const Status& status, const std::string& part) {
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
  EXPECT_NE(status.message().find(part), std::string::npos) << status.message();
}

TEST(Runtime, RefusesWhatCannotWork) {
  SteadyClock clock;
  HostDevice device(1);
  const std::unique_ptr<Link> link = make_memory_link();
  const Environment world{.clock = &clock, .device = &device, .link = link.get()};
  RuntimeOptions options;
  options.block = HarnessOptions().block;
  options.query_heads = 4;
  options.tokens_max = 512;
  options.selector = make_selector_factory("recency").value();
  const RuntimeNeeds needs = Runtime::needs(options).value();
  options.device_capacity_bytes = needs.device_bytes - 1;
  options.host_capacity_bytes = needs.host_bytes;
  auto opened = Runtime::open(options, world);
  expect_refused(opened.status(), std::to_string(needs.device_bytes));
  options.device_capacity_bytes = needs.device_bytes;
  options.host_capacity_bytes = needs.host_bytes - 1;
  opened = Runtime::open(options, world);
  expect_refused(opened.status(), std::to_string(needs.host_bytes));
  options.host_capacity_bytes = needs.host_bytes;
  options.disk_capacity_bytes = 1 << 20;
  opened = Runtime::open(options, world);
  expect_refused(opened.status(), "the file has 0");
  options.disk_capacity_bytes = 0;
  options.query_heads = 3;
  opened = Runtime::open(options, world);
  expect_refused(opened.status(), "query_heads is 3");
  options.query_heads = 4;
  options.eviction = "mru";
  opened = Runtime::open(options, world);
  expect_refused(opened.status(), "lru");
}

TEST(Runtime, SequencesAreCountedAndKeptApart) {
  HarnessOptions options = three_tiers();
  options.sequences_max = 2;
  options.tokens_max = 256;
  Harness harness(options);
  auto second = harness.runtime().create_sequence({.high = 7, .low = 7});
  ASSERT_TRUE(second.ok());
  EXPECT_EQ(harness.runtime().create_sequence({}).status().code(), StatusCode::kNoSpace);
  const std::vector<float> rows(2 * 8, 9.0f);
  const TokenRows token{.keys = reinterpret_cast<const std::byte*>(rows.data()),
                        .values = reinterpret_cast<const std::byte*>(rows.data()),
                        .key_token_stride = 64,
                        .key_head_stride = 32,
                        .value_token_stride = 64,
                        .value_head_stride = 32,
                        .tokens = 1};
  for (int i = 0; i < 200; ++i) {
    ASSERT_TRUE(harness.append(1).ok());
    ASSERT_TRUE((*second)->append(LayerIndex{0}, token).ok());
    ASSERT_TRUE((*second)->append(LayerIndex{1}, token).ok());
  }
  ASSERT_TRUE(harness.step(0, 200).ok());
  EXPECT_LE(max_difference(harness.out(), harness.reference_out()), kOutputTolerance);
  EXPECT_EQ(harness.device().wrong_blocks(), 0u);
  EXPECT_TRUE((*second)->close().ok());
  ASSERT_TRUE(harness.step(1, 100).ok());
  EXPECT_EQ(harness.device().wrong_blocks(), 0u);
}

}  // namespace
}  // namespace kvtier::testing
