// Several tiers: what each holds, finds and writes.

#include "tests/simulate/trace_builders.h"
#include "tools/simulate/cache_run.h"
#include "tools/simulate/reuse_profile.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>

namespace kvtier {
namespace {

SimulationRun run_tiers(const RequestTrace& trace, std::string policy, Hierarchy hierarchy,
                        std::vector<TierSpec> tiers) {
  return run_cache(
      trace, {.policy = std::move(policy), .tiers = std::move(tiers), .hierarchy = hierarchy});
}

TEST(CacheHierarchy, InclusiveLruTiersAreLruOfTheirCapacities) {
  std::mt19937_64 random(21);
  const RequestTrace trace = make_request_trace(random_chained(random, 400, 7, 3));
  const ReuseProfile profile = ReuseProfile::measure(trace, TouchOrder::kLastFirst);
  const SimulationRun run =
      run_tiers(trace, "lru", Hierarchy::kInclusive, {{"device", 5}, {"host", 20}, {"disk", 90}});
  EXPECT_EQ(run.capacity_blocks, 90u);
  EXPECT_EQ(run.hits, profile.lru(90).hits);
  std::uint64_t hits = 0;
  for (const TierResult& tier : run.tiers) {
    hits += tier.hit_blocks;
    const TierResult alone = profile.lru(*tier.capacity_blocks).tiers.front();
    EXPECT_EQ(hits, alone.hit_blocks) << tier.name;
    EXPECT_EQ(tier.inserted_blocks, alone.inserted_blocks) << tier.name;
    EXPECT_EQ(tier.inserted_tokens, alone.inserted_tokens) << tier.name;
    EXPECT_EQ(tier.evicted_blocks, alone.evicted_blocks) << tier.name;
  }
}

TEST(CacheHierarchy, ExclusiveLruTiersAreOneLongList) {
  std::mt19937_64 random(22);
  const RequestTrace trace = make_request_trace(random_chained(random, 400, 7, 3));
  const ReuseProfile profile = ReuseProfile::measure(trace, TouchOrder::kLastFirst);
  const SimulationRun run =
      run_tiers(trace, "lru", Hierarchy::kExclusive, {{"device", 5}, {"host", 15}, {"disk", 70}});
  EXPECT_EQ(run.capacity_blocks, 90u);
  EXPECT_EQ(run.hits, profile.lru(90).hits);
  // With chained ids a prefix is never deeper than what follows, so tiers split the list.
  EXPECT_EQ(run.tiers[0].hit_blocks, profile.lru(5).hits.hit_blocks);
  EXPECT_EQ(run.tiers[0].hit_blocks + run.tiers[1].hit_blocks, profile.lru(20).hits.hit_blocks);
  EXPECT_EQ(run.tiers[0].hit_tokens + run.tiers[1].hit_tokens + run.tiers[2].hit_tokens,
            run.hits.hit_tokens);
  // What leaves a tier enters the next, and nothing else does.
  EXPECT_EQ(run.tiers[0].evicted_blocks, run.tiers[1].inserted_blocks);
  EXPECT_EQ(run.tiers[1].evicted_blocks, run.tiers[2].inserted_blocks);
  EXPECT_EQ(run.tiers[2].evicted_blocks, profile.lru(90).tiers.front().evicted_blocks);
}

class EveryPolicy : public testing::TestWithParam<std::string> {};

TEST_P(EveryPolicy, OneTierIsTheSameInEitherHierarchy) {
  std::mt19937_64 random(23);
  const RequestTrace trace = make_request_trace(random_unchained(random, 300, 10, 60));
  const auto inclusive = run_tiers(trace, GetParam(), Hierarchy::kInclusive, {{"host", 17}});
  EXPECT_EQ(inclusive, run_tiers(trace, GetParam(), Hierarchy::kExclusive, {{"host", 17}}));
  EXPECT_GT(inclusive.hits.hit_blocks, 0u);
  EXPECT_EQ(inclusive.tiers[0].hit_blocks, inclusive.hits.hit_blocks);
}

TEST_P(EveryPolicy, HitsOfTiersAddUpAndBooksBalance) {
  std::mt19937_64 random(24);
  const RequestTrace trace = make_request_trace(random_unchained(random, 400, 10, 90));
  for (const Hierarchy hierarchy : {Hierarchy::kInclusive, Hierarchy::kExclusive}) {
    const SimulationRun run =
        run_tiers(trace, GetParam(), hierarchy, {{"device", 4}, {"host", 12}, {"disk", 40}});
    std::uint64_t blocks = 0;
    std::uint64_t tokens = 0;
    for (const TierResult& tier : run.tiers) {
      blocks += tier.hit_blocks;
      tokens += tier.hit_tokens;
      EXPECT_LE(*tier.inserted_blocks - *tier.evicted_blocks, trace.references().size());
    }
    EXPECT_EQ(blocks, run.hits.hit_blocks);
    EXPECT_EQ(tokens, run.hits.hit_tokens);
    // Inclusive: what is in the tiers at the end came in and did not leave.
    if (hierarchy == Hierarchy::kInclusive) {
      EXPECT_LE(*run.tiers[0].inserted_blocks - *run.tiers[0].evicted_blocks, 4u);
      EXPECT_LE(*run.tiers[2].inserted_blocks - *run.tiers[2].evicted_blocks, 40u);
    }
    // The last inclusive tier sees every use, as if it were alone.
    if (hierarchy == Hierarchy::kInclusive) {
      const auto alone = run_tiers(trace, GetParam(), hierarchy, {{"disk", 40}});
      EXPECT_EQ(run.hits, alone.hits);
      EXPECT_EQ(run.tiers[2].inserted_blocks, alone.tiers[0].inserted_blocks);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, EveryPolicy,
                         testing::Values("lru", "fifo", "s3-fifo", "sieve", "arc", "gdsf"),
                         [](const auto& info) {
                           std::string name = info.param;
                           std::erase(name, '-');
                           return name;
                         });

}  // namespace
}  // namespace kvtier
