#include "tools/bench_attention_report.h"

#include "kernels/simd_targets.h"

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <fstream>

namespace kvtier {
namespace {

std::string cpu_name() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    const std::size_t colon = line.find(": ");
    if (line.starts_with("model name") && colon != std::string::npos) return line.substr(colon + 2);
  }
  return "unknown";
}

std::string build_name() {
#ifdef __OPTIMIZE__
  const char* optimised = "optimised";
#else
  const char* optimised = "NOT OPTIMISED: figures mean nothing";
#endif
  return fmt::format("{}, compiler {}", optimised, __VERSION__);
}

nlohmann::ordered_json to_json(const Spread& spread) {
  return {{"median", spread.median}, {"lowest", spread.lowest}, {"highest", spread.highest}};
}

nlohmann::ordered_json to_json(const std::optional<Spread>& spread) {
  return spread ? to_json(*spread) : nlohmann::ordered_json();
}

nlohmann::ordered_json to_json(const BenchRow& row) {
  return {{"head_dim", row.shape.head_dim},
          {"queries_per_kv_head", row.shape.group},
          {"kv_heads", row.shape.kv_heads},
          {"tokens", row.shape.tokens},
          {"threads", row.threads},
          {"placement", row.placement},
          {"bytes", row.bytes},
          {"attention_gbps", to_json(row.attention_gbps)},
          {"stream_gbps", to_json(row.stream_gbps)},
          {"share_of_stream", to_json(row.share_of_stream)},
          {"blocks_gbps", to_json(row.blocks_gbps)},
          {"blocks_read_ahead", row.read_ahead},
          {"share_of_blocks", to_json(row.share_of_blocks)},
          {"torch_gbps", to_json(row.torch_gbps)},
          {"ratio_to_torch", to_json(row.ratio_to_torch)},
          {"largest_difference", row.difference}};
}

}  // namespace

Spread Spread::of(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return {values[values.size() / 2], values.front(), values.back()};
}

void print_json(const BenchReport& report) {
  nlohmann::ordered_json json;
  json["schema"] = "kvtier.bench-attention";
  json["version"] = 2;
  json["options"] = {{"repetitions", report.options.repetitions},
                     {"region_bytes", report.options.region_bytes},
                     {"bytes_per_repetition", report.options.bytes_per_repetition}};
  json["machine"] = {{"cpu", cpu_name()},
                     {"instruction_set", simd_targets().front()},
                     {"build", build_name()},
                     {"huge_page_bytes", report.region.huge_page_bytes}};
  json["machine"]["torch"] = nullptr;
  if (report.torch_version) json["machine"]["torch"] = *report.torch_version;
  json["rows"] = nlohmann::ordered_json::array();
  for (const BenchRow& row : report.rows) json["rows"].push_back(to_json(row));
  fmt::print("{}\n", json.dump(2));
}

void print_table(const BenchReport& report) {
  fmt::print("cpu      {}, {}\n", cpu_name(), simd_targets().front());
  fmt::print("build    {}\n", build_name());
  fmt::print("blocks   8 tokens of one KV head, float16, in {} MiB ({} MiB huge pages)\n",
             report.region.bytes >> 20, report.region.huge_page_bytes >> 20);
  fmt::print("place    order: a list's blocks lie one behind the other; random: anywhere\n");
  fmt::print("stream   a plain read of as many bytes in address order\n");
  fmt::print("blocks   a plain read of the same blocks in the same order, best prefetch\n");
  fmt::print("torch    {}\n", report.torch_version.value_or("not installed"));
  fmt::print("figures  GB/s of keys and values, medians of {} interleaved repetitions\n\n",
             report.options.repetitions);
  fmt::print(
      "{:>8} {:>2} {:>5} {:>6} {:>7} {:>6} {:>6} {:>11} {:>6} {:>5} {:>6} {:>5} {:>6} {:>6}\n",
      "head_dim", "G", "heads", "tokens", "threads", "place", "GB/s", "low-high", "stream", "share",
      "blocks", "share", "torch", "ratio");
  for (const BenchRow& row : report.rows) {
    const Spread& speed = row.attention_gbps;
    fmt::print(
        "{:>8} {:>2} {:>5} {:>6} {:>7} {:>6} {:>6.1f} {:>11} {:>6.1f} {:>5.2f} {:>6.1f} {:>5.2f} "
        "{:>6} {:>6}\n",
        row.shape.head_dim, row.shape.group, row.shape.kv_heads, row.shape.tokens, row.threads,
        row.placement, speed.median, fmt::format("{:.1f}-{:.1f}", speed.lowest, speed.highest),
        row.stream_gbps.median, row.share_of_stream.median, row.blocks_gbps.median,
        row.share_of_blocks.median,
        row.torch_gbps ? fmt::format("{:.2f}", row.torch_gbps->median) : "-",
        row.ratio_to_torch ? fmt::format("{:.1f}", row.ratio_to_torch->median) : "-");
  }
}

}  // namespace kvtier
