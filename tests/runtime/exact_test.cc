#include "tests/runtime/harness.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <map>
#include <string>
#include <vector>

// Exact attention over all tiers: right at every capacity, under faults right or named, and a guest
// in the tiers that steps use.

namespace kvtier::testing {
namespace {

TEST(Exact, AgreesWithTheReferenceAtEveryCapacity) {
  std::map<std::uint32_t, std::vector<double>> references;
  for (const bool deterministic : {false, true}) {
    std::vector<float> first;
    for (const std::size_t device_bytes : {0u, 40'000u, 120'000u, 2'000'000u}) {
      for (const std::size_t host_bytes : {0u, 4'000'000u}) {
        for (const bool threads : {false, true}) {
          HarnessOptions options;
          options.device_bytes = device_bytes;
          options.host_bytes = host_bytes;
          options.deterministic = deterministic;
          options.transfer_threads = threads;
          options.softmax.logit_cap = 5.0f;
          Harness harness(options);
          ASSERT_TRUE(harness.append(600).ok());
          std::vector<float> all;
          for (const std::uint32_t queries : {1u, 7u, 8u, 9u, 130u, 600u}) {
            const Status status = harness.attend(1, queries);
            ASSERT_TRUE(status.ok()) << status.to_string();
            std::vector<double>& reference = references[queries];
            if (reference.empty()) reference = harness.exact_reference();
            EXPECT_LE(max_difference(harness.out(), reference), kOutputTolerance) << queries;
            all.insert(all.end(), harness.out().begin(), harness.out().end());
          }
          EXPECT_EQ(harness.device().wrong_blocks(), 0u);
          EXPECT_EQ(harness.report().attended_tokens_max, 600u);
          EXPECT_EQ(harness.report().attended_tokens_total, 1200u);
          if (first.empty()) first = all;
          if (deterministic) {
            EXPECT_EQ(all, first) << device_bytes << " " << host_bytes;
          }
        }
      }
    }
  }
}

TEST(Exact, APromptInChunksFromTheFirstOn) {
  HarnessOptions options;
  options.sink_logits.assign(8, 0.5f);
  Harness harness(options);
  for (const std::uint32_t chunk : {1u, 300u, 37u, 200u}) {
    ASSERT_TRUE(harness.append(chunk).ok());
    for (std::uint32_t layer = 0; layer < 2; ++layer) {
      ASSERT_TRUE(harness.attend(layer, chunk).ok());
      EXPECT_LE(max_difference(harness.out(), harness.exact_reference()), kOutputTolerance);
    }
  }
  EXPECT_EQ(harness.runtime().stats().attends, 8u);
  EXPECT_EQ(harness.runtime().stats().steps, 0u);
}

TEST(Exact, AStreamLeavesMostOfWhatStepsUse) {
  for (const char* eviction : {"lru", "lrfu"}) {
    SCOPED_TRACE(eviction);
    HarnessOptions options;
    options.layers = 1;
    options.selector = "recency";
    options.eviction = eviction;
    options.tokens_max = 4000;
    options.device_bytes = 400 * 256;  // Slots for 400 blocks of 2,000.
    options.host_bytes = 4'000'000;
    Harness harness(options);
    ASSERT_TRUE(harness.append(4000).ok());
    const auto step = [&] { ASSERT_TRUE(harness.step(0, 600).ok()); };
    const auto moved = [&] {
      return harness.runtime()
          .stats()
          .routes[static_cast<std::size_t>(Route::kHostToDevice)]
          .submitted_bytes;
    };
    for (int i = 0; i < 4; ++i) step();
    const std::uint64_t before = moved();
    step();
    ASSERT_EQ(moved(), before) << "a step that repeats finds everything";
    const RuntimeStats stats = harness.runtime().stats();
    ASSERT_TRUE(harness.attend(0, 100).ok());
    EXPECT_LE(max_difference(harness.out(), harness.exact_reference()), kOutputTolerance);
    const std::uint64_t streamed = moved();
    EXPECT_GT(streamed - before, 1000u * 256) << "most of it was not there";
    step();
    EXPECT_LE(moved() - streamed, (streamed - before) / 20);
    const RuntimeStats after = harness.runtime().stats();
    EXPECT_EQ(after.tiers[1].hits - stats.tiers[1].hits, (moved() - streamed) / 256);
  }
}

TEST(Exact, HostFramesAreLeftToStepsToo) {
  HarnessOptions options;
  options.layers = 1;
  options.selector = "recency";
  options.tokens_max = 8000;
  options.host_bytes = 40 * options.block.extent_bytes;
  Harness harness(options);
  ASSERT_TRUE(harness.append(8000).ok());
  const auto read = [&] {
    return harness.runtime()
        .stats()
        .routes[static_cast<std::size_t>(Route::kDiskToHost)]
        .submitted_bytes;
  };
  for (int i = 0; i < 3; ++i) ASSERT_TRUE(harness.step(0, 1200).ok());
  const std::uint64_t before = read();
  ASSERT_TRUE(harness.step(0, 1200).ok());
  ASSERT_EQ(read(), before);
  ASSERT_TRUE(harness.attend(0, 20).ok());
  const std::uint64_t streamed = read();
  ASSERT_GT(streamed - before, 40 * options.block.extent_bytes);
  ASSERT_TRUE(harness.step(0, 1200).ok());
  EXPECT_LE(read() - streamed, 5 * options.block.extent_bytes);
}

TEST(Exact, UnderFaultsItIsRightOrNamesTheBlock) {
  int failed = 0;
  for (std::uint32_t seed = 1; seed <= 24; ++seed) {
    SCOPED_TRACE(seed);
    HarnessOptions options;
    options.verify = VerifyMode::kAll;
    options.deterministic = seed % 2 == 0;
    options.faults = FaultPlan::parse(
                         "bitflip:disk:0.2,eio:0.1,shortread:0.1,rot:0.05,"
                         "bitflip:link:0.05,seed=" +
                         std::to_string(seed))
                         .value();
    Harness harness(options);
    (void)harness.append(1000);
    for (const std::uint32_t queries : {1u, 50u}) {
      const Status status = harness.attend(seed % 2, queries);
      if (status.ok()) {
        EXPECT_LE(max_difference(harness.out(), harness.exact_reference()), kOutputTolerance);
        continue;
      }
      ++failed;
      EXPECT_FALSE(harness.report().failures.empty()) << status.to_string();
      for (const float value : harness.out()) EXPECT_TRUE(value != value);
      for (const float value : harness.lse()) EXPECT_TRUE(value != value);
    }
    EXPECT_EQ(harness.device().wrong_blocks(), 0u);
  }
  EXPECT_GT(failed, 0);
}

TEST(Exact, MisuseEndsInAStatus) {
  Harness harness({});
  std::vector<float> queries(2 * 4 * 8, 0.1f);
  std::vector<float> out(queries.size());
  std::vector<float> lse(8);
  Sequence& sequence = harness.sequence();
  ExactRequest request{.layer = LayerIndex{0},
                       .queries = queries.data(),
                       .query_count = 1,
                       .out = out.data(),
                       .lse = lse.data()};
  EXPECT_EQ(sequence.attend(request, nullptr).code(), StatusCode::kInvalidArgument)
      << "nothing was appended";
  ASSERT_TRUE(harness.append(1).ok());
  EXPECT_TRUE(harness.attend(0, 1).ok());
  request.query_count = 2;
  EXPECT_EQ(sequence.attend(request, nullptr).code(), StatusCode::kInvalidArgument);
  request.query_count = 1;
  request.layer = LayerIndex{2};
  EXPECT_EQ(sequence.attend(request, nullptr).code(), StatusCode::kInvalidArgument);
  request.layer = LayerIndex{0};
  queries[3] = std::numeric_limits<float>::infinity();
  EXPECT_EQ(sequence.attend(request, nullptr).code(), StatusCode::kInvalidArgument);
  EXPECT_TRUE(out[0] != out[0]);
  queries[3] = 0.0f;
  request.out = nullptr;
  EXPECT_EQ(sequence.attend(request, nullptr).code(), StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace kvtier::testing
