#include "tests/tools/profile_files.h"

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include <fstream>
#include <span>

namespace kvtier {

namespace {

ProfileEntry figure(const char* name, ProfileParameters parameters, double rate) {
  ProfileEntry entry;
  entry.name = name;
  entry.parameters = std::move(parameters);
  entry.unit = "bytes_per_s";
  entry.median = entry.lowest = entry.highest = rate;
  entry.repetitions = 1;
  return entry;
}

}  // namespace

std::string config_path(const std::string& name) {
  return std::string(KVTIER_SOURCE_DIR "/tests/tools/model_configs/") + name + ".json";
}

std::string with_keys(const std::string& name, const std::string& keys) {
  std::ifstream file(config_path(name));
  nlohmann::json config = nlohmann::json::parse(file);
  config.update(nlohmann::json::parse("{" + keys + "}"));
  return config.dump();
}

Result<ModelDescription> parse_config_text(const std::string& text, const std::string& read_as) {
  return parse_model_config(std::as_bytes(std::span(text)), "config.json", read_as);
}

MachineProfile round_machine() {
  MachineProfile machine;
  machine.name = "round";
  machine.source = "published";
  machine.threads = 1;
  machine.gpu = "round GPU";
  machine.gpu_memory_bytes = std::uint64_t{100} << 30;
  machine.host_memory_bytes = std::uint64_t{200} << 30;
  machine.disk_free_bytes = std::uint64_t{1000} << 30;
  machine.entries.push_back(figure("device.read", {}, 1e12));
  machine.entries.push_back(
      figure("link.host_to_device", {{"method", std::string("large")}}, 1e10));
  machine.entries.push_back(figure(
      "link.host_to_device", {{"method", std::string("gather")}, {"block_bytes", 4096.0}}, 1e10));
  machine.entries.push_back(figure("disk.random_read", {{"block_bytes", 131072.0}}, 1e9));
  machine.entries.push_back(figure("disk.sequential_read", {{"block_bytes", 1048576.0}}, 1e9));
  machine.entries.push_back(figure("gemm", {}, 1e14));
  machine.entries.back().unit = "flop_per_s";
  return machine;
}

std::string write_scratch(const std::string& name, const std::string& text) {
  const std::string path = testing::TempDir() + "kvtier-profile-" + name;
  std::ofstream(path, std::ios::binary) << text;
  return path;
}

}  // namespace kvtier
