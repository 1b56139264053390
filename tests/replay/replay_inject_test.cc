#include "tests/replay/replay_runner.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sched.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <optional>
#include <string>

namespace kvtier {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;

class ReplayInject : public ::testing::Test {
 protected:
  void SetUp() override { write_trace(make_trace(replayable_trace()), trace_path()); }
  std::string trace_path() const { return folder_.path() / "trace"; }

  std::vector<std::string> arguments(const std::string& inject) const {
    return {"--budget",        "400", "--extent-bytes", "8KiB", "--device-capacity", "30%",
            "--host-capacity", "30%", "--inject",       inject, "--verify",          "all"};
  }

  ScratchFolder folder_;
};

TEST_F(ReplayInject, FaultsThatPassAreRecoveredFrom) {
  const json run =
      replay_json(trace_path(), arguments("bitflip:disk:1e-2,bitflip:link:1e-3,shortread:1e-2,"
                                          "eio:1e-2,misplaced:1e-2,seed=7"))["runs"]
          .at(0);
  EXPECT_TRUE(run["verified"].get<bool>());
  EXPECT_EQ(run["blocks"]["failed"], 0);
  EXPECT_GT(run["blocks"]["mismatched"], 0);
  EXPECT_GT(run["blocks"]["recovered"], 0);
  EXPECT_GT(run["faults_fired"]["bitflip"], 0);
  EXPECT_LE(run["attended_error"]["max"].get<double>(), 1e-4);
  for (const json& tier : run["tiers"]) EXPECT_LE(tier["peak_bytes"], tier["capacity_bytes"]);
}

TEST_F(ReplayInject, BlocksThatRottedOnDiskAreNamedAndNothingWrongIsAttended) {
  // Every write rots: what is on disk alone cannot be had any more.
  std::vector<std::string> all = arguments("rot:1,seed=3");
  const std::string output = folder_.path() / "result.json";
  all.insert(all.end(), {"--output", output});
  all.insert(all.begin(), {"replay", trace_path(), "--format", "json"});
  const Outcome outcome = run_kvtier(all);
  EXPECT_EQ(outcome.exit_code, 4) << outcome.errors;
  std::ifstream file(output);
  const json run = json::parse(file)["runs"].at(0);
  EXPECT_FALSE(run["verified"].get<bool>());
  EXPECT_GT(run["blocks"]["failed"], 0);
  EXPECT_GT(run["failed_steps"], 0);
  ASSERT_FALSE(run["failures"].empty());
  EXPECT_THAT(run["failures"][0].get<std::string>(), HasSubstr("disk"));
  if (!run["attended_error"]["max"].is_null()) {
    EXPECT_LE(run["attended_error"]["max"].get<double>(), 1e-4);
  }
  for (const json& tier : run["tiers"]) EXPECT_LE(tier["peak_bytes"], tier["capacity_bytes"]);
}

TEST_F(ReplayInject, TheTableEndsWithWhatFailed) {
  std::vector<std::string> all = arguments("rot:1,seed=3");
  all.insert(all.begin(), {"replay", trace_path()});
  const Outcome outcome = run_kvtier(all);
  EXPECT_EQ(outcome.exit_code, 4);
  const std::size_t last = outcome.output.rfind('\n', outcome.output.size() - 2);
  EXPECT_THAT(outcome.output.substr(last + 1), ::testing::StartsWith("FAILED "));
}

/// Whether the process has a file open in `folder`: the disk tier's, which has no name there.
bool has_file_in(pid_t process, const std::filesystem::path& folder) {
  std::error_code error;
  const std::filesystem::path open_files = "/proc/" + std::to_string(process) + "/fd";
  for (const auto& entry : std::filesystem::directory_iterator(open_files, error)) {
    const std::string target = std::filesystem::read_symlink(entry.path(), error).string();
    if (target.starts_with(folder.string())) return true;
  }
  return false;
}

/// CPU time that the process has used; less than nothing when that cannot be told.
std::chrono::nanoseconds cpu_time_of(pid_t process) {
  clockid_t clock = 0;
  timespec time{};
  if (clock_getcpuclockid(process, &clock) != 0 || clock_gettime(clock, &time) != 0) {
    return std::chrono::nanoseconds(-1);
  }
  return std::chrono::seconds(time.tv_sec) + std::chrono::nanoseconds(time.tv_nsec);
}

/// Runs `words` until its disk tier has been seen and it has worked for `work` more; then kills it.
void kill_at_work(std::vector<std::string> words, const std::filesystem::path& disk,
                  std::chrono::nanoseconds work) {
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_addopen(&actions, STDOUT_FILENO, "/dev/null", O_WRONLY, 0);
  pid_t child = 0;
  ASSERT_EQ(posix_spawn(&child, argv[0], &actions, nullptr, argv.data(), environ), 0);
  posix_spawn_file_actions_destroy(&actions);
  int state = 0;
  bool ended = false;
  std::optional<std::chrono::nanoseconds> end;
  while (!ended && (!end || cpu_time_of(child) < *end)) {
    if (!end && has_file_in(child, disk)) end = cpu_time_of(child) + work;
    ended = waitpid(child, &state, WNOHANG) == child;
    sched_yield();
  }
  ASSERT_FALSE(ended) << "ended before it was killed";
  ASSERT_EQ(kill(child, SIGKILL), 0);
  ASSERT_EQ(waitpid(child, &state, 0), child);
  ASSERT_TRUE(WIFSIGNALED(state));
}

TEST_F(ReplayInject, AKilledRunLeavesNothingBehind) {
  using std::chrono::milliseconds;
  const std::filesystem::path disk = folder_.path() / "disk";
  const std::filesystem::path result = folder_.path() / "result.json";
  std::filesystem::create_directory(disk);
  // Work for a long time compared with how soon it is killed: while the tiers are made, while the
  // prompt goes in, and amid the steps.
  const std::vector<std::string> words = {
      KVTIER_BINARY, "replay",       shipped_trace(),
      "--disk-path", disk.string(),  "--budget",
      "100%",        "--selector",   "landmark,oracle,recency,random",
      "--output",    result.string()};
  for (const milliseconds work : {milliseconds(0), milliseconds(100), milliseconds(400)}) {
    ASSERT_NO_FATAL_FAILURE(kill_at_work(words, disk, work));
    EXPECT_TRUE(std::filesystem::is_empty(disk));
    EXPECT_FALSE(std::filesystem::exists(result));
  }
  const std::vector<std::string> again = {
      "--disk-path",    disk.string(), "--budget",          "100",
      "--extent-bytes", "8KiB",        "--device-capacity", "30%"};
  EXPECT_TRUE(replay_json(trace_path(), again)["runs"].at(0)["verified"].get<bool>());
  EXPECT_TRUE(std::filesystem::is_empty(disk));
}

}  // namespace
}  // namespace kvtier
