#include "kernels/partial_attention.h"
#include "tests/runtime/harness.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

// What `resolve` gives an engine is what `step` attends; and what engines do with sequences: in any
// order, and wrongly.

namespace kvtier::testing {
namespace {

HarnessOptions roomy(const char* selector) {
  HarnessOptions options;
  options.selector = selector;
  options.estimate_rest = EstimateRest::kNever;
  options.device_bytes = 500 * 256;
  return options;
}

/// Attends what was resolved as an engine would: its own calls, over the slab.
std::vector<float> attend_resolved(Harness& harness, const ResolvedBlocks& resolved,
                                   std::uint32_t queries) {
  const BlockLayout& layout = harness.runtime().layout();
  const std::uint32_t heads = harness.options().query_heads;
  const std::uint32_t group_heads = heads / layout.head_groups();
  std::vector<float> out(std::size_t{queries} * heads * layout.value_dim());
  std::vector<float> lse(std::size_t{queries} * heads);
  std::vector<std::uint32_t> positions;
  for (std::uint32_t q = 0; q < queries; ++q) positions.push_back(harness.tokens() - queries + q);
  std::vector<BlockRange> ranges;
  for (const ResolvedRange& range : resolved.ranges) {
    ranges.push_back({.block = resolved.slab + range.slot.value * resolved.slot_stride_bytes,
                      .first_token = range.first_token,
                      .tokens = range.tokens,
                      .position = range.position});
  }
  std::vector<AttentionTask> tasks;
  for (std::uint32_t group = 0; group < layout.head_groups(); ++group) {
    AttentionTask task;
    task.queries = harness.queries().data() + group * group_heads * layout.head_dim();
    task.query_stride = std::size_t{heads} * layout.head_dim();
    task.query_count = queries;
    task.query_positions = positions;
    const std::uint32_t begin = resolved.group_begins[group];
    task.blocks = std::span<const BlockRange>(ranges).subspan(
        begin, resolved.group_begins[group + 1] - begin);
    task.out = out.data() + group * group_heads * layout.value_dim();
    task.out_stride = std::size_t{heads} * layout.value_dim();
    task.lse = lse.data() + group * group_heads;
    task.lse_stride = heads;
    tasks.push_back(task);
  }
  const AttentionParams params{&layout, heads / harness.options().block.kv_heads,
                               harness.options().softmax};
  EXPECT_TRUE(harness.device().attend(params, tasks).ok());
  return out;
}

TEST(Resolve, GivesTheBlocksThatAStepAttends) {
  for (const char* selector : {"mean(tokens=4)", "scan", "oracle(granularity=token)", "recency"}) {
    for (const bool deterministic : {false, true}) {
      for (const std::uint32_t queries : {1u, 4u}) {
        SCOPED_TRACE(::testing::Message() << selector << ", " << queries << " queries");
        HarnessOptions options = roomy(selector);
        options.deterministic = deterministic;
        Harness harness(options);
        ASSERT_TRUE(harness.append(950).ok());
        ResolvedBlocks resolved;
        const Status status = harness.resolve(1, 200, &resolved, queries);
        ASSERT_TRUE(status.ok()) << status.to_string();
        EXPECT_LE(resolved.tokens_max, 200u);
        const std::vector<ResolvedRange> ranges(resolved.ranges.begin(), resolved.ranges.end());
        const std::vector<float> out = attend_resolved(harness, resolved, queries);
        EXPECT_EQ(harness.device().wrong_blocks(), 0u);
        ASSERT_TRUE(harness.step(1, 200, queries).ok());
        EXPECT_LE(max_difference(out, {harness.out().begin(), harness.out().end()}), 1e-6);
        const std::span<const AttendedRange> attended = harness.report().attended;
        ASSERT_EQ(ranges.size(), attended.size());
        for (std::size_t i = 0; i < ranges.size(); ++i) {
          EXPECT_EQ(ranges[i].head_group, attended[i].head_group);
          EXPECT_EQ(ranges[i].block, attended[i].block);
          EXPECT_EQ(ranges[i].first_token, attended[i].first_token);
          EXPECT_EQ(ranges[i].tokens, attended[i].tokens);
        }
      }
    }
  }
}

TEST(Resolve, HoldsUntilTheNextCall) {
  HarnessOptions options = roomy("recency");
  options.sequences_max = 2;
  options.device_bytes = 0;
  Harness harness(options);
  ASSERT_TRUE(harness.append(600).ok());
  ASSERT_TRUE(harness.copy().ok());
  // What is held must not be in the way of whatever comes next, on tiers of the least size.
  for (int round = 0; round < 20; ++round) {
    ResolvedBlocks resolved;
    harness.use(static_cast<std::size_t>(round) % 2);
    Status status = harness.resolve(0, 60, &resolved);
    ASSERT_TRUE(status.ok()) << status.to_string();
    attend_resolved(harness, resolved, 1);
    (void)harness.runtime().stats();
    (void)harness.sequence().stats();
    attend_resolved(harness, resolved, 1);
    harness.use(static_cast<std::size_t>(round / 2) % 2);
    switch (round % 5) {
      case 0: status = harness.append(3); break;
      case 1: status = harness.truncate(harness.tokens() - 5); break;
      case 2: status = harness.step(1, 400); break;
      case 3: status = harness.attend(1, 20); break;
      case 4: status = harness.resolve(1, 60, &resolved); break;
    }
    ASSERT_TRUE(status.ok()) << status.to_string();
  }
  ResolvedBlocks resolved;
  ASSERT_TRUE(harness.resolve(0, 60, &resolved).ok());
  EXPECT_EQ(harness.device().wrong_blocks(), 0u);
  EXPECT_TRUE(harness.close().ok());
}

TEST(Resolve, NamesTheBytesThatAreMissing) {
  HarnessOptions options = roomy("recency");
  options.device_bytes = 0;
  Harness harness(options);
  ASSERT_TRUE(harness.append(1000).ok());
  ResolvedBlocks resolved;
  const Status status = harness.resolve(0, 900, &resolved);
  EXPECT_EQ(status.code(), StatusCode::kNoSpace);
  EXPECT_NE(status.to_string().find("bytes of device slots"), std::string::npos)
      << status.to_string();
  EXPECT_TRUE(resolved.ranges.empty());
  // Nothing is held, and a step, which goes in waves, still answers.
  ASSERT_TRUE(harness.step(0, 900).ok());
  EXPECT_LE(max_difference(harness.out(), harness.reference_out()), kOutputTolerance);
}

TEST(Resolve, UnderFaultsItIsRightOrNamesTheBlock) {
  int failed = 0;
  for (std::uint32_t seed = 1; seed <= 16; ++seed) {
    SCOPED_TRACE(seed);
    HarnessOptions options = roomy("random");
    options.verify = VerifyMode::kAll;
    options.faults = FaultPlan::parse("bitflip:disk:0.3,eio:0.1,rot:0.1,bitflip:link:0.05,seed=" +
                                      std::to_string(seed))
                         .value();
    Harness harness(options);
    (void)harness.append(1000);
    for (int i = 0; i < 4; ++i) {
      ResolvedBlocks resolved;
      const Status status = harness.resolve(static_cast<std::uint32_t>(i) % 2, 300, &resolved);
      if (status.ok()) {
        attend_resolved(harness, resolved, 1);
        continue;
      }
      ++failed;
      EXPECT_FALSE(resolved.failures.empty()) << status.to_string();
    }
    EXPECT_EQ(harness.device().wrong_blocks(), 0u);
  }
  EXPECT_GT(failed, 0);
}

TEST(Engine, SequencesTakeTurnsAndAnswerForThemselves) {
  HarnessOptions options = roomy("mean(tokens=4)");
  options.sequences_max = 3;
  options.device_bytes = 0;
  options.deterministic = true;
  Harness harness(options);
  HarnessOptions single = options;
  single.sequences_max = 1;
  Harness alone(single);
  ASSERT_TRUE(harness.append(300).ok());
  ASSERT_TRUE(alone.append(300).ok());
  for (int other = 0; other < 2; ++other) {
    harness.use(0);
    ASSERT_TRUE(harness.copy().ok());
  }
  for (int token = 0; token < 30; ++token) {
    for (std::uint32_t layer = 0; layer < 2; ++layer) {
      for (std::size_t i = 0; i < 3; ++i) {
        harness.use(i);
        if (layer == 0) {
          ASSERT_TRUE(harness.append(1 + static_cast<std::uint32_t>(i)).ok());
        }
        ASSERT_TRUE(harness.step(layer, 90 + static_cast<std::uint32_t>(i)).ok());
        EXPECT_LE(max_difference(harness.out(), harness.reference_out()), kOutputTolerance);
        if (i > 0) continue;
        if (layer == 0) {
          ASSERT_TRUE(alone.append(1).ok());
        }
        ASSERT_TRUE(alone.step(layer, 90).ok());
        EXPECT_EQ(harness.out(), alone.out());
      }
    }
  }
  EXPECT_EQ(harness.device().wrong_blocks(), 0u);
}

TEST(Engine, StatisticsOfASequence) {
  HarnessOptions options = roomy("recency");
  options.host_bytes = 4'000'000;
  Harness harness(options);
  EXPECT_EQ(harness.sequence().stats().blocks, 0u);
  ASSERT_TRUE(harness.append(1000).ok());
  const SequenceStats stats = harness.sequence().stats();
  const RuntimeStats runtime = harness.runtime().stats();
  EXPECT_EQ(stats.blocks, 4 * 250u);
  EXPECT_EQ(stats.device_bytes, runtime.tiers[0].used_bytes);
  EXPECT_EQ(stats.blocks_resident * 256, stats.device_bytes);
  EXPECT_EQ(stats.host_bytes, runtime.tiers[1].used_bytes);
  EXPECT_EQ(stats.disk_bytes, runtime.tiers[2].used_bytes);
  EXPECT_EQ(stats.shared_bytes, 0u);
}

TEST(Engine, CallsOutOfTurnEndInAStatus) {
  HarnessOptions options;
  options.sequences_max = 2;
  Harness harness(options);
  ResolvedBlocks resolved;
  EXPECT_EQ(harness.step(0, 100).code(), StatusCode::kInvalidArgument) << "before any append";
  EXPECT_EQ(harness.resolve(0, 100, &resolved).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(harness.runtime().close().code(), StatusCode::kBusy);
  ASSERT_TRUE(harness.append(100).ok());
  EXPECT_EQ(harness.sequence().append(LayerIndex{2}, {.tokens = 1}).code(),
            StatusCode::kInvalidArgument);
  EXPECT_EQ(harness.sequence().append(LayerIndex{0}, {.tokens = 1}).code(),
            StatusCode::kInvalidArgument)
      << "without keys";
  EXPECT_EQ(harness.sequence().step({.layer = LayerIndex{0}, .budget_tokens = 100}, nullptr).code(),
            StatusCode::kInvalidArgument)
      << "without queries";

  auto closed = harness.runtime().create_sequence({.high = 77, .low = 1}).value();
  ASSERT_TRUE(closed->close().ok());
  const float query[32] = {};
  float out[32];
  float lse[4];
  const StepRequest request{
      .layer = LayerIndex{0}, .queries = query, .budget_tokens = 100, .out = out, .lse = lse};
  const auto* rows = reinterpret_cast<const std::byte*>(query);
  for (const Status& status :
       {closed->close(), closed->append(LayerIndex{0}, {.keys = rows, .values = rows, .tokens = 1}),
        closed->truncate(0), closed->observe_prompt(LayerIndex{0}, {}), closed->hint(request),
        closed->step(request, nullptr), closed->resolve(request, &resolved),
        closed->attend({.layer = LayerIndex{0}, .queries = query, .out = out, .lse = lse}, nullptr),
        closed->fork(0, {.high = 78, .low = 1}).status()}) {
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument) << status.to_string();
    EXPECT_NE(status.to_string().find("closed"), std::string::npos) << status.to_string();
  }
  EXPECT_EQ(closed->tokens(LayerIndex{0}), 0u);
  EXPECT_EQ(closed->stats().blocks, 0u);
  // The other goes on.
  ASSERT_TRUE(harness.step(0, 100).ok());
}

}  // namespace
}  // namespace kvtier::testing
