#include "tests/replay/replay_runner.h"
#include "tools/cli/replay_result.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <map>
#include <set>
#include <sstream>

namespace kvtier {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;
using ::testing::StartsWith;

std::string file_text(const std::filesystem::path& path) {
  std::stringstream text;
  text << std::ifstream(path).rdbuf();
  return text.str();
}

/// Device 10 %, host 30 %, the rest on disk; extents so small that 10 % holds what a step needs.
std::vector<std::string> three_tiers() {
  return {"--budget",          "100", "--extent-bytes",  "8KiB",
          "--device-capacity", "30%", "--host-capacity", "30%"};
}

TEST(ReplayCommand, FullBudgetEqualsExactAttentionThroughThreeTiers) {
  const json result =
      replay_json(shipped_trace(), {"--budget", "100%", "--only-layers", "21", "--device-capacity",
                                    "10%", "--host-capacity", "30%"});
  const json& run = result["runs"].at(0);
  EXPECT_LE(run["output_error"]["max"].get<double>(), 1e-4);
  EXPECT_LE(run["attended_error"]["max"].get<double>(), 1e-4);
  EXPECT_GE(run["recall"]["min"].get<double>(), 1 - 1e-6);
  EXPECT_EQ(run["blocks"]["failed"], 0);
  EXPECT_GT(run["blocks"]["verified"], 0);
  EXPECT_GT(run["bytes"]["disk_to_host"], 0);
  EXPECT_GT(run["tiers"]["disk"]["hits"], 0);
  for (const char* tier : {"device", "host", "disk"}) {
    EXPECT_LE(run["tiers"][tier]["peak_bytes"], run["tiers"][tier]["capacity_bytes"]) << tier;
  }
}

TEST(ReplayCommand, EverySelectorRunsOnTheShippedTrace) {
  const json result =
      replay_json(shipped_trace(), {"--selector", "landmark,oracle", "--selector", "recency,random",
                                    "--budget", "5%", "--only-layers", "7"});
  ASSERT_EQ(result["runs"].size(), 4u);
  std::map<std::string, json> runs;
  for (const json& run : result["runs"]) runs[run["selector"].get<std::string>()] = run;
  EXPECT_NEAR(runs["oracle"]["recall_ratio"].get<double>(), 1, 1e-6);
  EXPECT_NEAR(runs["oracle"]["recall_long_range_ratio"].get<double>(), 1, 1e-6);
  const auto far = [&](const char* name) { return runs[name]["recall_long_range"].get<double>(); };
  EXPECT_GT(far("oracle"), far("landmark"));
  EXPECT_GT(far("landmark"), far("random"));
  // Evidence lies far back: the last tokens alone never hold it, the best choice mostly does.
  EXPECT_EQ(runs["recency"]["evidence_recall"], 0);
  EXPECT_GT(runs["oracle"]["evidence_recall"].get<double>(), 0.5);
  for (const auto& [name, run] : runs) {
    EXPECT_LE(run["attended_error"]["max"].get<double>(), 1e-4) << name;
    EXPECT_LE(run["tokens_attended_mean"].get<double>(), 0.05 * 7547) << name;
  }
}

// The output is that of the keys that the selector keeps, and verified to be; half the bytes move.
TEST(ReplayCommand, ValuesAloneAreHalfTheBytesAndAStatedOutput) {
  for (const std::string family : {"scan", "two-stage"}) {
    const json result =
        replay_json(shipped_trace(), {"--selector", family + "," + family + "(fetch=values)",
                                      "--budget", "5%", "--only-layers", "21", "--estimate-rest",
                                      "never", "--deterministic", "--look-ahead", "0"});
    const json& both = result["runs"].at(0);
    const json& values = result["runs"].at(1);
    EXPECT_EQ(2 * values["bytes"]["host_to_device"].get<std::uint64_t>(),
              both["bytes"]["host_to_device"].get<std::uint64_t>());
    EXPECT_EQ(values["recall"], both["recall"]);
    EXPECT_LE(values["attended_error"]["max"].get<double>(), 1e-4);
    EXPECT_NE(values["output_error"]["mean"], both["output_error"]["mean"]);
    EXPECT_NEAR(values["output_error"]["mean"].get<double>(),
                both["output_error"]["mean"].get<double>(), 0.03);
  }
}

class GeneratedReplay : public ::testing::Test {
 protected:
  void SetUp() override { write_trace(make_trace(replayable_trace()), trace_path()); }
  std::string trace_path() const { return folder_.path() / "trace"; }
  ScratchFolder folder_;
};

TEST_F(GeneratedReplay, JsonHasEveryFieldOfTheSchema) {
  std::vector<std::string> arguments = three_tiers();
  arguments.insert(arguments.end(), {"--selector", "landmark,recency"});
  const json result = replay_json(trace_path(), arguments);
  const auto summary = ReplayResultSummary::check(result, "stdout");
  ASSERT_TRUE(summary.ok()) << summary.status().message();
  EXPECT_EQ(summary->runs.size(), 2u);
  EXPECT_EQ(result["schema"], "kvtier.replay-result");
  EXPECT_EQ(result["version"], 1);
  EXPECT_THAT(result["trace"]["digest"].get<std::string>(), StartsWith("sha256:"));
  EXPECT_EQ(result["trace"]["kv_bytes"], 2 * 700 * 2 * 128 * 2);
  EXPECT_EQ(result["options"]["device_capacity_bytes"], 2 * 700 * 2 * 128 * 2 * 3 / 10);
  EXPECT_TRUE(result["machine"].contains("cpu"));
  EXPECT_FALSE(result["machine"]["disk"]["backend"].get<std::string>().empty());
  const json& run = result["runs"].at(0);
  ASSERT_EQ(run["layers"].size(), 2u);
  EXPECT_EQ(run["layers"][1]["layer"], 3);
  std::uint64_t hits = 0;
  for (const json& layer : run["layers"]) {
    EXPECT_TRUE(layer["recall"]["mean"].is_number());
    for (const json& count : layer["hits"]) hits += count.get<std::uint64_t>();
  }
  std::uint64_t hits_overall = 0;
  for (const json& tier : run["tiers"]) hits_overall += tier["hits"].get<std::uint64_t>();
  EXPECT_EQ(hits, hits_overall);
  EXPECT_GT(run["timing"]["steps_per_second"].get<double>(), 0);
  for (const char* stage : {"select_us", "resolve_us", "fetch_us", "attend_us", "merge_us",
                            "look_ahead_us", "total_us"}) {
    EXPECT_LE(run["timing"][stage]["p50"], run["timing"][stage]["p99"]) << stage;
  }
}

TEST_F(GeneratedReplay, CsvHasOneRowPerRunAndLayer) {
  std::vector<std::string> arguments = {"replay",     trace_path(),
                                        "--format",   "csv",
                                        "--selector", "landmark(tokens=8,outliers=0),recency"};
  for (const std::string& argument : three_tiers()) arguments.push_back(argument);
  const Outcome outcome = run_kvtier(arguments);
  ASSERT_EQ(outcome.exit_code, 0) << outcome.errors;
  std::stringstream lines(outcome.output);
  std::vector<std::string> rows;
  for (std::string line; std::getline(lines, line);) rows.push_back(line);
  ASSERT_EQ(rows.size(), 1u + 2 * 3);
  EXPECT_THAT(rows[0], StartsWith("selector,budget,layer,tokens_attended_mean,recall_mean"));
  EXPECT_THAT(rows[1], StartsWith("\"landmark(tokens=8,outliers=0)\",100,all,"));
  EXPECT_THAT(rows[4], StartsWith("recency,100,all,"));
  EXPECT_THAT(rows[6], StartsWith("recency,100,3,"));
  const auto commas = std::ranges::count(rows[0], ',');
  for (std::size_t i = 4; i < rows.size(); ++i) {
    EXPECT_EQ(std::ranges::count(rows[i], ','), commas) << rows[i];
  }
}

TEST_F(GeneratedReplay, TableSaysHowToReadItAndEndsWithTheVerdict) {
  std::vector<std::string> arguments = {"replay", trace_path()};
  for (const std::string& argument : three_tiers()) arguments.push_back(argument);
  const Outcome outcome = run_kvtier(arguments);
  ASSERT_EQ(outcome.exit_code, 0) << outcome.errors;
  EXPECT_EQ(outcome.errors, "") << "no progress where stderr is no terminal";
  for (const char* part : {"mean", "recall", "evidence", "through ", "share of the exact"}) {
    EXPECT_THAT(outcome.output, HasSubstr(part));
  }
  const std::size_t last = outcome.output.rfind('\n', outcome.output.size() - 2);
  EXPECT_THAT(outcome.output.substr(last + 1), StartsWith("verified "));
}

TEST_F(GeneratedReplay, OutputAndTimelineAreWritten) {
  const std::string output = folder_.path() / "result.json";
  const std::string timeline = folder_.path() / "timeline.json";
  std::vector<std::string> arguments = {"replay",   trace_path(), "--format",   "json",
                                        "--output", output,       "--timeline", timeline};
  for (const std::string& argument : three_tiers()) arguments.push_back(argument);
  const Outcome outcome = run_kvtier(arguments);
  ASSERT_EQ(outcome.exit_code, 0) << outcome.errors;
  EXPECT_EQ(outcome.output, "");
  EXPECT_EQ(json::parse(file_text(output))["schema"], "kvtier.replay-result");

  const json events = json::parse(file_text(timeline))["traceEvents"];
  std::set<std::string> tracks;
  std::map<int, std::string> names;
  for (const json& event : events) {
    if (event["name"] == "thread_name")
      names[event["tid"].get<int>()] = event["args"]["name"].get<std::string>();
    if (event["ph"] != "X") continue;
    tracks.insert(names.at(event["tid"].get<int>()));
    EXPECT_GE(event["ts"].get<double>(), 0);
    EXPECT_GE(event["dur"].get<double>(), 0);
    EXPECT_TRUE(event["args"].contains("bytes"));
  }
  for (const char* track : {"append", "select", "attend", "disk_to_host", "host_to_device"}) {
    EXPECT_TRUE(tracks.contains(track)) << track;
  }
}

TEST_F(GeneratedReplay, ATraceWithoutAnswersOrOracleGivesNulls) {
  MakeTraceOptions options = replayable_trace();
  options.with_oracle = false;
  TraceDraft draft = make_trace(options);
  draft.manifest["turns"] = nlohmann::ordered_json::array();
  const auto path = folder_.path() / "bare";
  write_trace(draft, path);
  std::vector<std::string> arguments = three_tiers();
  arguments[1] = "100%";
  const json run = replay_json(path, arguments)["runs"].at(0);
  EXPECT_TRUE(run["evidence_recall"].is_null());
  EXPECT_LE(run["output_error"]["max"].get<double>(), 1e-4);
}

TEST_F(GeneratedReplay, ModelsWithSinkLogitsAndCapsAndOddShapesAreExactToo) {
  MakeTraceOptions options = replayable_trace();
  options.with_sink_logits = true;
  options.logit_cap = 20;
  options.dtype = DType::kBF16;
  options.head_dim = 72;
  options.value_dim = 40;
  options.query_heads = 6;
  const auto path = folder_.path() / "odd";
  write_trace(make_trace(options), path);
  std::vector<std::string> arguments = three_tiers();
  arguments[1] = "100%";
  arguments.insert(arguments.end(), {"--block-tokens", "3", "--verify", "all"});
  const json run = replay_json(path, arguments)["runs"].at(0);
  EXPECT_LE(run["output_error"]["max"].get<double>(), 1e-4);
  EXPECT_LE(run["attended_error"]["max"].get<double>(), 1e-4);
}

}  // namespace
}  // namespace kvtier
