// The verbs `simulate` and `sweep` as they are typed.

#include "tests/tools/make_trace.h"
#include "tests/tools/run_kvtier.h"
#include "tools/simulate/simulation_plan.h"
#include "tools/simulate/sweep_run.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <fstream>
#include <sstream>

namespace kvtier {
namespace {

using nlohmann::ordered_json;
using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::StartsWith;

const std::string kSessions = KVTIER_SOURCE_DIR "/tests/traces/agent-sessions";
const std::string kRequests =
    KVTIER_SOURCE_DIR "/tests/traces/mooncake/conversation-2000.jsonl.zst";

std::vector<std::string> keys_of(const ordered_json& json) {
  std::vector<std::string> keys;
  for (const auto& [key, value] : json.items()) keys.push_back(key);
  return keys;
}

std::string contents(const std::filesystem::path& path) {
  std::stringstream text;
  text << std::ifstream(path).rdbuf();
  return text.str();
}

TEST(SimulateCommand, JsonHasTheAgreedShape) {
  const Outcome outcome = run_kvtier({"simulate", kSessions, "--policy", "lru,optimal,infinite",
                                      "--capacity-blocks", "256,4096", "--format", "json"});
  ASSERT_EQ(outcome.exit_code, 0) << outcome.errors;
  EXPECT_EQ(outcome.errors, "");
  const ordered_json json = ordered_json::parse(outcome.output);
  EXPECT_THAT(keys_of(json), ElementsAre("schema", "version", "options", "trace", "runs"));
  EXPECT_EQ(json["schema"], "kvtier.simulation-result");
  EXPECT_EQ(json["version"], 1);
  EXPECT_EQ(json["trace"]["requests"], 205);
  EXPECT_EQ(json["trace"]["blocks_seen_once"], 856);
  EXPECT_EQ(json["trace"]["stack_distance_blocks"],
            ordered_json::parse(R"({"p10": 260, "p50": 1885, "p90": 7837, "p99": 18267})"));
  EXPECT_EQ(json["trace"]["reuse_time_s"]["p90"], 313.0);
  EXPECT_THAT(json["trace"]["digest"].get<std::string>(), StartsWith("sha256:"));
  ASSERT_EQ(json["runs"].size(), 5u);
  const ordered_json& run = json["runs"][1];
  EXPECT_THAT(keys_of(run), ElementsAre("policy", "capacity_blocks", "hit_tokens", "hit_blocks",
                                        "second_half_hit_tokens", "token_hit_ratio",
                                        "second_half_token_hit_ratio", "tiers"));
  EXPECT_EQ(run["policy"], "lru");
  EXPECT_EQ(run["capacity_blocks"], 4096);
  EXPECT_EQ(run["hit_tokens"], 8702720);
  EXPECT_NEAR(run["token_hit_ratio"].get<double>(), 0.64884, 5e-7);
  EXPECT_EQ(run["tiers"]["cache"]["hit_blocks"], 135980);
  EXPECT_EQ(run["tiers"]["cache"]["hit_bytes"], nullptr);
  EXPECT_EQ(json["runs"][4]["policy"], "infinite");
  EXPECT_EQ(json["runs"][4]["capacity_blocks"], nullptr);
}

TEST(SimulateCommand, SameInputAndOptionsGiveSameBytes) {
  for (const char* format : {"json", "csv", "table"}) {
    const std::vector<std::string> arguments = {
        "simulate",          kRequests,
        "--policy",          "lru,fifo,s3-fifo,sieve,arc,gdsf,optimal,infinite",
        "--capacity-blocks", "300,10%",
        "--format",          format};
    const Outcome first = run_kvtier(arguments);
    EXPECT_EQ(first.exit_code, 0) << first.errors;
    EXPECT_EQ(first.output, run_kvtier(arguments).output);
  }
}

TEST(SimulateCommand, HierarchiesReportTiersInBlocksAndBytes) {
  const Outcome outcome =
      run_kvtier({"simulate", kRequests, "--policy", "lru,s3-fifo,optimal", "--bytes-per-token",
                  "128KiB", "--tiers", "device=8GiB,host=1024,disk=50%", "--hierarchy", "exclusive",
                  "--format", "json"});
  ASSERT_EQ(outcome.exit_code, 0) << outcome.errors;
  const ordered_json json = ordered_json::parse(outcome.output);
  const ordered_json& lru = json["runs"][0];
  EXPECT_EQ(lru["capacity_blocks"], 128 + 1024 + 19394);
  EXPECT_THAT(keys_of(lru["tiers"]), ElementsAre("device", "host", "disk"));
  const ordered_json& device = lru["tiers"]["device"];
  EXPECT_EQ(device["capacity_blocks"], 128);
  EXPECT_EQ(device["hit_bytes"], device["hit_tokens"].get<std::uint64_t>() * 131072);
  EXPECT_EQ(json["runs"][2]["tiers"]["disk"]["inserted_blocks"], nullptr);
  const Outcome csv = run_kvtier({"simulate", kRequests, "--policy", "fifo", "--tiers",
                                  "device=10,host=100", "--format", "csv"});
  EXPECT_EQ(std::count(csv.output.begin(), csv.output.end(), '\n'), 4);
  EXPECT_THAT(csv.output, AllOf(HasSubstr("\nfifo,all,100,"), HasSubstr("\nfifo,device,10,"),
                                HasSubstr("\nfifo,host,100,")));
}

TEST(SimulateCommand, ConventionsChangeTheAnswer) {
  const auto hits = [](std::vector<std::string> more) {
    std::vector<std::string> arguments = {"simulate",          kSessions, "--policy", "lru",
                                          "--capacity-blocks", "1024",    "--format", "json"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    const Outcome outcome = run_kvtier(arguments);
    EXPECT_EQ(outcome.exit_code, 0) << outcome.errors;
    return ordered_json::parse(outcome.output)["runs"][0]["hit_tokens"].get<std::uint64_t>();
  };
  const std::uint64_t usual = hits({});
  EXPECT_EQ(usual, 3740096u);
  EXPECT_LT(hits({"--touch-order", "first-first"}), usual);
  EXPECT_NE(hits({"--order", "file"}), usual);
  EXPECT_NE(hits({"--session-start-gap", "0"}), usual);
  EXPECT_LE(hits({"--models", "separate"}), usual);
  EXPECT_EQ(hits({"--partial-blocks", "drop"}), usual);  // These list full blocks only.
}

TEST(SimulateCommand, LengthsAloneAreExitCode3) {
  const ScratchFolder scratch;
  const std::string path = scratch.path() / "azure.csv";
  std::ofstream(path) << "TIMESTAMP,ContextTokens,GeneratedTokens\n"
                         "2023-11-16 18:17:03.9799600,4808,10";
  for (const char* verb : {"simulate", "sweep"}) {
    const Outcome outcome = run_kvtier({verb, path, "--format", "json"});
    EXPECT_EQ(outcome.exit_code, 3);
    EXPECT_EQ(outcome.output, "");
    EXPECT_THAT(outcome.errors,
                AllOf(HasSubstr("identity: found 1 requests with lengths only, expected ids"),
                      HasSubstr("there is no hit ratio")));
  }
}

TEST(SimulateCommand, WrongUsageIsExitCode2AndSaysWhatWouldDo) {
  const std::pair<std::vector<std::string>, const char*> cases[] = {
      {{"--policy", "mru"}, "--policy: found 'mru', expected one of lru, fifo"},
      {{"--capacity-blocks", "0"}, "--capacity-blocks: found '0', expected blocks"},
      {{"--capacity-blocks", "64GiB"}, "--capacity-blocks: found '64GiB', expected blocks"},
      {{"--capacity-bytes", "64GB"}, "--capacity-bytes: found '64GB', expected bytes"},
      {{"--capacity-bytes", "64GiB"}, "--bytes-per-token: found nothing, expected it"},
      {{"--capacity-bytes", "1KiB", "--bytes-per-token", "1KiB"}, "expected room for a block"},
      {{"--tiers", "64GiB"}, "--tiers: found '64GiB', expected a tier such as host=64GiB"},
      {{"--tiers", "a=10,a=20"}, "--tiers: found 'a' twice"},
      {{"--tiers", "a=20,b=10"}, "expected an inclusive tier to hold what is above it"},
      {{"--tiers", "a=20", "--capacity-blocks", "3"}, "expected one or the other"},
      {{"--identity", "prefix-lengths"},
       "--identity: found 'prefix-lengths' for a trace in format"},
      {{"--input-format", "lcp"}, "libCacheSim is not read"},
      {{"--order", "random"}, "--order: found 'random', expected one of time, file"},
      {{"--format", "xml"}, "kvtier simulate --help"},
      {{"--output", "/nowhere/result.json"}, "--output: "},
  };
  for (const auto& [options, message] : cases) {
    std::vector<std::string> arguments = {"simulate", kSessions};
    arguments.insert(arguments.end(), options.begin(), options.end());
    const Outcome outcome = run_kvtier(arguments);
    SCOPED_TRACE(outcome.errors);
    EXPECT_EQ(outcome.exit_code, 2);
    EXPECT_EQ(outcome.output, "");
    EXPECT_THAT(outcome.errors, AllOf(StartsWith("kvtier: "), HasSubstr(message)));
  }
}

TEST(SimulateCommand, HelpFitsAScreenAndItsExamplesRun) {
  for (const char* verb : {"simulate", "sweep"}) {
    const Outcome outcome = run_kvtier({verb, "--help"});
    EXPECT_EQ(outcome.exit_code, 0);
    EXPECT_LE(std::count(outcome.output.begin(), outcome.output.end(), '\n'), 50);
    EXPECT_THAT(outcome.output, AllOf(HasSubstr("tests/traces/agent-sessions"),
                                      HasSubstr("tests/traces/mooncake/conversation-2000")));
  }
  EXPECT_EQ(run_kvtier({"simulate", kSessions, "--capacity-blocks", "1024,10%"}).exit_code, 0);
  EXPECT_EQ(run_kvtier({"simulate", kRequests, "--bytes-per-token", "128KiB", "--tiers",
                        "device=8GiB,host=64GiB,disk=512GiB", "--policy", "lru,arc"})
                .exit_code,
            0);
}

TEST(SweepCommand, CurvesAreTheSameOnAnyNumberOfThreads) {
  const auto sweep = [](const char* threads, const char* format) {
    return run_kvtier({"sweep", kRequests, "--policy", "lru,sieve,gdsf,optimal,infinite",
                       "--points", "6", "--threads", threads, "--format", format});
  };
  const Outcome one = sweep("1", "json");
  ASSERT_EQ(one.exit_code, 0) << one.errors;
  EXPECT_EQ(one.errors, "");  // No progress where stderr is no terminal.
  const ordered_json json = ordered_json::parse(one.output);
  EXPECT_EQ(json["schema"], "kvtier.sweep-result");
  ASSERT_EQ(json["curves"].size(), 5u);
  const ordered_json& points = json["curves"][3]["points"];
  EXPECT_EQ(points.size(), 6u);
  EXPECT_EQ(points[5]["capacity_blocks"], json["trace"]["unique_blocks"]);
  EXPECT_EQ(points[5]["hit_tokens"], json["curves"][4]["points"][0]["hit_tokens"]);
  for (std::size_t i = 1; i < points.size(); ++i) {
    EXPECT_GE(points[i]["hit_tokens"], points[i - 1]["hit_tokens"]);
    EXPECT_NEAR(
        points[i]["token_hit_ratio"].get<double>() + points[i]["token_miss_ratio"].get<double>(), 1,
        1e-12);
  }
  for (const char* format : {"json", "csv", "table"}) {
    EXPECT_EQ(sweep("3", format).output, sweep("1", format).output);
  }
}

TEST(SweepCommand, GoesOnWhereItWasStopped) {
  const ScratchFolder scratch;
  const std::string partial = scratch.path() / "partial.json";
  const std::vector<std::string> arguments = {"sweep",    kRequests, "--policy", "fifo,optimal",
                                              "--points", "4",       "--format", "csv"};
  std::vector<std::string> resumed = arguments;
  resumed.insert(resumed.end(), {"--resume", partial});
  const Outcome whole = run_kvtier(arguments);
  EXPECT_EQ(run_kvtier(resumed).output, whole.output);
  // As if it had been stopped: some runs are missing, and one has a figure by which we know that it
  // was not run again.
  ordered_json json = ordered_json::parse(contents(partial));
  ASSERT_EQ(json["runs"].size(), 8u);
  json["runs"].erase(2);
  json["runs"][1]["hit_tokens"] = 12345;
  std::ofstream(partial) << json;
  const Outcome again = run_kvtier(resumed);
  EXPECT_EQ(again.exit_code, 0) << again.errors;
  EXPECT_THAT(again.output, HasSubstr(",12345,"));
  EXPECT_EQ(std::count(again.output.begin(), again.output.end(), '\n'), 9);
  // Of other options it is not taken.
  resumed[3] = "fifo";
  const Outcome other = run_kvtier(resumed);
  EXPECT_EQ(other.exit_code, 2);
  EXPECT_THAT(other.errors, HasSubstr("--resume: found runs of another trace or other options"));
  std::ofstream(partial) << "{\"schema\": \"kvtier.sweep-partial\"}";
  EXPECT_EQ(run_kvtier(resumed).exit_code, 3);
  std::ofstream(partial) << "half a fi";
  EXPECT_EQ(run_kvtier(resumed).exit_code, 3);
}

TEST(SweepCommand, TimeLeft) {
  EXPECT_EQ(time_left(0, 10, 5), "");
  EXPECT_EQ(time_left(10, 10, 5), "");
  EXPECT_EQ(time_left(5, 10, 5), "5 s");
  EXPECT_EQ(time_left(1, 21, 4), "1 min 20 s");
  EXPECT_EQ(time_left(1, 3, 3600), "2 h 0 min");
}

TEST(SweepCapacities, AreEvenInTheirLogarithmAndDistinct) {
  EXPECT_THAT(sweep_capacities(1'000'000, 4), ElementsAre(1000, 10'000, 100'000, 1'000'000));
  EXPECT_THAT(sweep_capacities(3, 20), ElementsAre(1, 2, 3));
  EXPECT_THAT(sweep_capacities(1, 2), ElementsAre(1));
}

}  // namespace
}  // namespace kvtier
