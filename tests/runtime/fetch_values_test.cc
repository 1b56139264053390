#include "tests/allocation_counter.h"
#include "tests/runtime/harness.h"

#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

// Steps whose keys are the selector's: values alone cross the link, and what then lies on the
// device is never taken for a whole block.

namespace kvtier::testing {
namespace {

HarnessOptions values_options() {
  HarnessOptions options;
  options.selector = "scan(fetch=values)";
  options.estimate_rest = EstimateRest::kNever;
  options.verify = VerifyMode::kAll;
  return options;
}

std::uint64_t moved_to_device(Harness& harness) {
  return harness.runtime().stats().routes[static_cast<std::size_t>(Route::kHostToDevice)].bytes;
}

std::uint32_t kept_tokens(const Harness& harness) {
  std::uint32_t tokens = 0;
  for (const AttendedRange& range : harness.report().attended) {
    if (range.kept_keys) tokens += range.tokens;
  }
  return tokens;
}

void expect_the_reference(const Harness& harness) {
  EXPECT_LE(max_difference(harness.out(), harness.reference_out()), kOutputTolerance);
}

TEST(FetchValues, AnswersWithKeptKeysAndMovesHalfTheBytes) {
  for (const char* family : {"scan", "two-stage", "refresh(interval=2)/scan"}) {
    for (const bool deterministic : {false, true}) {
      HarnessOptions options = values_options();
      options.deterministic = deterministic;
      options.selector = family;
      Harness both(options);
      options.selector = std::string(family) + "(fetch=values)";
      Harness values(options);
      for (Harness* harness : {&both, &values}) ASSERT_TRUE(harness->append(700).ok());
      for (std::uint32_t step = 0; step < 6; ++step) {
        for (Harness* harness : {&both, &values}) {
          ASSERT_TRUE(harness->append(1).ok());
          ASSERT_TRUE(harness->step(0, 120 + 8 * step).ok());
        }
        EXPECT_EQ(kept_tokens(both), 0u);
        EXPECT_GT(kept_tokens(values), 0u);
        expect_the_reference(both);
        expect_the_reference(values);
      }
      // The same blocks were missing, and keys and values are of one size.
      EXPECT_GT(moved_to_device(both), 0u);
      EXPECT_EQ(2 * moved_to_device(values), moved_to_device(both)) << family;
      EXPECT_EQ(values.device().wrong_blocks(), 0u);
      EXPECT_EQ(values.runtime().stats().verification.mismatched, 0u);
    }
  }
}

// Unequal dims: what moves is the values' share, and of it no padding.
TEST(FetchValues, MovesTheValuesShareWhateverTheDims) {
  HarnessOptions options = values_options();
  options.block.value_dim = 24;
  options.block.kv_heads_per_block = 2;
  options.selector = "scan(bits=2,fetch=values)";
  Harness harness(options);
  ASSERT_TRUE(harness.append(700).ok());
  ASSERT_TRUE(harness.step(1, 120).ok());
  expect_the_reference(harness);
  const RuntimeStats stats = harness.runtime().stats();
  const std::uint64_t missed = stats.tiers[1].hits + stats.tiers[2].hits;
  EXPECT_GT(missed, 0u);
  EXPECT_EQ(moved_to_device(harness), missed * 2 * 4 * 24 * sizeof(float));
}

TEST(FetchValues, OneAndSeveralThreadsAndARepeatedRunAgreeBitForBit) {
  std::vector<std::vector<float>> outs;
  for (const bool threads : {false, true, true}) {
    HarnessOptions options = values_options();
    options.transfer_threads = threads;
    options.look_ahead_bytes = 36 * 1024;
    options.estimate_rest = EstimateRest::kMeasured;
    Harness harness(options);
    ASSERT_TRUE(harness.append(700).ok());
    std::vector<float> all;
    for (std::uint32_t step = 0; step < 12; ++step) {
      ASSERT_TRUE(harness.append(1).ok());
      for (const std::uint32_t layer : {0u, 1u}) {
        ASSERT_TRUE(harness.step(layer, 120).ok());
        all.insert(all.end(), harness.out().begin(), harness.out().end());
      }
    }
    outs.push_back(all);
  }
  EXPECT_EQ(outs[0], outs[1]);
  EXPECT_EQ(outs[1], outs[2]);
}

// What is resident decides whose keys are used, unless results must not depend on it.
TEST(FetchValues, ResidentBlocksAreUsedWholeUnlessDeterministic) {
  for (const bool deterministic : {false, true}) {
    HarnessOptions options = values_options();
    options.deterministic = deterministic;
    Harness small(options);
    options.device_bytes = 1 << 20;
    Harness large(options);
    for (Harness* harness : {&small, &large}) {
      ASSERT_TRUE(harness->append(700).ok());
      ASSERT_TRUE(harness->step(0, 120).ok());
      expect_the_reference(*harness);
    }
    EXPECT_EQ(moved_to_device(large), 0u);
    EXPECT_EQ(kept_tokens(large) > 0, deterministic);
    EXPECT_EQ(small.out() == large.out(), deterministic);
  }
}

// Whoever needs the keys has them brought to the values that are there.
TEST(FetchValues, ExactAttentionAndAnEngineGetWholeBlocks) {
  for (const bool resolve : {false, true}) {
    HarnessOptions options = values_options();
    options.tokens_max = 400;
    options.device_bytes = 40 * 1024;
    Harness harness(options);
    ASSERT_TRUE(harness.append(400).ok());
    ASSERT_TRUE(harness.step(0, 200).ok());
    ASSERT_GT(kept_tokens(harness), 0u);
    const std::uint64_t before = moved_to_device(harness);
    if (resolve) {
      ResolvedBlocks resolved;
      ASSERT_TRUE(harness.resolve(0, 200, &resolved).ok());
      EXPECT_GT(moved_to_device(harness), before);
    } else {
      ASSERT_TRUE(harness.attend(0, 1).ok());
      EXPECT_LE(max_difference(harness.out(), harness.exact_reference()), kOutputTolerance);
    }
    EXPECT_EQ(harness.device().wrong_blocks(), 0u);
    // What was resolved is resident, and whole now: the step needs no kept keys.
    if (!resolve) continue;
    ASSERT_TRUE(harness.step(0, 120).ok());
    expect_the_reference(harness);
  }
}

// The sample of a measurement is of the blocks themselves.
TEST(FetchValues, MeasurementsReadWholeBlocks) {
  HarnessOptions options = values_options();
  options.estimate_rest = EstimateRest::kMeasured;
  Harness harness(options);
  ASSERT_TRUE(harness.append(700).ok());
  for (std::uint32_t step = 0; step < 20; ++step) {
    ASSERT_TRUE(harness.append(1).ok());
    ASSERT_TRUE(harness.step(0, 120).ok());
    const float* attended = harness.report().attended_out;
    EXPECT_LE(max_difference({attended, attended + harness.out().size()}, harness.reference_out()),
              kOutputTolerance);
  }
  EXPECT_GE(harness.runtime().stats().steps_measured, 2u);
  EXPECT_EQ(harness.device().wrong_blocks(), 0u);
}

// After a cut the window reaches back to blocks of which values alone may be there, a block that is
// cut is reopened whole, and kept keys are those of the tokens that stand there now.
TEST(FetchValues, TruncatedForkedAndCopiedSequencesAnswerAlike) {
  for (const bool deterministic : {false, true}) {
    HarnessOptions options = values_options();
    options.deterministic = deterministic;
    options.sequences_max = 3;
    options.window = 24;
    Harness harness(options);
    ASSERT_TRUE(harness.append(650).ok());
    const auto decode = [&](std::uint32_t steps) {
      for (std::uint32_t step = 0; step < steps; ++step) {
        ASSERT_TRUE(harness.append(1).ok());
        ASSERT_TRUE(harness.step(step % 2, 150, 1 + step % 3).ok());
        expect_the_reference(harness);
      }
    };
    decode(6);
    for (const std::uint32_t cut : {641u, 600u, 517u, 300u}) {
      ASSERT_TRUE(harness.truncate(cut).ok()) << cut;
      decode(3);
    }
    ASSERT_TRUE(harness.append(300).ok());
    decode(2);
    ASSERT_TRUE(harness.fork(harness.tokens() - 33).ok());
    decode(4);
    harness.use(0);
    decode(4);
    EXPECT_EQ(harness.device().wrong_blocks(), 0u);
    EXPECT_EQ(harness.runtime().stats().verification.mismatched, 0u);
    if (!deterministic) continue;
    // A copy that nobody shares anything with.
    harness.use(1);
    ASSERT_TRUE(harness.step(0, 150).ok());
    const std::vector<float> forked = harness.out();
    ASSERT_TRUE(harness.copy().ok());
    ASSERT_TRUE(harness.step(0, 150).ok());
    EXPECT_EQ(harness.out(), forked);
  }
}

// Two sequences share blocks, and the run of keys that the shared extent ends in goes on
// differently: neither answers with the other's codes, whoever fetched the block.
TEST(FetchValues, AForkKeepsItsOwnKeys) {
  HarnessOptions options = values_options();
  options.deterministic = true;
  options.sequences_max = 3;
  options.block.value_dim = 16;
  Harness harness(options);
  const std::uint32_t extent = harness.runtime().layout().tokens_per_extent();
  ASSERT_NE(extent % 64, 0u);
  ASSERT_TRUE(harness.append(extent).ok());
  ASSERT_TRUE(harness.fork(extent).ok());
  for (const std::size_t sequence : {0u, 1u, 0u, 1u}) {
    harness.use(sequence);
    ASSERT_TRUE(harness.append(100).ok());
    ASSERT_TRUE(harness.step(0, 200).ok());
    expect_the_reference(harness);
  }
}

// Damage of the values on their way is found and mended by copying again; damage that stays fails
// the step and is named.
TEST(FetchValues, DamagedValuesFailClosed) {
  for (const double rate : {0.02, 1.0}) {
    HarnessOptions options = values_options();
    Harness sound(options);
    ASSERT_TRUE(sound.append(700).ok());
    options.faults.seed = 3;
    options.faults.link_bitflip_rate = rate;
    Harness harness(options);
    const Status appended = harness.append(700);
    EXPECT_EQ(appended.ok(), rate < 1.0);
    for (std::uint32_t step = 0; step < 20; ++step) {
      const Status status = harness.step(0, 100 + step);
      if (status.ok()) {
        expect_the_reference(harness);
        continue;
      }
      EXPECT_EQ(status.code(), StatusCode::kCorrupt);
      ASSERT_FALSE(harness.report().failures.empty());
      EXPECT_TRUE(std::isnan(harness.out().front()));
    }
    const RuntimeStats stats = harness.runtime().stats();
    EXPECT_GT(stats.verification.mismatched, 0u);
    EXPECT_EQ(stats.verification.recovered > 0, rate < 1.0);
    EXPECT_EQ(harness.device().wrong_blocks(), 0u);
  }
}

TEST(FetchValues, DecodingAllocatesNothingInTheLongRun) {
  for (const char* selector : {"scan(fetch=values)", "two-stage(fetch=values)"}) {
    HarnessOptions options = values_options();
    options.verify = VerifyMode::kArrivals;
    options.selector = selector;
    options.tokens_max = 1600;
    Harness harness(options);
    ASSERT_TRUE(harness.append(700).ok());
    const auto decode = [&](std::uint32_t tokens) {
      for (std::uint32_t i = 0; i < tokens; ++i) {
        ASSERT_TRUE(harness.append(1).ok());
        for (const std::uint32_t layer : {0u, 1u}) ASSERT_TRUE(harness.step(layer, 160).ok());
      }
    };
    decode(40);
    const std::uint64_t allocations = allocation_count();
    decode(100);
    EXPECT_EQ(allocation_count() - allocations, 0u) << selector;
  }
}

}  // namespace
}  // namespace kvtier::testing
