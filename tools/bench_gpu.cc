#include "tools/bench_gpu.h"

#include <fmt/format.h>

#include <algorithm>

namespace kvtier {
namespace {

std::string cell(const nlohmann::ordered_json& value) {
  if (value.is_null()) return "-";
  if (value.is_string()) return value.get<std::string>();
  if (value.is_number_float()) return fmt::format("{:.2f}", value.get<double>());
  return value.dump();
}

void print_table(const nlohmann::ordered_json& rows) {
  std::vector<std::size_t> widths;
  std::vector<std::vector<std::string>> lines;
  std::vector<std::string> header;
  for (const auto& [key, value] : rows.front().items()) header.push_back(key);
  lines.push_back(header);
  for (const auto& row : rows) {
    std::vector<std::string> line;
    for (const auto& [key, value] : row.items()) line.push_back(cell(value));
    lines.push_back(line);
  }
  for (const auto& line : lines) {
    widths.resize(std::max(widths.size(), line.size()));
    for (std::size_t i = 0; i < line.size(); ++i) widths[i] = std::max(widths[i], line[i].size());
  }
  for (const auto& line : lines) {
    std::string text;
    for (std::size_t i = 0; i < line.size(); ++i) {
      text += fmt::format("{:>{}}{}", line[i], widths[i], i + 1 < line.size() ? "  " : "\n");
    }
    fmt::print("{}", text);
  }
}

}  // namespace

Result<GpuBench> GpuBench::open() {
  GpuBench bench;
  bench.calls_ = make_cuda_calls();
  KVTIER_ASSIGN_OR_RETURN(Gpu gpu, Gpu::open(*bench.calls_));
  bench.gpu_ = std::make_unique<Gpu>(std::move(gpu));
  KVTIER_ASSIGN_OR_RETURN(GpuStream stream, GpuStream::create(*bench.gpu_));
  bench.stream_ = std::make_unique<GpuStream>(std::move(stream));
  return bench;
}

Result<std::vector<GpuSamples>> GpuBench::measure(std::span<const std::function<Status()>> works,
                                                  unsigned repetitions) const {
  KVTIER_ASSIGN_OR_RETURN(const GpuTimer timer, GpuTimer::create(*gpu_));
  std::vector<std::vector<double>> times(works.size());
  for (unsigned repetition = 0; repetition <= repetitions; ++repetition) {
    for (std::size_t i = 0; i < works.size(); ++i) {
      KVTIER_RETURN_IF_ERROR(timer.start(stream()));
      KVTIER_RETURN_IF_ERROR(works[i]());
      KVTIER_RETURN_IF_ERROR(timer.stop(stream()));
      KVTIER_ASSIGN_OR_RETURN(const double us, timer.elapsed_us());
      if (repetition > 0) times[i].push_back(us);
    }
  }
  std::vector<GpuSamples> samples;
  for (std::vector<double>& of_work : times) {
    std::sort(of_work.begin(), of_work.end());
    samples.push_back({of_work[of_work.size() / 2], of_work.front(), of_work.back()});
  }
  return samples;
}

nlohmann::ordered_json GpuBench::machine() const {
  const GpuTraits& traits = gpu_->traits();
  return {{"gpu", traits.name},
          {"driver_cuda", fmt::format("{}.{}", traits.driver / 1000, traits.driver % 1000 / 10)},
          {"multiprocessors", traits.multiprocessors}};
}

void print_gpu_report(const GpuBenchOptions& options, const std::string& name,
                      const nlohmann::ordered_json& machine, const nlohmann::ordered_json& rows) {
  if (options.format == "json") {
    nlohmann::ordered_json json;
    json["schema"] = "kvtier-" + name;
    json["version"] = 1;
    json["options"] = {{"repetitions", options.repetitions},
                       {"region_bytes", options.region_bytes},
                       {"python", options.python}};
    json["machine"] = machine;
    json["rows"] = rows;
    fmt::print("{}\n", json.dump(2));
    return;
  }
  for (const auto& [key, value] : machine.items()) fmt::print("{:<16} {}\n", key, cell(value));
  fmt::print("{:<16} medians of {} interleaved repetitions\n\n", "figures", options.repetitions);
  if (!rows.empty()) print_table(rows);
}

int gpu_bench_failure(const char* name, const Status& status) {
  fmt::print(stderr, "{}: {}\n", name, status.to_string());
  return status.code() == StatusCode::kInvalidArgument ? 2
         : status.code() == StatusCode::kUnsupported   ? 5
                                                       : 1;
}

}  // namespace kvtier
