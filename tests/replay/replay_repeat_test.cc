#include "tests/replay/replay_runner.h"
#include "tools/replay/replay_measure.h"
#include "tools/replay/replay_run.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

namespace kvtier {
namespace {

TEST(ReplayRepeat, EqualInputAndOptionsGiveEqualBytes) {
  const ScratchFolder folder;
  const std::string trace = folder.path() / "trace";
  write_trace(make_trace(replayable_trace()), trace);
  const std::vector<std::string> shared = {"--selector",        "landmark,random",
                                           "--budget",          "100",
                                           "--extent-bytes",    "8KiB",
                                           "--device-capacity", "30%",
                                           "--host-capacity",   "30%"};
  const std::vector<std::vector<std::string>> variants = {
      {},
      {"--deterministic"},
      {"--inject", "bitflip:2e-2,shortread:2e-2,eio:1e-2,misplaced:1e-2,delay:5e-2,seed=7"},
  };
  for (const auto& variant : variants) {
    std::vector<std::string> arguments = shared;
    arguments.insert(arguments.end(), variant.begin(), variant.end());
    arguments.insert(arguments.begin(), {"replay", trace, "--format", "json"});
    const Outcome first = run_kvtier(arguments);
    arguments.insert(arguments.end(), {"--threads", "1"});
    const Outcome second = run_kvtier(arguments);
    EXPECT_EQ(first.exit_code, second.exit_code) << first.errors << second.errors;
    EXPECT_EQ(repeatable_part(nlohmann::json::parse(first.output)),
              repeatable_part(nlohmann::json::parse(second.output)));
  }
}

/// One run of a generated trace inside this process, so that outputs can be compared.
class ReplayCapacities : public ::testing::Test {
 protected:
  ReplayCapacities() {
    write_trace(make_trace(replayable_trace()), folder_.path() / "trace");
    auto trace = AttentionTrace::open(folder_.path() / "trace");
    KVTIER_CHECK(trace.ok(), "{}", trace.status().message());
    trace_.emplace(std::move(*trace));
  }

  RunRecord run(const char* device_capacity, const char* host_capacity, bool deterministic) {
    ReplayOptions options;
    options.budgets = {Budget::parse("150").value()};
    options.extent_bytes = 8 * 1024;
    options.device_capacity = Capacity::parse(device_capacity).value();
    options.host_capacity = Capacity::parse(host_capacity).value();
    options.disk_path = folder_.path();
    options.deterministic = deterministic;
    const ReplayPlan plan = value_of(ReplayPlan::make(options, *trace_));
    HostDevice device(2);
    Progress progress;
    RunSetup setup{.plan = &plan,
                   .trace = &*trace_,
                   .run = &plan.runs.front(),
                   .device = &device,
                   .disk = value_of(open_disk(plan)),
                   .inject = {},
                   .keep_timeline = false};
    return value_of(replay_run(std::move(setup), progress));
  }

  template <typename T>
  static T value_of(Result<T> result) {
    KVTIER_CHECK(result.ok(), "{}", result.status().message());
    return std::move(*result);
  }

  ScratchFolder folder_;
  std::optional<AttentionTrace> trace_;
};

TEST_F(ReplayCapacities, SmallTiersAttendTheSameBlocksWithTheSameOutput) {
  const RunRecord resident = run("300%", "300%", false);
  const RunRecord small = run("30%", "30%", false);
  EXPECT_EQ(resident.stats.tiers[static_cast<std::size_t>(Tier::kDisk)].hits, 0u);
  EXPECT_GT(small.stats.tiers[static_cast<std::size_t>(Tier::kDisk)].hits, 0u);
  EXPECT_EQ(resident.attended.digest(), small.attended.digest());
  ASSERT_EQ(resident.outs.size(), small.outs.size());
  const std::size_t row = trace_->manifest().model.value_dim;
  for (std::size_t i = 0; i < resident.outs.size(); i += row) {
    EXPECT_LE(relative_error(std::span(small.outs).subspan(i, row),
                             std::span(resident.outs).subspan(i, row)),
              1e-5);
  }
}

TEST_F(ReplayCapacities, DeterministicRunsAreEqualBitForBit) {
  const RunRecord resident = run("300%", "300%", true);
  const RunRecord small = run("30%", "30%", true);
  EXPECT_GT(small.stats.tiers[static_cast<std::size_t>(Tier::kDisk)].hits, 0u);
  EXPECT_EQ(resident.attended.digest(), small.attended.digest());
  EXPECT_TRUE(std::ranges::equal(std::as_bytes(std::span(resident.outs)),
                                 std::as_bytes(std::span(small.outs))));
  EXPECT_FALSE(std::ranges::any_of(resident.outs, [](float x) { return std::isnan(x); }));
}

}  // namespace
}  // namespace kvtier
