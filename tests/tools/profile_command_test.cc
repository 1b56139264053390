// The real program: `kvtier profile`, its exit codes, its JSON, and that its suggestions run.

#include "tests/tools/profile_files.h"
#include "tests/tools/run_kvtier.h"
#include "tools/profile/budget_options.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <sstream>

namespace kvtier {
namespace {

using testing::HasSubstr;

std::vector<std::string> budget_arguments(std::vector<std::string> more) {
  std::vector<std::string> arguments = {"profile", "budget", "--model",
                                        config_path("llama-3.1-8b")};
  arguments.insert(arguments.end(), more.begin(), more.end());
  return arguments;
}

/// "kvtier a b" without quoted words.
std::vector<std::string> words_of(const std::string& command) {
  std::istringstream stream(command);
  std::vector<std::string> words;
  for (std::string word; stream >> word;) words.push_back(word);
  words.erase(words.begin());
  return words;
}

TEST(ProfileCommand, HelpFitsAScreenAndShowsExamples) {
  for (const std::vector<std::string>& arguments : {std::vector<std::string>{"profile", "--help"},
                                                    {"profile", "budget", "--help"},
                                                    {"profile", "machine", "--help"}}) {
    const Outcome outcome = run_kvtier(arguments);
    EXPECT_EQ(outcome.exit_code, 0);
    EXPECT_LE(std::ranges::count(outcome.output, '\n'), 50) << outcome.output;
    EXPECT_THAT(outcome.output, testing::ContainsRegex("Examples:\n *kvtier [^\n]+\n"));
  }
}

TEST(ProfileCommand, ExitCodesSayHowItEnded) {
  const std::string machine = write_scratch("round.json", round_machine().to_json());
  const std::string broken = write_scratch("broken.json", "{}");
  const std::string unknown = write_scratch("unknown.json", R"({"model_type": "novel"})");
  const std::pair<std::vector<std::string>, std::pair<int, const char*>> cases[] = {
      {budget_arguments({}), {0, ""}},
      {budget_arguments({"--machine", machine}), {0, ""}},
      {budget_arguments({"--machine", machine, "--target-ms", "1e6"}), {0, ""}},
      {budget_arguments({"--machine", machine, "--target-ms", "1e-6"}), {4, ""}},
      {budget_arguments({"--device-memory", "1GiB"}), {4, ""}},
      {budget_arguments({"--target-ms", "10"}), {2, "--machine"}},
      {budget_arguments({"--kv-dtype", "fp5"}), {2, "expected fp32"}},
      {budget_arguments({"--selector", "nonsense"}), {2, "--selector"}},
      {budget_arguments({"--context", "0"}), {2, "--context"}},
      {budget_arguments({"--context", "10", "--prefix", "11"}), {2, "--prefix"}},
      {budget_arguments({"--reserve", "100%"}), {2, "--reserve"}},
      {budget_arguments({"--machine", broken}), {3, "schema"}},
      {budget_arguments({"--machine", "/nowhere"}), {3, "/nowhere"}},
      {budget_arguments({"--trace", "/nowhere"}), {3, "/nowhere"}},
      {{"profile", "budget", "--model", unknown}, {3, "num_hidden_layers"}},
      {{"profile", "budget"}, {2, "--model"}},
      {{"profile"}, {2, "profile --help"}},
      {{"profile", "machine", "--seconds", "0"}, {2, "--seconds"}},
  };
  for (const auto& [arguments, expected] : cases) {
    const Outcome outcome = run_kvtier(arguments);
    EXPECT_EQ(outcome.exit_code, expected.first) << outcome.errors;
    EXPECT_THAT(outcome.errors, HasSubstr(expected.second));
  }
}

TEST(ProfileCommand, TheTableSaysWhatIsAssumedAndHowItEnds) {
  const std::string machine = write_scratch("round.json", round_machine().to_json());
  const Outcome outcome = run_kvtier(budget_arguments({"--machine", machine, "--sequences", "8"}));
  for (const char* part : {"32      full", "131072", "assumed", "reuse: standard", "ms per token",
                           "one more GiB", "prefix from disk", "disk wear", "\nPASS\n"}) {
    EXPECT_THAT(outcome.output, HasSubstr(part));
  }
}

TEST(ProfileCommand, JsonIsTheSameTwiceAndComplete) {
  const std::string machine = write_scratch("round.json", round_machine().to_json());
  const auto arguments =
      budget_arguments({"--machine", machine, "--format", "json", "--tokens-per-day", "1000000"});
  const Outcome outcome = run_kvtier(arguments);
  ASSERT_EQ(outcome.exit_code, 0) << outcome.errors;
  EXPECT_EQ(outcome.output, run_kvtier(arguments).output);
  const nlohmann::json json = nlohmann::json::parse(outcome.output);
  EXPECT_EQ(json["schema"], "kvtier.budget");
  EXPECT_EQ(json["version"], 1);
  EXPECT_EQ(json["model"]["layers"].size(), 32u);
  EXPECT_EQ(json["model"]["layers"][0]["bytes_per_token"], 4096);
  EXPECT_EQ(json["memory"]["kv_bytes_per_token"], 131072);
  EXPECT_GT(json["times"]["step"]["total_ms"], 0);
  EXPECT_FALSE(json["times"]["curve"].empty());
  EXPECT_EQ(json["disk_wear"]["bytes_per_day"], 131072e6);
  EXPECT_EQ(json["verdict"], "PASS");
}

TEST(ProfileCommand, SuggestionsRunAndPass) {
  const std::string machine = write_scratch("round.json", round_machine().to_json());
  const Outcome failed = run_kvtier(budget_arguments(
      {"--machine", machine, "--sequences", "100", "--target-ms", "20", "--format", "json"}));
  ASSERT_EQ(failed.exit_code, 4) << failed.errors;
  const nlohmann::json json = nlohmann::json::parse(failed.output);
  EXPECT_EQ(json["verdict"], "FAIL");
  ASSERT_FALSE(json["suggestions"].empty());
  for (const auto& suggestion : json["suggestions"]) {
    const Outcome outcome = run_kvtier(words_of(suggestion["command"]));
    EXPECT_EQ(outcome.exit_code, 0) << suggestion["command"] << outcome.errors;
  }
}

TEST(ProfileCommand, ACommandLineIsQuotedForTheShell) {
  BudgetOptions options;
  options.model_path = "it's here/config.json";
  EXPECT_THAT(budget_command(options),
              HasSubstr(R"(--model 'it'\''s here/config.json' --context 131072)"));
}

// What the budget says of the shipped trace's model is what a live replay finds: bytes of KV, and
// what the selector keeps. (Hits: ReuseCurve.OfTheShippedTraceIsNearTheStandardOne.)
TEST(ProfileCommand, AgreesWithALiveReplay) {
  const std::string config = write_scratch(
      "smollm2.json",
      R"({"model_type": "llama", "hidden_size": 576, "num_hidden_layers": 2, "vocab_size": 49152,
          "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536,
          "max_position_embeddings": 8192, "tie_word_embeddings": true})");
  const std::string trace = KVTIER_SOURCE_DIR "/tests/traces/smollm2-8k-demo";
  const Outcome replayed =
      run_kvtier({"replay", trace, "--selector", "scan", "--budget", "5%", "--device-capacity",
                  "20%", "--host-capacity", "110%", "--deterministic", "--format", "json"});
  ASSERT_EQ(replayed.exit_code, 0) << replayed.errors;
  const nlohmann::json live = nlohmann::json::parse(replayed.output);
  const std::uint64_t tokens = live["trace"]["tokens"];
  const Outcome planned =
      run_kvtier({"profile", "budget", "--model", config, "--context", std::to_string(tokens),
                  "--selector", "scan", "--budget", "5%", "--format", "json"});
  ASSERT_EQ(planned.exit_code, 0) << planned.errors;
  const nlohmann::json plan = nlohmann::json::parse(planned.output);
  const double kv = plan["memory"]["gpu"]["kv_bytes_per_sequence"];
  EXPECT_EQ(kv, double(tokens) * 2 * 3 * (64 + 64) * 2);
  double kept = 0;
  for (const auto& layer : live["runs"][0]["layers"]) kept += double(layer["metadata_bytes"]);
  EXPECT_NEAR(double(plan["memory"]["gpu"]["selector_bytes_per_sequence"]) / kept, 1, 0.05);
}

TEST(ProfileCommand, MeasuresThisMachineInAMoment) {
  const std::string path = testing::TempDir() + "kvtier-profile-measured.json";
  const Outcome outcome = run_kvtier({"profile", "machine", "--seconds", "0.5", "--output", path,
                                      "--disk", testing::TempDir(), "--threads", "2"});
  ASSERT_EQ(outcome.exit_code, 0) << outcome.errors;
  EXPECT_THAT(outcome.output, HasSubstr("fio --name=random_read"));
  EXPECT_THAT(outcome.output, HasSubstr("nvbandwidth"));
  EXPECT_THAT(outcome.output, HasSubstr("waived   link.host_to_device"));
  const auto profile = MachineProfile::read(path);
  ASSERT_TRUE(profile.ok()) << profile.status().to_string();
  for (const char* name :
       {"memory.read", "kernel.attention", "kernel.select", "kernel.checksum", "gemm"}) {
    const ProfileEntry* entry = profile->nearest(name, {});
    ASSERT_NE(entry, nullptr) << name;
    EXPECT_GE(entry->repetitions, 5u);
  }
  EXPECT_EQ(run_kvtier(budget_arguments({"--machine", path, "--context", "4096", "--device-memory",
                                         "100GiB", "--host-memory", "100GiB"}))
                .exit_code,
            0);
}

}  // namespace
}  // namespace kvtier
