// Machine profiles: written and read again, looked up, damaged; and those that ship.

#include "tools/profile/machine_profile.h"

#include "tests/tools/profile_files.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include <filesystem>

namespace kvtier {
namespace {

using testing::HasSubstr;

ProfileParameters blocks(double bytes) {
  return {{"block_bytes", bytes}, {"method", std::string("gather")}};
}

MachineProfile three_sizes() {
  MachineProfile machine = round_machine();
  machine.entries.clear();
  for (const auto& [bytes, rate] :
       {std::pair{1024.0, 1e9}, std::pair{4096.0, 4e9}, std::pair{65536.0, 8e9}}) {
    ProfileEntry entry;
    entry.name = "link.host_to_device";
    entry.parameters = blocks(bytes);
    entry.unit = "bytes_per_s";
    entry.median = entry.lowest = entry.highest = rate;
    entry.repetitions = 3;
    machine.entries.push_back(entry);
  }
  return machine;
}

TEST(MachineProfile, ComesBackAsItWasWritten) {
  MachineProfile machine = three_sizes();
  machine.entries[0].latency_us_p50 = 12.5;
  machine.entries[0].latency_us_p99 = 99;
  machine.entries[0].lowest = 0.5e9;
  machine.entries[0].note = "by hand";
  ProfileEntry waived;
  waived.name = "gemm";
  waived.waived = "no GPU";
  machine.entries.push_back(waived);
  machine.numa_nodes.push_back({1, 4096, 2});
  machine.equivalents = {"fio --name=x"};
  const auto again = MachineProfile::parse(machine.to_json(), "p.json");
  ASSERT_TRUE(again.ok()) << again.status().to_string();
  EXPECT_EQ(again->to_json(), machine.to_json());
  EXPECT_EQ(again->entries[0].lowest, 0.5e9);
  EXPECT_EQ(again->why_none("gemm"), "no GPU");
  EXPECT_THAT(again->why_none("disk.random_read"), HasSubstr("no such entry"));
}

TEST(MachineProfile, FindsTheNearestAndInterpolates) {
  const MachineProfile machine = three_sizes();
  EXPECT_EQ(machine.nearest("link.host_to_device", blocks(5000))->median, 4e9);
  EXPECT_EQ(machine.nearest("link.host_to_device", blocks(1e9))->median, 8e9);
  EXPECT_EQ(machine.nearest("link.host_to_device", {{"method", std::string("large")}}), nullptr);
  EXPECT_EQ(machine.nearest("gemm", {}), nullptr);
  // Halfway between 1024 and 4096 by ratio is 2048; between 1e9 and 4e9 it is 2e9.
  EXPECT_NEAR(*machine.interpolated("link.host_to_device", "block_bytes", 2048), 2e9, 1);
  EXPECT_EQ(*machine.interpolated("link.host_to_device", "block_bytes", 1), 1e9);
  EXPECT_EQ(*machine.interpolated("link.host_to_device", "block_bytes", 1e9), 8e9);
  EXPECT_FALSE(machine.interpolated("link.host_to_device", "depth", 1).has_value());
}

TEST(MachineProfile, DamageIsNamed) {
  const auto damaged = [](const char* pointer, nlohmann::json value) {
    nlohmann::json json = nlohmann::json::parse(three_sizes().to_json());
    json[nlohmann::json::json_pointer(pointer)] = std::move(value);
    return json.dump();
  };
  const std::pair<std::string, const char*> cases[] = {
      {"{}", "schema: found nothing"},
      {damaged("/schema", "kvtier.replay"), "kvtier profile machine --output"},
      {damaged("/version", 2), "measure again"},
      {damaged("/entries", 3), "entries: found 3, expected an array"},
      {damaged("/entries/0/median", -1), "entries[0].median: found -1"},
      {damaged("/entries/0/median", "fast"), "entries[0].median"},
      {damaged("/entries/0/unit", "MB/s"), "entries[0].unit"},
      {damaged("/entries/0/lowest", 2e9), "in ascending order"},
      {damaged("/entries/0/repetitions", 0), "entries[0].repetitions: found 0"},
      {damaged("/entries/0/waived", "no reason"), "either a figure or the reason"},
      {damaged("/entries/0/parameters/block_bytes", 0), "entries[0].parameters.block_bytes"},
      {damaged("/entries/1/parameters/block_bytes", 1024), "other name or parameters"},
      {damaged("/machine", nullptr), "machine: found null"},
  };
  for (const auto& [text, expected] : cases) {
    const auto profile = MachineProfile::parse(text, "p.json");
    ASSERT_FALSE(profile.ok()) << expected;
    EXPECT_THAT(profile.status().message(), AllOf(HasSubstr("p.json"), HasSubstr(expected)));
  }
  EXPECT_EQ(MachineProfile::read("/nowhere.json").status().code(), StatusCode::kNotFound);
}

TEST(MachineProfile, ShippedOnesAreSound) {
  int count = 0;
  for (const auto& entry :
       std::filesystem::directory_iterator(KVTIER_SOURCE_DIR "/tools/profiles")) {
    const std::string path = entry.path().string();
    if (path.ends_with(".config.json")) continue;
    const auto profile = MachineProfile::read(path);
    ASSERT_TRUE(profile.ok()) << profile.status().to_string();
    EXPECT_THAT(profile->source, testing::AnyOf("measured", "published"));
    EXPECT_NE(profile->provenance, "") << path;
    EXPECT_EQ(profile->to_json(), MachineProfile::parse(profile->to_json(), path)->to_json());
    ++count;
  }
  EXPECT_GE(count, 3);
}

}  // namespace
}  // namespace kvtier
