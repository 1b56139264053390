// The offline optimum against every possible choice, and its parts.

#include "tests/simulate/trace_builders.h"
#include "tools/simulate/cache_run.h"
#include "tools/simulate/offline_optimum.h"
#include "tools/simulate/reuse_profile.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <bit>
#include <map>
#include <random>
#include <set>

namespace kvtier {
namespace {

SimulationRun optimum(const RequestTrace& trace, std::uint64_t capacity) {
  const OptimalTier tier{"cache", capacity, capacity};
  return simulate_optimal(trace, NextUses(trace), std::span(&tier, 1));
}

/// The most block hits that any choice of what to keep after each request gives: all subsets of
/// what is resident and what was requested are tried.
std::uint64_t best_by_force(const RequestTrace& trace, int capacity) {
  std::map<std::uint32_t, std::uint64_t> best = {{0, 0}};  // Kept blocks to hits so far.
  for (const TraceRequest& request : trace.requests()) {
    const auto blocks = trace.blocks_of(request);
    std::uint32_t requested = 0;
    for (const BlockNumber block : blocks) requested |= 1u << block;
    std::map<std::uint32_t, std::uint64_t> next;
    for (const auto& [kept, hits_before] : best) {
      std::uint64_t hits = hits_before;
      for (std::size_t i = 0; i < blocks.size() && (kept >> blocks[i] & 1) != 0; ++i) ++hits;
      const std::uint32_t all = kept | requested;
      for (std::uint32_t choice = all;; choice = (choice - 1) & all) {
        if (std::popcount(choice) <= capacity) {
          std::uint64_t& most = next[choice];
          most = std::max(most, hits);
        }
        if (choice == 0) break;
      }
    }
    best = std::move(next);
  }
  std::uint64_t most = 0;
  for (const auto& [kept, hits] : best) most = std::max(most, hits);
  return most;
}

TEST(OfflineOptimum, NoChoiceGivesMoreBlockHits) {
  std::mt19937_64 random(11);
  for (int round = 0; round < 150; ++round) {
    const RequestTrace trace = make_request_trace(random_chained(random, 7, 3, 2));
    for (int capacity = 1; capacity <= 4; ++capacity) {
      ASSERT_EQ(optimum(trace, static_cast<std::uint64_t>(capacity)).hits.hit_blocks,
                best_by_force(trace, capacity))
          << "round " << round << ", capacity " << capacity;
    }
  }
}

TEST(OfflineOptimum, IsNeverBelowAPolicyAndReachesTheCeiling) {
  std::mt19937_64 random(12);
  for (int round = 0; round < 10; ++round) {
    const RequestTrace trace = make_request_trace(random_chained(random, 200, 6, 3));
    const ReuseProfile profile = ReuseProfile::measure(trace, TouchOrder::kLastFirst);
    for (const std::uint64_t capacity : {1u, 3u, 10u, 40u}) {
      const std::uint64_t best = optimum(trace, capacity).hits.hit_blocks;
      for (const std::string_view policy : known_simulated_caches()) {
        EXPECT_GE(best,
                  run_cache(trace, {.policy = std::string(policy), .tiers = {{"cache", capacity}}})
                      .hits.hit_blocks)
            << policy << " at " << capacity;
      }
    }
    EXPECT_EQ(optimum(trace, trace.unique_blocks()).hits, profile.infinite().hits);
  }
}

// What a capacity keeps, every larger one keeps: hits up to a tier are the optimum of its capacity.
TEST(OfflineOptimum, TiersNest) {
  std::mt19937_64 random(13);
  const RequestTrace trace = make_request_trace(random_chained(random, 300, 6, 3));
  const OptimalTier tiers[] = {{"a", 3, 3}, {"b", 5, 8}, {"c", 20, 28}};
  const SimulationRun run = simulate_optimal(trace, NextUses(trace), tiers);
  EXPECT_EQ(run.capacity_blocks, 28u);
  std::uint64_t hits = 0;
  for (std::size_t i = 0; i < 3; ++i) {
    hits += run.tiers[i].hit_blocks;
    EXPECT_EQ(hits, optimum(trace, tiers[i].cumulative_blocks).hits.hit_blocks);
    EXPECT_FALSE(run.tiers[i].inserted_blocks.has_value());
  }
  EXPECT_EQ(hits, run.hits.hit_blocks);
}

TEST(OfflineOptimum, ABlockTwiceInOneRequestIsFoundTwice) {
  const RequestTrace trace = make_request_trace({{0, {5, 5, 6}}, {0, {5, 5, 6}}});
  EXPECT_EQ(optimum(trace, 2).hits.hit_blocks, 3u);
  EXPECT_EQ(optimum(trace, 1).hits.hit_blocks, 2u);
}

TEST(NextUses, NamesTheShallowestPlaceOfTheNextRequest) {
  const RequestTrace trace = make_request_trace({{0, {1, 2, 1}}, {0, {3}}, {0, {2, 1, 1}}});
  const NextUses next(trace);
  EXPECT_EQ(next.of(0), 5u);
  EXPECT_EQ(next.of(1), 4u);
  EXPECT_EQ(next.of(2), 5u);
  EXPECT_EQ(next.of(3), NextUses::kNever);
  EXPECT_EQ(next.of(6), NextUses::kNever);
}

TEST(NumberSet, IsASet) {
  std::mt19937_64 random(14);
  for (const std::uint64_t bound : {1u, 64u, 65u, 5000u, 300'000u}) {
    NumberSet numbers(bound);
    std::set<std::uint64_t> expected;
    for (int change = 0; change < 3000; ++change) {
      const std::uint64_t number = random() % bound;
      ASSERT_EQ(numbers.contains(number), expected.contains(number));
      if (expected.erase(number) > 0) {
        numbers.erase(number);
      } else {
        numbers.insert(number);
        expected.insert(number);
      }
      ASSERT_EQ(numbers.size(), expected.size());
      if (!expected.empty()) {
        ASSERT_EQ(numbers.largest(), *expected.rbegin());
      }
    }
  }
}

}  // namespace
}  // namespace kvtier
