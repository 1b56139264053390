#include "selectors/registry.h"
#include "tests/allocation_counter.h"
#include "tests/runtime/harness.h"

#include <gtest/gtest.h>

#include <string>

namespace kvtier::testing {
namespace {

// Tokens come, blocks seal, extents go to disk and come back: nothing of it asks for memory once
// the lists of a step's work have seen a large step.
TEST(Allocation, DecodingAllocatesNothingInTheLongRun) {
  for (const bool threads : {false, true}) {
    for (const char* eviction : {"lru", "lrfu"}) {
      HarnessOptions options;
      options.selector = "landmark(tokens=4)";
      options.eviction = eviction;
      options.transfer_threads = threads;
      options.look_ahead_bytes = 36 * 1024;
      options.tokens_max = 1600;
      Harness harness(options);
      ASSERT_TRUE(harness.append(1000).ok());
      const auto decode = [&](std::uint32_t tokens, std::uint32_t budget) {
        for (std::uint32_t i = 0; i < tokens; ++i) {
          ASSERT_TRUE(harness.append(1).ok());
          for (std::uint32_t layer : {0u, 1u}) ASSERT_TRUE(harness.step(layer, budget).ok());
        }
      };
      decode(200, 260);
      const RuntimeStats before = harness.runtime().stats();
      const std::uint64_t allocations = allocation_count();
      decode(150, 240);
      EXPECT_EQ(allocation_count() - allocations, 0u) << eviction << ", threads " << threads;
      const RuntimeStats after = harness.runtime().stats();
      EXPECT_GT(after.tiers[2].hits, before.tiers[2].hits);
      EXPECT_GT(after.tiers[2].used_bytes, before.tiers[2].used_bytes);
      EXPECT_EQ(harness.device().wrong_blocks(), 0u);
    }
  }
}

// The same where the rest is estimated, and its samples measured: the steps that measure are among
// the counted ones, and what they keep has its size from the start, so that the first large sample
// is not a step that asks for memory.
TEST(Allocation, EstimatingAndMeasuringAllocateNothing) {
  for (const char* selector : {"scan", "two-stage"}) {
    HarnessOptions options;
    options.selector = selector;
    options.look_ahead_bytes = 36 * 1024;
    options.tokens_max = 3200;
    Harness harness(options);
    ASSERT_TRUE(harness.append(700).ok());
    const auto decode = [&](std::uint32_t tokens, std::uint32_t budget) {
      for (std::uint32_t i = 0; i < tokens; ++i) {
        ASSERT_TRUE(harness.append(1).ok());
        for (std::uint32_t layer : {0u, 1u}) ASSERT_TRUE(harness.step(layer, budget).ok());
      }
    };
    decode(30, 160);
    const RuntimeStats before = harness.runtime().stats();
    // Behind the warm-up the context grows, and the samples with it.
    ASSERT_TRUE(harness.append(1900).ok());
    const std::uint64_t allocations = allocation_count();
    // Measured are steps 1, 9, 25, 57 and 121, so two of these.
    decode(120, 140);
    EXPECT_EQ(allocation_count() - allocations, 0u) << selector;
    const RuntimeStats after = harness.runtime().stats();
    EXPECT_GT(after.steps_measured, before.steps_measured) << selector;
    EXPECT_GT(after.tiers[2].hits, before.tiers[2].hits);
    EXPECT_EQ(harness.device().wrong_blocks(), 0u);
  }
}

// Every selector that needs nothing beside keys, values and queries (and no file of head classes);
// a step of the whole runtime.
TEST(Allocation, AStepAllocatesNothingWhateverTheSelector) {
  std::uint32_t tried = 0;
  for (const SelectorListing& listing : known_selectors()) {
    const SelectorNeeds& needs = listing.needs;
    if (needs.landmark_tokens || needs.sentence_ends || needs.external_scores) continue;
    if (listing.name == "head-class") continue;
    HarnessOptions options;
    options.selector = listing.decorates ? listing.name + "/mean" : listing.name;
    options.tokens_max = 1200;
    Harness harness(options);
    ASSERT_TRUE(harness.append(700).ok()) << options.selector;
    const auto decode = [&](std::uint32_t tokens, std::uint32_t budget) {
      for (std::uint32_t i = 0; i < tokens; ++i) {
        ASSERT_TRUE(harness.append(1).ok()) << options.selector;
        for (std::uint32_t layer : {0u, 1u}) {
          const Status status = harness.step(layer, budget);
          ASSERT_TRUE(status.ok()) << options.selector << ": " << status.to_string();
        }
      }
    };
    decode(60, 160);
    const std::uint64_t allocations = allocation_count();
    decode(60, 140);
    EXPECT_EQ(allocation_count() - allocations, 0u) << options.selector;
    ++tried;
  }
  EXPECT_GE(tried, 20u);
}

}  // namespace
}  // namespace kvtier::testing
