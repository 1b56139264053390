// The traces in tests/traces/ by the simulator and by brute force, which share no code.

#include "tests/simulate/naive_replay.h"
#include "tools/simulate/offline_optimum.h"
#include "tools/simulate/open_request_trace.h"
#include "tools/simulate/reuse_profile.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

namespace kvtier {
namespace {

const std::string kAgentFolder = KVTIER_SOURCE_DIR "/tests/traces/agent-sessions";
const std::string kConversation =
    KVTIER_SOURCE_DIR "/tests/traces/mooncake/conversation-2000.jsonl.zst";

struct ExpectedRun {
  const char* policy;
  std::uint64_t capacity;
  HitCounts hits;
};

HitCounts naive_hits(const NaiveTrace& trace, const ExpectedRun& run) {
  const std::string policy = run.policy;
  const NaiveHits hits = policy == "lru"       ? naive_lru(trace, run.capacity)
                         : policy == "optimal" ? naive_optimal(trace, run.capacity)
                                               : naive_infinite(trace);
  return {hits.hit_blocks, hits.hit_tokens, hits.second_half_hit_tokens};
}

void check_runs(const std::string& path, const NaiveTrace& naive,
                std::span<const ExpectedRun> expected) {
  const auto trace = open_request_trace(path, std::nullopt, {});
  ASSERT_TRUE(trace.ok()) << trace.status().message();
  ASSERT_EQ(trace->requests().size(), naive.requests.size());
  const ReuseProfile profile = ReuseProfile::measure(*trace, TouchOrder::kLastFirst);
  const NextUses next_uses(*trace);
  for (const ExpectedRun& run : expected) {
    SCOPED_TRACE(fmt::format("{} of {}", run.policy, run.capacity));
    const std::string policy = run.policy;
    const OptimalTier tier{"cache", run.capacity, run.capacity};
    const SimulationRun result = policy == "lru" ? profile.lru(run.capacity)
                                 : policy == "optimal"
                                     ? simulate_optimal(*trace, next_uses, std::span(&tier, 1))
                                     : profile.infinite();
    EXPECT_EQ(result.hits.hit_blocks, run.hits.hit_blocks);
    EXPECT_EQ(result.hits.hit_tokens, run.hits.hit_tokens);
    EXPECT_EQ(result.hits.second_half_hit_tokens, run.hits.second_half_hit_tokens);
    EXPECT_EQ(result.hits, naive_hits(naive, run));
  }
}

// Published figures: reference.json of the collection that the sessions come from.
TEST(ShippedTraces, AgentSessions) {
  const ExpectedRun expected[] = {
      {"lru", 256, {18089, 1157696, 644160}},       {"lru", 1024, {58439, 3740096, 2458240}},
      {"lru", 4096, {135980, 8702720, 5710656}},    {"lru", 16384, {177399, 11353536, 6820224}},
      {"optimal", 256, {28527, 1825728, 984064}},   {"optimal", 4096, {158029, 10113856, 6285184}},
      {"infinite", 0, {182777, 11697728, 7126144}},
  };
  check_runs(kAgentFolder, naive_agent_sessions(kAgentFolder), expected);
}

TEST(ShippedTraces, FirstRequestsOfTheConversation) {
  const ExpectedRun expected[] = {
      {"lru", 256, {2055, 1052160, 540672}},       {"lru", 1024, {2242, 1147904, 616448}},
      {"lru", 8192, {10007, 5120805, 2902989}},    {"optimal", 256, {5236, 2679665, 1439147}},
      {"optimal", 1024, {9916, 5074837, 2881451}}, {"infinite", 0, {15771, 8070959, 5108183}},
  };
  check_runs(kConversation, naive_mooncake(kConversation), expected);
}

TEST(ShippedTraces, FiguresOfTheAgentSessions) {
  const auto trace = open_request_trace(kAgentFolder, std::nullopt, {});
  ASSERT_TRUE(trace.ok()) << trace.status().message();
  EXPECT_EQ(trace->format(), "agent-sessions");
  EXPECT_EQ(trace->identity(), TraceIdentity::kChained);
  EXPECT_EQ(trace->block_tokens(), 64u);
  EXPECT_EQ(trace->requests().size(), 205u);
  EXPECT_EQ(trace->references().size(), 209477u);
  EXPECT_EQ(trace->unique_blocks(), 26700u);
  const ReuseProfile profile = ReuseProfile::measure(*trace, TouchOrder::kLastFirst);
  EXPECT_EQ(profile.input_tokens(), 13412737u);
  EXPECT_EQ(profile.output_tokens(), 122666u);
  EXPECT_EQ(profile.blocks_seen_once(), 856u);
  EXPECT_EQ(profile.stack_distance_blocks().p50, 1885);
  EXPECT_EQ(profile.reuse_time_s().p99, 2803);
}

}  // namespace
}  // namespace kvtier
