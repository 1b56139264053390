#include "tools/cli/parse.h"
#include "tools/cli/text_table.h"
#include "tools/profile/measure.h"
#include "tools/replay/machine.h"

#include <fmt/format.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <utility>

namespace kvtier {

namespace {

namespace fs = std::filesystem;

/// "0-3,8" is five.
std::uint32_t count_cpus(const std::string& list) {
  const auto parts = split_list(list);
  if (!parts.ok()) return 0;
  std::uint64_t count = 0;
  for (const std::string& part : *parts) {
    const std::size_t dash = part.find('-');
    const auto first = parse_count(part.substr(0, dash));
    const auto last = dash == std::string::npos ? first : parse_count(part.substr(dash + 1));
    if (first.ok() && last.ok() && *last >= *first) count += *last - *first + 1;
  }
  return static_cast<std::uint32_t>(count);
}

std::uint64_t kib_after(const fs::path& file, const std::string& label) {
  std::ifstream stream(file);
  for (std::string line; std::getline(stream, line);) {
    const std::size_t at = line.find(label);
    if (at == std::string::npos) continue;
    const std::size_t digits = line.find_first_of("0123456789", at + label.size());
    if (digits == std::string::npos) return 0;
    const std::size_t end = line.find_first_not_of("0123456789", digits);
    const auto kib = parse_count(line.substr(digits, end - digits));
    return kib.ok() ? *kib * 1024 : 0;
  }
  return 0;
}

std::vector<NumaNodeDescription> find_numa_nodes() {
  std::vector<NumaNodeDescription> nodes;
  std::error_code error;
  for (const auto& entry : fs::directory_iterator("/sys/devices/system/node", error)) {
    const std::string name = entry.path().filename().string();
    if (!name.starts_with("node")) continue;
    const auto number = parse_count(name.substr(4));
    if (!number.ok()) continue;
    NumaNodeDescription node;
    node.node = static_cast<std::uint32_t>(*number);
    node.memory_bytes = kib_after(entry.path() / "meminfo", "MemTotal:");
    std::ifstream list(entry.path() / "cpulist");
    std::string cpus;
    std::getline(list, cpus);
    node.cpus = count_cpus(cpus);
    // A node without memory has nothing to measure.
    if (node.memory_bytes > 0) nodes.push_back(node);
  }
  std::ranges::sort(nodes, {}, &NumaNodeDescription::node);
  return nodes;
}

void waive_gpu(ProfileRun& run) {
#ifdef KVTIER_CUDA
  const std::string reason =
      "this verb does not measure GPUs yet; kvtier bench gather, gpu-attention and gpu-select do";
#else
  const std::string reason = "built without CUDA: no GPU is looked for";
#endif
  for (const char* name : {"link.host_to_device", "link.device_to_host", "link.both_ways",
                           "device.read", "kernel.launch"}) {
    run.waive(name, {}, reason);
  }
  run.profile().equivalents.push_back(
      "nvbandwidth -t host_to_device_memcpy_ce device_to_host_memcpy_ce "
      "host_to_device_bidirectional_memcpy_ce device_local_copy");
}

std::string figure_text(const ProfileEntry& entry, double value) {
  if (entry.unit == "bytes_per_s") return fmt::format("{:.3g} GB/s", value / 1e9);
  if (entry.unit == "flop_per_s") return fmt::format("{:.3g} Gflop/s", value / 1e9);
  if (entry.unit == "head_tokens_per_s") return fmt::format("{:.3g} M/s", value / 1e6);
  return fmt::format("{:.3g} us", value * 1e6);
}

std::string parameters_text(const ProfileParameters& parameters) {
  std::string text;
  for (const auto& [key, value] : parameters) {
    text += text.empty() ? "" : ", ";
    text += std::holds_alternative<double>(value)
                ? fmt::format("{} {:.0f}", key, std::get<double>(value))
                : std::get<std::string>(value);
  }
  return text;
}

}  // namespace

void ProfileRun::add(ProfileEntry entry, std::vector<double> figures) {
  std::ranges::sort(figures);
  entry.repetitions = static_cast<std::uint32_t>(figures.size());
  entry.median = figures[figures.size() / 2];
  entry.lowest = figures.front();
  entry.highest = figures.back();
  profile_.entries.push_back(std::move(entry));
}

void ProfileRun::waive(const std::string& name, ProfileParameters parameters,
                       const std::string& reason) {
  ProfileEntry entry;
  entry.name = name;
  entry.parameters = std::move(parameters);
  entry.waived = reason.empty() ? "refused without a reason" : reason;
  profile_.entries.push_back(std::move(entry));
}

void ProfileRun::show(const std::string& what) {
  progress_.show(what, profile_.entries.size(), static_cast<std::uint64_t>(kPoints));
}

Result<MachineProfile> measure_machine(const MachineOptions& options) {
  WorkerPool pool(options.threads);
  MachineProfile profile;
  profile.name = options.name;
  profile.source = "measured";
  profile.provenance = fmt::format("kvtier profile machine, {:g} s of measuring", options.seconds);
  const MachineDescription machine = describe_machine(pool.threads());
  profile.cpu = machine.cpu;
  profile.threads = machine.threads;
  profile.simd = machine.simd;
  profile.build = machine.build;
  profile.host_memory_bytes = kib_after("/proc/meminfo", "MemTotal:");
  profile.numa_nodes = find_numa_nodes();
  ProfileRun run(options, profile, pool);
  Status status = measure_memory(run);
  if (status.ok()) status = measure_kernels(run);
  if (status.ok()) status = measure_disk(run);
  run.clear();
  KVTIER_RETURN_IF_ERROR(status);
  waive_gpu(run);
  return profile;
}

std::string machine_table(const MachineProfile& profile) {
  std::string text = fmt::format(
      "machine  {}, {} threads, {}, {}\nmemory   {}, {} NUMA node(s){}{}\n\n", profile.cpu,
      profile.threads, profile.simd, profile.build, format_bytes(profile.host_memory_bytes),
      profile.numa_nodes.size(), profile.gpu.empty() ? "" : ", ", profile.gpu);
  TextTable table(2);
  table.add({"what", "of", "median", "lowest", "highest", "n", "us p50", "p99"});
  for (const ProfileEntry& entry : profile.entries) {
    if (!entry.has_figure()) continue;
    const auto latency = [](const std::optional<double>& us) {
      return us ? fmt::format("{:.0f}", *us) : std::string("-");
    };
    table.add({entry.name, parameters_text(entry.parameters), figure_text(entry, entry.median),
               figure_text(entry, entry.lowest), figure_text(entry, entry.highest),
               fmt::format("{}", entry.repetitions), latency(entry.latency_us_p50),
               latency(entry.latency_us_p99)});
  }
  text += table.text();
  for (const ProfileEntry& entry : profile.entries) {
    if (entry.has_figure()) continue;
    const std::string of = parameters_text(entry.parameters);
    text += fmt::format("waived   {}{}: {}\n", entry.name, of.empty() ? "" : " (" + of + ")",
                        entry.waived);
  }
  text += "\nthe same by other tools\n";
  for (const std::string& line : profile.equivalents) text += "  " + line + "\n";
  return text;
}

}  // namespace kvtier
