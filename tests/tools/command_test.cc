// The real program: help, usage errors, and `inspect` on sound and unsound inputs.

#include "tests/tools/make_trace.h"
#include "tests/tools/run_kvtier.h"
#include "transfer/sha256.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>
#include <functional>

namespace kvtier {
namespace {

using nlohmann::ordered_json;
using testing::AllOf;
using testing::HasSubstr;
using testing::StartsWith;

constexpr const char* kShippedTrace = KVTIER_SOURCE_DIR "/tests/traces/smollm2-8k-demo";

std::size_t line_count(const std::string& text) {
  return static_cast<std::size_t>(std::count(text.begin(), text.end(), '\n'));
}

TEST(Command, HelpFitsAScreenAndShowsExamples) {
  const std::vector<std::vector<std::string>> commands = {
      {"--help"}, {"inspect", "--help"}, {"bench", "attention", "--help"}};
  for (const std::vector<std::string>& arguments : commands) {
    const Outcome outcome = run_kvtier(arguments);
    EXPECT_EQ(outcome.exit_code, 0);
    EXPECT_EQ(outcome.errors, "");
    EXPECT_LE(line_count(outcome.output), 50u);
    const std::size_t examples = outcome.output.find("Examples:");
    ASSERT_NE(examples, std::string::npos) << outcome.output;
    EXPECT_THAT(outcome.output.substr(examples),
                testing::ContainsRegex("\n *kvtier [^\n]+\n *kvtier [^\n]+"));
  }
  EXPECT_THAT(run_kvtier({"inspect", "--help"}).output, HasSubstr("default: table"));
}

TEST(Command, VersionIsOneLine) {
  const Outcome outcome = run_kvtier({"--version"});
  EXPECT_EQ(outcome.exit_code, 0);
  EXPECT_THAT(outcome.output, testing::MatchesRegex("kvtier [0-9]+\\.[0-9]+\\.[0-9]+\n"));
}

TEST(Command, WrongUsageIsExitCode2WithOneLineAndAHint) {
  const std::pair<std::vector<std::string>, const char*> cases[] = {
      {{}, "kvtier --help"},
      {{"unknown"}, "kvtier --help"},
      {{"inspect"}, "kvtier inspect --help"},
      {{"inspect", "a", "b"}, "kvtier inspect --help"},
      {{"inspect", kShippedTrace, "--format", "xml"}, "kvtier inspect --help"},
      {{"inspect", kShippedTrace, "--format"}, "kvtier inspect --help"},
      {{"inspect", kShippedTrace, "--nonsense"}, "kvtier inspect --help"},
  };
  for (const auto& [arguments, hint] : cases) {
    const Outcome outcome = run_kvtier(arguments);
    SCOPED_TRACE(outcome.errors);
    EXPECT_EQ(outcome.exit_code, 2);
    EXPECT_EQ(outcome.output, "");
    EXPECT_EQ(line_count(outcome.errors), 1u);
    EXPECT_THAT(outcome.errors, AllOf(StartsWith("kvtier: "), HasSubstr(hint)));
  }
}

TEST(InspectCommand, ShowsTheShippedTrace) {
  const Outcome outcome = run_kvtier({"inspect", kShippedTrace});
  EXPECT_EQ(outcome.exit_code, 0);
  EXPECT_EQ(outcome.errors, "");
  for (const char* part :
       {"attention trace smollm2-8k-demo", "SmolLM2-135M-Instruct", "Apache-2.0",
        "30 layers, 9 query heads, 3 KV heads, head dim 64", "7547", "169",
        "11.1 MiB (11592192 bytes) of float16", "Who is Emma's governess in the text?",
        "expected 90157; solved by full attention", "[3545, 3563)", "[7547, 3, 64]",
        "prompt_queries", "sound"}) {
    EXPECT_THAT(outcome.output, HasSubstr(part));
  }
}

TEST(InspectCommand, JsonStartsWithSchemaVersionOptionsAndDigest) {
  const Outcome outcome = run_kvtier({"inspect", kShippedTrace, "--format", "json"});
  EXPECT_EQ(outcome.exit_code, 0);
  const ordered_json json = ordered_json::parse(outcome.output);
  std::vector<std::string> keys;
  for (const auto& [key, value] : json.items()) keys.push_back(key);
  EXPECT_THAT(keys, testing::ElementsAre("schema", "version", "options", "digest", "kind", "sound",
                                         "error", "attention_trace"));
  EXPECT_EQ(json["schema"], "kvtier.inspect-result");
  EXPECT_EQ(json["version"], 1);
  EXPECT_EQ(json["sound"], true);
  EXPECT_EQ(json["digest"],
            "sha256:" + sha256_hex(read_bytes(std::string(kShippedTrace) + "/manifest.json")));
  const ordered_json& trace = json["attention_trace"];
  EXPECT_EQ(trace["tokens"], 7547);
  EXPECT_EQ(trace["kv_bytes"], 11592192);
  EXPECT_EQ(trace["model"]["kv_heads"], 3);
  EXPECT_EQ(trace["turns"][0]["expected"], ordered_json::parse("[\"90157\"]"));
  EXPECT_EQ(trace["turns"][0]["evidence"], ordered_json::parse("[[3545, 3563]]"));
  EXPECT_EQ(trace["layers"][1]["layer"], 21);
  EXPECT_EQ(trace["layers"][1]["tensors"][0]["shape"], ordered_json::parse("[7547, 3, 64]"));
  EXPECT_EQ(trace["token_tensors"][0]["name"], "token_ids");
}

TEST(InspectCommand, JsonOfUnsoundInputSaysWhy) {
  const ScratchFolder scratch;
  const Outcome outcome = run_kvtier({"inspect", scratch.path() / "missing", "--format", "json"});
  EXPECT_EQ(outcome.exit_code, 3);
  const ordered_json json = ordered_json::parse(outcome.output);
  EXPECT_EQ(json["sound"], false);
  EXPECT_EQ("kvtier: " + json["error"].get<std::string>() + "\n", outcome.errors);
}

TEST(InspectCommand, UnknownKindsAreExitCode3AndTheKnownAreListed) {
  const ScratchFolder scratch;
  const std::filesystem::path file = scratch.path() / "file";
  std::vector<std::string> paths = {scratch.path(), "/dev/null"};
  int number = 0;
  for (const char* text :
       {"", "plain text", "{}", "{\"schema\": \"kvtier.other\"}", "{broken", "[1, 2]",
        "\x7f"
        "ELF"}) {
    paths.push_back(scratch.path() / fmt::format("file{}", number++));
    std::ofstream(paths.back()) << text;
  }
  for (const std::string& path : paths) {
    const Outcome outcome = run_kvtier({"inspect", path});
    SCOPED_TRACE(outcome.errors);
    EXPECT_EQ(outcome.exit_code, 3);
    EXPECT_EQ(outcome.output, "");
    EXPECT_EQ(line_count(outcome.errors), 1u);
    EXPECT_THAT(outcome.errors, AllOf(HasSubstr(path), HasSubstr("expected")));
    const bool is_kind_known =
        path == "/dev/null" || outcome.errors.find("syntax error") != std::string::npos;
    if (!is_kind_known) {
      EXPECT_THAT(outcome.errors, AllOf(HasSubstr("attention trace"), HasSubstr("replay result")));
    }
  }
}

TEST(InspectCommand, ALayerFileIsPointedToItsFolder) {
  const Outcome outcome =
      run_kvtier({"inspect", std::string(kShippedTrace) + "/layer-007.safetensors"});
  EXPECT_EQ(outcome.exit_code, 3);
  EXPECT_THAT(outcome.errors, HasSubstr("name its folder"));
}

// A name from a file must not move the cursor or colour the terminal of whoever looks at it.
TEST(InspectCommand, TextFromTheInputIsMadePrintable) {
  const ScratchFolder scratch;
  TraceDraft draft = make_trace({});
  draft.manifest["name"] = "red\x1b[31m\nsecond\x7f line \xc2\x9b";
  write_trace(draft, scratch.path() / "t");
  const Outcome outcome = run_kvtier({"inspect", scratch.path() / "t"});
  EXPECT_EQ(outcome.exit_code, 0) << outcome.errors;
  EXPECT_THAT(outcome.output, HasSubstr("red\\u001b[31m\\nsecond\\u007f line ?"));
  EXPECT_EQ(outcome.output.find('\x1b'), std::string::npos);
}

TEST(InspectCommand, MisalignedFilesAreSoundAndSaid) {
  const ScratchFolder scratch;
  write_trace(make_trace({.misalign_bytes = 1}), scratch.path() / "t");
  const Outcome outcome = run_kvtier({"inspect", scratch.path() / "t"});
  EXPECT_EQ(outcome.exit_code, 0) << outcome.errors;
  EXPECT_THAT(outcome.output, HasSubstr("misaligned"));
}

ordered_json replay_result() {
  return ordered_json::parse(R"({
    "schema": "kvtier.replay-result", "version": 1, "options": {}, "trace": {}, "machine": {},
    "runs": [{
      "selector": "landmark", "budget": "2%", "tokens_attended_mean": 147.5,
      "recall": {"mean": 0.9, "p5": 0.7, "min": 0.2}, "recall_ratio": 0.95,
      "recall_long_range": 0.8, "recall_long_range_ratio": 0.9, "evidence_recall": null,
      "output_error": {"mean": 0.1, "max": 0.5},
      "blocks": {"verified": 1000, "mismatched": 2, "recovered": 2, "failed": 0},
      "tiers": {"device": {"capacity_bytes": 100, "peak_bytes": 100, "hits": 5},
                "host": {"capacity_bytes": 200, "peak_bytes": 150, "hits": 6},
                "disk": {"capacity_bytes": 1000, "peak_bytes": 900, "hits": 7}},
      "bytes": {"disk_to_host": 1, "host_to_device": 2, "device_to_host": 3, "host_to_disk": 4},
      "prefetch": {"useful_bytes": 1, "wasted_bytes": 2, "late": 3},
      "metadata_bytes": 77, "layers": [{}, {}], "timing": {}}]})");
}

TEST(InspectCommand, SummarisesAReplayResult) {
  const ScratchFolder scratch;
  std::ofstream(scratch.path() / "result.json") << replay_result();
  const Outcome table = run_kvtier({"inspect", scratch.path() / "result.json"});
  EXPECT_EQ(table.exit_code, 0) << table.errors;
  EXPECT_THAT(table.output, AllOf(HasSubstr("replay result with 1 run"), HasSubstr("landmark"),
                                  HasSubstr("2%"), HasSubstr("90.0%"), HasSubstr("1000")));
  const Outcome json = run_kvtier({"inspect", scratch.path() / "result.json", "--format", "json"});
  const ordered_json parsed = ordered_json::parse(json.output);
  EXPECT_EQ(parsed["kind"], "replay_result");
  EXPECT_EQ(parsed["replay_result"]["runs"][0]["blocks_mismatched"], 2);
  EXPECT_EQ(parsed["replay_result"]["runs"][0]["output_error_max"], 0.5);
}

struct BrokenResult {
  const char* pointer;
  ordered_json value;  ///< Discarded: the field is left out.
  const char* message;
};

TEST(InspectCommand, BrokenReplayResultsAreExitCode3) {
  const ordered_json absent(ordered_json::value_t::discarded);
  const BrokenResult cases[] = {
      {"/version", 2, "version: found 2, expected 1"},
      {"/runs", ordered_json::array(), "runs: found [], expected at least one run"},
      {"/machine", 3, "machine: found 3, expected an object"},
      {"/runs/0/selector", absent, "runs[0].selector: found nothing"},
      {"/runs/0/recall/mean", 1.5, "runs[0].recall.mean: found 1.5, expected a share from 0 to 1"},
      {"/runs/0/recall/p5", "high", "runs[0].recall.p5: found \"high\", expected a number"},
      {"/runs/0/evidence_recall", absent, "runs[0].evidence_recall: found nothing"},
      {"/runs/0/output_error/max", -1.0, "runs[0].output_error.max: found -1.0"},
      {"/runs/0/tiers/host/peak_bytes", 201,
       "runs[0].tiers.host.peak_bytes: found 201, expected at most capacity_bytes, 200"},
      {"/runs/0/tiers/disk", absent, "runs[0].tiers.disk: found nothing"},
      {"/runs/0/blocks/failed", -1, "runs[0].blocks.failed: found -1, expected a whole number"},
      {"/runs/0/bytes/host_to_disk", absent, "runs[0].bytes.host_to_disk: found nothing"},
      {"/runs/0/layers", 2, "runs[0].layers: found 2, expected an array"},
  };
  for (const BrokenResult& broken : cases) {
    SCOPED_TRACE(broken.pointer);
    ordered_json json = replay_result();
    const ordered_json::json_pointer pointer(broken.pointer);
    if (broken.value.is_discarded()) {
      json[pointer.parent_pointer()].erase(pointer.back());
    } else {
      json[pointer] = broken.value;
    }
    const ScratchFolder scratch;
    std::ofstream(scratch.path() / "result.json") << json;
    const Outcome outcome = run_kvtier({"inspect", scratch.path() / "result.json"});
    EXPECT_EQ(outcome.exit_code, 3);
    EXPECT_EQ(outcome.output, "");
    EXPECT_THAT(outcome.errors, HasSubstr(broken.message));
  }
}

// A reader that went away and a full disk are failures of the run, not success.
TEST(InspectCommand, AnUnwritableResultIsExitCode1) {
  const Outcome outcome = run_kvtier({"inspect", kShippedTrace}, "/dev/full");
  EXPECT_EQ(outcome.exit_code, 1);
  EXPECT_THAT(outcome.errors, HasSubstr("cannot write the result"));
}

}  // namespace
}  // namespace kvtier
