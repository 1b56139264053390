#include "tests/replay/replay_runner.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>

namespace kvtier {
namespace {

using ::testing::HasSubstr;
using ::testing::IsEmpty;

class ReplayOptionsTest : public ::testing::Test {
 protected:
  void SetUp() override { write_trace(make_trace(replayable_trace()), trace_path()); }

  std::string trace_path() const { return folder_.path() / "trace"; }

  /// Exit 2, nothing on stdout, and one line that names `expected`.
  void expect_refused(std::vector<std::string> arguments,
                      const std::vector<std::string>& expected) const {
    const std::string shown = ::testing::PrintToString(arguments);
    arguments.insert(arguments.begin(), {"replay", trace_path()});
    const Outcome outcome = run_kvtier(arguments);
    EXPECT_EQ(outcome.exit_code, 2) << shown << outcome.errors;
    EXPECT_THAT(outcome.output, IsEmpty()) << shown;
    EXPECT_EQ(std::ranges::count(outcome.errors, '\n'), 1) << shown << outcome.errors;
    for (const std::string& part : expected) {
      EXPECT_THAT(outcome.errors, HasSubstr(part)) << shown;
    }
  }

  ScratchFolder folder_;
};

TEST_F(ReplayOptionsTest, WordsAndNumbersThatAreNotUnderstood) {
  expect_refused({"--selector", "nonesuch"}, {"--selector", "nonesuch", "mean", "oracle"});
  expect_refused({"--selector", "landmark(nonesuch=1)"}, {"--selector", "nonesuch"});
  expect_refused({"--selector", "landmark("}, {"--selector", "parenthesis"});
  expect_refused({"--selector", "landmark,,oracle"}, {"--selector"});
  expect_refused({"--budget", "101%"}, {"--budget", "101%"});
  expect_refused({"--budget", "many"}, {"--budget", "many", "512", "2%"});
  expect_refused({"--only-layers", "one"}, {"--only-layers", "one"});
  expect_refused({"--block-tokens", "0"}, {"--block-tokens", "0", "64"});
  expect_refused({"--block-tokens", "65"}, {"--block-tokens", "65", "64"});
  expect_refused({"--extent-bytes", "lots"}, {"--extent-bytes", "lots", "128KiB"});
  expect_refused({"--sinks", "-1"}, {"--sinks", "-1"});
  expect_refused({"--window", "0"}, {"--window", "0"});
  expect_refused({"--group-reduction", "median"},
                 {"--group-reduction", "median", "max, sum, mean"});
  expect_refused({"--eviction", "nonesuch"}, {"--eviction", "nonesuch", "lru"});
  expect_refused({"--look-ahead", "1%"}, {"--look-ahead", "1%"});
  expect_refused({"--device-capacity", "-5"}, {"--device-capacity", "-5", "64MiB", "10%"});
  expect_refused({"--verify", "none"}, {"--verify", "none", "arrivals, all"});
  expect_refused({"--inject", "gremlins:1e-3"}, {"--inject", "gremlins"});
  expect_refused({"--inject", "eio:2"}, {"--inject", "2"});
  expect_refused({"--file-backend", "tape"}, {"--file-backend", "tape", "io_uring"});
  expect_refused({"--seed", "x"}, {"--seed", "x"});
  expect_refused({"--threads", "0"}, {"--threads", "0"});
  expect_refused({"--format", "xml"}, {"--format", "xml", "table, json, csv"});
  expect_refused({"--no-such-option"}, {"--no-such-option"});
}

TEST_F(ReplayOptionsTest, WhatTheTraceOrTheMachineCannotGive) {
  expect_refused({"--budget", "60"}, {"--budget", "60", "68 tokens", "4 sinks", "window of 64"});
  expect_refused({"--budget", "1%"}, {"--budget", "1%", "9.87%", "68 tokens"});
  expect_refused({"--only-layers", "1,2"}, {"--only-layers", "2"});
  expect_refused({"--extent-bytes", "5000"}, {"--extent-bytes", "5000"});
  expect_refused({"--device-capacity", "1KiB", "--budget", "100"},
                 {"--device-capacity", "1KiB", "expected at least"});
  expect_refused({"--host-capacity", "1KiB", "--budget", "100", "--device-capacity", "100%"},
                 {"--host-capacity", "1KiB", "expected at least"});
  expect_refused({"--disk-capacity", "0", "--extent-bytes", "8KiB", "--budget", "100",
                  "--device-capacity", "100%"},
                 {"--disk-capacity", "0", "expected at least"});
  expect_refused({"--disk-path", "/nonexistent/folder", "--budget", "100", "--extent-bytes", "8KiB",
                  "--device-capacity", "100%"},
                 {"--disk-path", "/nonexistent/folder"});
  expect_refused({"--disk-capacity", "1000TiB", "--budget", "100", "--extent-bytes", "8KiB",
                  "--device-capacity", "100%"},
                 {"--disk-capacity"});
  expect_refused({"--inject", "bitflip:link:1e-3"}, {"--inject", "--verify all"});
}

TEST_F(ReplayOptionsTest, FilesThatCannotBeWrittenAreFoundBeforeTheRun) {
  const std::vector<std::string> sound = {"--budget",          "100", "--extent-bytes", "8KiB",
                                          "--device-capacity", "100%"};
  for (const std::string option : {"--output", "--timeline"}) {
    for (const std::string& path : {folder_.path().string(), std::string("/nonexistent/result")}) {
      std::vector<std::string> arguments = sound;
      arguments.insert(arguments.end(), {option, path});
      expect_refused(arguments, {option, path});
    }
  }
  const std::string path = folder_.path() / "same";
  const std::string same_file = folder_.path() / "." / "same";
  expect_refused({"--output", path, "--timeline", path}, {"--timeline", path});
  expect_refused({"--output", path, "--timeline", same_file}, {"--timeline", same_file});
  EXPECT_FALSE(std::filesystem::exists(path));
}

TEST_F(ReplayOptionsTest, ACapacityThatIsNamedAsTheLeastWorks) {
  // The message must be worth following: what it names has to do, and nothing less.
  for (const std::string option : {"--device-capacity", "--host-capacity", "--disk-capacity"}) {
    for (const bool deterministic : {false, true}) {
      std::vector<std::string> arguments = {"replay",         trace_path(), "--budget",     "100",
                                            "--extent-bytes", "8KiB",       "--look-ahead", "0"};
      if (deterministic) arguments.emplace_back("--deterministic");
      if (option != "--device-capacity") {
        arguments.insert(arguments.end(), {"--device-capacity", "100%"});
      }
      arguments.insert(arguments.end(), {option, "1"});
      const Outcome refused = run_kvtier(arguments);
      ASSERT_EQ(refused.exit_code, 2) << refused.errors;
      const std::string marker = "expected at least ";
      const std::size_t at = refused.errors.find(marker);
      ASSERT_NE(at, std::string::npos) << refused.errors;
      arguments.back() = std::to_string(std::stoull(refused.errors.substr(at + marker.size())));
      const Outcome accepted = run_kvtier(arguments);
      EXPECT_EQ(accepted.exit_code, 0) << option << " " << arguments.back() << accepted.errors;
    }
  }
}

TEST_F(ReplayOptionsTest, BadInputIsNotAUsageError) {
  const Outcome missing = run_kvtier({"replay", (folder_.path() / "nothing").string()});
  EXPECT_EQ(missing.exit_code, 3) << missing.errors;
  std::filesystem::resize_file(folder_.path() / "trace" / "layer-001.safetensors", 100);
  const Outcome damaged = run_kvtier({"replay", trace_path()});
  EXPECT_EQ(damaged.exit_code, 3) << damaged.errors;
  EXPECT_THAT(damaged.errors, HasSubstr("layer-001.safetensors"));
  EXPECT_EQ(std::ranges::count(damaged.errors, '\n'), 1) << damaged.errors;
}

}  // namespace
}  // namespace kvtier
