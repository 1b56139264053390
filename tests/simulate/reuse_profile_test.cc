// Exact stack distances against LRU caches that are really run.

#include "tools/simulate/reuse_profile.h"

#include "tests/simulate/trace_builders.h"
#include "tools/simulate/cache_run.h"
#include "tools/simulate/live_slots.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>
#include <vector>

namespace kvtier {
namespace {

TEST(LiveSlots, CountsLikeARowOfFlags) {
  std::mt19937_64 random(1);
  LiveSlots slots(5000);
  std::vector<bool> flags;
  while (true) {
    const auto count = static_cast<std::uint32_t>(random() % 700);
    if (count > slots.capacity() - slots.next()) break;
    slots.append(count);
    flags.insert(flags.end(), count, true);
    for (int tries = 0; tries < 20 && !flags.empty(); ++tries) {
      const auto first = static_cast<std::uint32_t>(random() % flags.size());
      std::uint32_t run = 0;
      while (first + run < flags.size() && flags[first + run] && run < random() % 100) ++run;
      slots.erase(first, run);
      for (std::uint32_t i = 0; i < run; ++i) flags[first + i] = false;
    }
    std::uint32_t from = 0;
    for (std::size_t slot = flags.size(); slot-- > 0;) {
      from += flags[slot] ? 1u : 0u;
      ASSERT_EQ(slots.count_from(static_cast<std::uint32_t>(slot)), from);
      ASSERT_EQ(slots.is_live(static_cast<std::uint32_t>(slot)), flags[slot]);
    }
    ASSERT_EQ(slots.live(), from);
  }
  EXPECT_GT(slots.next(), 4000u);
}

void expect_same_as_run(const std::vector<DraftRequest>& drafts, TouchOrder order) {
  const RequestTrace trace = make_request_trace(drafts);
  const ReuseProfile profile = ReuseProfile::measure(trace, order);
  for (std::uint32_t capacity = 1; capacity <= trace.unique_blocks() + 1; ++capacity) {
    const SimulationRun run =
        run_cache(trace, {.policy = "lru", .tiers = {{"cache", capacity}}, .touch_order = order});
    ASSERT_EQ(profile.lru(capacity), run) << "capacity " << capacity;
  }
  SimulationRun unbounded = profile.lru(trace.unique_blocks());
  unbounded.policy = "infinite";
  unbounded.capacity_blocks.reset();
  unbounded.tiers.front().capacity_blocks.reset();
  EXPECT_EQ(profile.infinite(), unbounded);
}

TEST(ReuseProfile, IsLruAtEveryCapacity) {
  std::mt19937_64 random(2);
  for (const TouchOrder order : {TouchOrder::kLastFirst, TouchOrder::kFirstFirst}) {
    for (int round = 0; round < 20; ++round) {
      expect_same_as_run(random_chained(random, 60, 8, 2), order);
      expect_same_as_run(random_unchained(random, 60, 12, 30), order);
      if (HasFatalFailure()) return;
    }
  }
}

// Slots run out many times over, and live ones move together.
TEST(ReuseProfile, SurvivesItsOwnCompactions) {
  std::mt19937_64 random(3);
  std::vector<DraftRequest> drafts;
  for (int r = 0; r < 4000; ++r) {
    DraftRequest draft;
    const std::uint64_t first = random() % 3 * 100;
    for (std::uint64_t id = first; id < first + 80 + random() % 20; ++id) draft.ids.push_back(id);
    drafts.push_back(std::move(draft));
  }
  const RequestTrace trace = make_request_trace(drafts);
  ASSERT_GT(trace.references().size(), 4u << 16);
  const ReuseProfile profile = ReuseProfile::measure(trace, TouchOrder::kLastFirst);
  for (const std::uint64_t capacity : {50u, 100u, 150u, 200u, 250u}) {
    EXPECT_EQ(profile.lru(capacity),
              run_cache(trace, {.policy = "lru", .tiers = {{"cache", capacity}}}));
  }
}

// Worked out by hand. Requests abc, abd, xyz, ab; four tokens a block; seconds 0, 10, 20, 50.
TEST(ReuseProfile, FiguresOfATraceByHand) {
  const RequestTrace trace = make_request_trace(
      {{0, {1, 2, 3}}, {10'000'000, {1, 2, 4}, 10}, {20'000'000, {7, 8, 9}}, {50'000'000, {1, 2}}});
  const ReuseProfile profile = ReuseProfile::measure(trace, TouchOrder::kLastFirst);
  EXPECT_EQ(trace.unique_blocks(), 7u);
  EXPECT_EQ(profile.input_tokens(), 12u + 10 + 12 + 8);
  EXPECT_EQ(profile.second_half_input_tokens(), 20u);
  EXPECT_EQ(profile.output_tokens(), 4u);
  EXPECT_EQ(profile.blocks_seen_once(), 5u);
  EXPECT_EQ(profile.any_position_hit_tokens(), 16u);
  // 1 and 2 at distances 1 and 2, then, below 7 8 9, at 4 and 5.
  EXPECT_EQ(profile.stack_distance_blocks().p10, 1);
  EXPECT_EQ(profile.stack_distance_blocks().p50, 2);
  EXPECT_EQ(profile.stack_distance_blocks().p90, 5);
  EXPECT_EQ(profile.reuse_time_s().p50, 10);
  EXPECT_EQ(profile.reuse_time_s().p90, 40);
  EXPECT_EQ(profile.lru(1).hits, (HitCounts{1, 4, 0}));
  EXPECT_EQ(profile.lru(2).hits, (HitCounts{2, 8, 0}));
  EXPECT_EQ(profile.lru(4).hits, (HitCounts{3, 12, 4}));
  EXPECT_EQ(profile.lru(5).hits, (HitCounts{4, 16, 8}));
  EXPECT_EQ(profile.infinite().hits, (HitCounts{4, 16, 8}));
  // First to last, 1 lies below 2 and 3, and the head is lost before the tail.
  const ReuseProfile forward = ReuseProfile::measure(trace, TouchOrder::kFirstFirst);
  EXPECT_EQ(forward.lru(2).hits, (HitCounts{0, 0, 0}));
  EXPECT_EQ(forward.lru(3).hits, (HitCounts{2, 8, 0}));
}

TEST(ReuseProfile, ATraceWithoutReuseHasNoQuantiles) {
  const RequestTrace trace = make_request_trace({{0, {1}}, {0, {2}}});
  const ReuseProfile profile = ReuseProfile::measure(trace, TouchOrder::kLastFirst);
  EXPECT_FALSE(profile.stack_distance_blocks().p50.has_value());
  EXPECT_FALSE(profile.reuse_time_s().p99.has_value());
  EXPECT_EQ(profile.infinite().hits, HitCounts{});
}

}  // namespace
}  // namespace kvtier
