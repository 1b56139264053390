// Every number of the published reference file, where its traces lie beside the repository.

#include "tools/simulate/offline_optimum.h"
#include "tools/simulate/open_request_trace.h"
#include "tools/simulate/reuse_profile.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <optional>
#include <ostream>
#include <string>

namespace kvtier {
namespace {

const std::filesystem::path kTraces =
    std::filesystem::path(KVTIER_SOURCE_DIR) / ".." / "shared" / "traces";

struct ReferenceCase {
  const char* name;  ///< In the reference file; what is in parentheses is no part of the path.
  const char* test;
  std::optional<TraceIdentity> identity;
};

/// The name of the test, and nothing that differs between runs.
void PrintTo(const ReferenceCase& reference, std::ostream* out) { *out << reference.name; }

class Reference : public testing::TestWithParam<ReferenceCase> {};

void expect_hits(const nlohmann::json& expected, const SimulationRun& run,
                 const ReuseProfile& profile, std::size_t& compared) {
  const auto ratio = [](std::uint64_t part, std::uint64_t whole) {
    return static_cast<double>(part) / static_cast<double>(whole);
  };
  EXPECT_EQ(run.hits.hit_tokens, expected["hit_tokens"]);
  EXPECT_EQ(run.hits.hit_blocks, expected["hit_blocks"]);
  EXPECT_EQ(run.hits.second_half_hit_tokens, expected["second_half_hit_tokens"]);
  // Published with six decimals.
  EXPECT_NEAR(ratio(run.hits.hit_tokens, profile.input_tokens()), expected["token_hit_ratio"],
              5.1e-7);
  EXPECT_NEAR(ratio(run.hits.second_half_hit_tokens, profile.second_half_input_tokens()),
              expected["second_half_token_hit_ratio"], 5.1e-7);
  ++compared;
}

void expect_quantiles(const nlohmann::json& expected, const Quantiles& quantiles,
                      double tolerance) {
  EXPECT_NEAR(*quantiles.p10, expected["p10"], tolerance);
  EXPECT_NEAR(*quantiles.p50, expected["p50"], tolerance);
  EXPECT_NEAR(*quantiles.p90, expected["p90"], tolerance);
  EXPECT_NEAR(*quantiles.p99, expected["p99"], tolerance);
}

TEST_P(Reference, EveryNumber) {
  if (!std::filesystem::exists(kTraces / "reference.json")) {
    GTEST_SKIP() << "the traces are not at " << kTraces;
  }
  const auto file = nlohmann::json::parse(std::ifstream(kTraces / "reference.json"));
  const nlohmann::json& expected = file["traces"][GetParam().name];
  ASSERT_TRUE(expected.is_object()) << GetParam().name;
  const std::string name = GetParam().name;
  const auto trace = open_request_trace((kTraces / name.substr(0, name.find(" ("))).string(),
                                        std::nullopt, {.identity = GetParam().identity});
  ASSERT_TRUE(trace.ok()) << trace.status().message();
  const ReuseProfile profile = ReuseProfile::measure(*trace, TouchOrder::kLastFirst);
  EXPECT_EQ(trace->block_tokens(),
            expected["block_size"].is_number() ? expected["block_size"].get<unsigned>() : 0u);
  EXPECT_EQ(trace->requests().size(), expected["requests"]);
  EXPECT_EQ(trace->references().size(), expected["block_references"]);
  EXPECT_EQ(trace->unique_blocks(), expected["unique_blocks"]);
  EXPECT_EQ(profile.input_tokens(), expected["input_tokens"]);
  EXPECT_EQ(profile.output_tokens(), expected["output_tokens"]);
  EXPECT_EQ(profile.blocks_seen_once(), expected["blocks_seen_once"]);
  EXPECT_EQ(profile.any_position_hit_tokens(), expected["any_position_hit_tokens"]);
  EXPECT_EQ(profile.second_half_input_tokens(), expected["second_half_input_tokens"]);
  expect_quantiles(expected["stack_distance_blocks"], profile.stack_distance_blocks(), 0);
  // Published with one decimal.
  expect_quantiles(expected["reuse_time_s"], profile.reuse_time_s(), 0.0501);
  std::size_t compared = 0;
  expect_hits(expected["infinite"], profile.infinite(), profile, compared);
  for (const auto& run : expected["lru"]) {
    expect_hits(run, profile.lru(run["capacity_blocks"]), profile, compared);
  }
  if (expected.contains("optimal_with_bypass")) {
    const NextUses next_uses(*trace);
    for (const auto& run : expected["optimal_with_bypass"]) {
      const OptimalTier tier{"cache", run["capacity_blocks"], run["capacity_blocks"]};
      expect_hits(run, simulate_optimal(*trace, next_uses, std::span(&tier, 1)), profile, compared);
    }
  }
  EXPECT_GE(compared, 4u);
}

INSTANTIATE_TEST_SUITE_P(
    Traces, Reference,
    testing::Values(
        ReferenceCase{"mooncake-fast25/conversation_trace.jsonl", "Conversation", std::nullopt},
        ReferenceCase{"mooncake-fast25/synthetic_trace.jsonl", "Synthetic", std::nullopt},
        ReferenceCase{"weka-claude-code/sessions_odd.jsonl.zst", "AgentsOdd", std::nullopt},
        ReferenceCase{"weka-claude-code/sample", "AgentsSample", std::nullopt},
        ReferenceCase{"ragpulse (raw component ids)", "RagpulseRaw", TraceIdentity::kRaw},
        ReferenceCase{"ragpulse (chained through a prefix trie)", "RagpulseTrie", std::nullopt}),
    [](const auto& info) { return info.param.test; });

}  // namespace
}  // namespace kvtier
