#include "tools/bench_disk.h"

#include "tools/bench_clock.h"
#include "tools/disk_load.h"
#include "tools/fio_peer.h"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <optional>

namespace kvtier {
namespace {

constexpr const char* kPatternNames[2][2] = {{"sequential_read", "random_read"},
                                             {"sequential_write", "random_write"}};
constexpr const char* kFioWords[2][2] = {{"read", "randread"}, {"write", "randwrite"}};

struct Row {
  DiskPattern pattern;
  std::size_t io_bytes = 0;
  std::uint32_t depth = 0;
  double bytes_per_second = 0;
  double bytes_per_second_unverified = 0;
  double cpu_seconds_per_gb = 0;
  std::optional<double> fio_bytes_per_second;
  /// Medians of the ratios of neighbouring runs: a disk that slows down slows both.
  double ratio_to_unverified = 0;
  std::optional<double> ratio_to_fio;
};

class DiskBench {
 public:
  DiskBench(const BenchDiskOptions& options, const FileTraits& traits, DiskLoad& load)
      : options_(options), traits_(traits), load_(load), fio_(fio_version(options.fio)) {}

  const std::string& fio() const { return fio_; }
  std::uint64_t pages_wrong() const { return pages_wrong_; }

  FioJob fio_job(DiskPattern pattern, std::size_t io_bytes, std::uint32_t depth) const {
    const bool ring = traits_.backend == "io_uring";
    return {.path = traits_.reopen_path,
            .pattern = kFioWords[pattern.write][pattern.random],
            .io_bytes = io_bytes,
            .depth = ring ? depth : std::min(depth, 16u),
            .offset = pattern.write ? load_.half_bytes() : 0,
            .bytes = load_.half_bytes(),
            .direct = traits_.direct,
            .engine = ring ? "io_uring" : "psync",
            .fixed_buffers = traits_.fixed_buffers,
            .seconds = options_.seconds};
  }

  Result<Row> measure(DiskPattern pattern, std::size_t io_bytes, std::uint32_t depth) {
    std::vector<double> verified;
    std::vector<double> plain;
    std::vector<double> cpu;
    std::vector<double> peer;
    std::vector<double> to_plain;
    std::vector<double> to_peer;
    for (unsigned r = 0; r < options_.repetitions; ++r) {
      KVTIER_ASSIGN_OR_RETURN(const DiskRun checked, run(pattern, io_bytes, depth, true));
      KVTIER_ASSIGN_OR_RETURN(const DiskRun unchecked, run(pattern, io_bytes, depth, false));
      verified.push_back(checked.bytes_per_second());
      plain.push_back(unchecked.bytes_per_second());
      cpu.push_back(checked.cpu_seconds * 1e9 / static_cast<double>(checked.bytes));
      to_plain.push_back(verified.back() / plain.back());
      if (fio_.empty()) continue;
      KVTIER_ASSIGN_OR_RETURN(const double rate,
                              run_fio(options_.fio, fio_job(pattern, io_bytes, depth)));
      peer.push_back(rate);
      to_peer.push_back(verified.back() / rate);
    }
    Row row{.pattern = pattern, .io_bytes = io_bytes, .depth = depth};
    row.bytes_per_second = median(verified);
    row.bytes_per_second_unverified = median(plain);
    row.cpu_seconds_per_gb = median(cpu);
    row.ratio_to_unverified = median(to_plain);
    if (!peer.empty()) {
      row.fio_bytes_per_second = median(peer);
      row.ratio_to_fio = median(to_peer);
    }
    return row;
  }

 private:
  Result<DiskRun> run(DiskPattern pattern, std::size_t io_bytes, std::uint32_t depth, bool verify) {
    KVTIER_ASSIGN_OR_RETURN(DiskRun done,
                            load_.run(pattern, io_bytes, depth, options_.seconds, verify));
    pages_wrong_ += done.pages_wrong;
    return done;
  }

  const BenchDiskOptions& options_;
  const FileTraits& traits_;
  DiskLoad& load_;
  std::string fio_;
  std::uint64_t pages_wrong_ = 0;
};

std::string size_text(std::size_t bytes) {
  return bytes % (1 << 20) == 0 ? fmt::format("{} MiB", bytes >> 20)
                                : fmt::format("{} KiB", bytes >> 10);
}

std::string table(const BenchDiskOptions& options, const FileTraits& traits, const DiskBench& bench,
                  const std::vector<Row>& rows) {
  std::string text = fmt::format(
      "disk     {}: {}, {}{}\nfigures  medians of {} runs of {:g} s each, in turns; GB/s; every "
      "4 KiB page verified\npeer     {}\n\n{:<18} {:>8} {:>6} {:>8} {:>11} {:>10} {:>7} {:>7} "
      "{:>9}\n",
      options.directory, traits.backend, traits.direct ? "direct" : "through the page cache",
      traits.reason.empty() ? "" : " (" + traits.reason + ")", options.repetitions, options.seconds,
      bench.fio().empty() ? "none: fio is not installed" : bench.fio(), "operation", "size",
      "depth", "verified", "unverified", "of unver.", "fio", "of fio", "CPU s/GB");
  for (const Row& row : rows) {
    text += fmt::format(
        "{:<18} {:>8} {:>6} {:>8.2f} {:>11.2f} {:>10.3f} {:>7} {:>7} {:>9.3f}\n",
        to_string(row.pattern), size_text(row.io_bytes), row.depth, row.bytes_per_second / 1e9,
        row.bytes_per_second_unverified / 1e9, row.ratio_to_unverified,
        row.fio_bytes_per_second ? fmt::format("{:.2f}", *row.fio_bytes_per_second / 1e9) : "-",
        row.ratio_to_fio ? fmt::format("{:.3f}", *row.ratio_to_fio) : "-", row.cpu_seconds_per_gb);
  }
  FioJob job = bench.fio_job(rows[0].pattern, rows[0].io_bytes, rows[0].depth);
  job.path = options.directory + "/FILE";
  text += fmt::format("\nThe first row with fio, on a file of its own:\n  {}\n",
                      fmt::join(fio_arguments("fio", job), " "));
  text += fmt::format("pages that were wrong  {}\n", bench.pages_wrong());
  return text;
}

std::string json(const BenchDiskOptions& options, const FileTraits& traits, const DiskBench& bench,
                 const std::vector<Row>& rows) {
  nlohmann::ordered_json json;
  json["schema"] = "kvtier.bench-disk";
  json["version"] = 1;
  json["options"] = {{"directory", options.directory},
                     {"file_bytes", options.file_bytes},
                     {"seconds", options.seconds},
                     {"repetitions", options.repetitions}};
  json["direct"] = traits.direct;
  json["reason"] = traits.reason;
  json["peer"] = bench.fio();
  json["pages_wrong"] = bench.pages_wrong();
  json["rows"] = nlohmann::ordered_json::array();
  const auto optional = [](const std::optional<double>& value, double scale) {
    return value ? nlohmann::ordered_json(*value * scale) : nlohmann::ordered_json(nullptr);
  };
  for (const Row& row : rows) {
    json["rows"].push_back({{"operation", to_string(row.pattern)},
                            {"io_bytes", row.io_bytes},
                            {"depth", row.depth},
                            {"backend", traits.backend},
                            {"gb_per_s", row.bytes_per_second / 1e9},
                            {"gb_per_s_unverified", row.bytes_per_second_unverified / 1e9},
                            {"ratio_to_unverified", row.ratio_to_unverified},
                            {"fio_gb_per_s", optional(row.fio_bytes_per_second, 1e-9)},
                            {"ratio_to_fio", optional(row.ratio_to_fio, 1.0)},
                            {"cpu_s_per_gb", row.cpu_seconds_per_gb}});
  }
  return json.dump(1) + "\n";
}

Status check(const BenchDiskOptions& options) {
  const std::size_t io_max = std::ranges::max(options.io_bytes);
  const std::uint32_t depth_max = std::ranges::max(options.depths);
  for (const std::size_t bytes : options.io_bytes) {
    if (bytes < kDiskPageBytes || bytes % kDiskPageBytes != 0 || io_max % bytes != 0) {
      return invalid_argument(
          fmt::format("--sizes: {} B; each is a multiple of 4 KiB and divides the largest", bytes));
    }
  }
  // Writes of one place never overlap, and a file much larger than what is in flight keeps them
  // apart.
  const std::uint64_t least = std::uint64_t{8} * io_max * (depth_max + DiskLoad::kSpare);
  if (options.file_bytes < least || options.file_bytes % (2 * io_max) != 0) {
    return invalid_argument(
        fmt::format("--file-bytes: {} B; these sizes and depths need a multiple of {} B, at least "
                    "{} B",
                    options.file_bytes, 2 * io_max, least));
  }
  return {};
}

Result<std::string> measure_all(const BenchDiskOptions& options, File& file,
                                std::uint64_t& pages_wrong) {
  KVTIER_ASSIGN_OR_RETURN(DiskLoad load, DiskLoad::make(file, std::ranges::max(options.io_bytes),
                                                        std::ranges::max(options.depths)));
  KVTIER_RETURN_IF_ERROR(load.fill());
  DiskBench bench(options, file.traits(), load);
  std::vector<Row> rows;
  for (const DiskPattern pattern : options.patterns) {
    for (const std::size_t io_bytes : options.io_bytes) {
      for (const std::uint32_t depth : options.depths) {
        KVTIER_ASSIGN_OR_RETURN(Row row, bench.measure(pattern, io_bytes, depth));
        rows.push_back(row);
      }
    }
  }
  KVTIER_ASSIGN_OR_RETURN(const std::uint64_t unwritten, load.verify_written());
  pages_wrong = bench.pages_wrong() + unwritten;
  return options.format == "json" ? json(options, file.traits(), bench, rows)
                                  : table(options, file.traits(), bench, rows);
}

}  // namespace

Result<DiskPattern> parse_disk_pattern(std::string_view text) {
  for (const bool write : {false, true}) {
    for (const bool random : {false, true}) {
      if (text == kPatternNames[write][random]) return DiskPattern{write, random};
    }
  }
  return invalid_argument(fmt::format(
      "found '{}', expected random_read, sequential_read, random_write or sequential_write", text));
}

std::string to_string(DiskPattern pattern) { return kPatternNames[pattern.write][pattern.random]; }

int run_bench_disk(const BenchDiskOptions& options) {
#ifndef __OPTIMIZE__
  fmt::print(stderr, "warning: built without optimisation; the figures mean nothing\n");
#endif
  const auto fail = [](int code, const Status& status) {
    fmt::print(stderr, "kvtier: bench disk: {}\n", status.message());
    return code;
  };
  if (const Status status = check(options); !status.ok()) return fail(2, status);
  auto file = open_file({.directory = options.directory,
                         .bytes = options.file_bytes,
                         .backend = options.backend,
                         .queue_depth = std::ranges::max(options.depths) + DiskLoad::kSpare});
  if (!file.ok()) {
    return fail(file.status().code() == StatusCode::kNotFound ? 2 : 1, file.status());
  }
  std::uint64_t pages_wrong = 0;
  const auto text = measure_all(options, **file, pages_wrong);
  const Status closed = (*file)->close();
  if (!text.ok()) return fail(1, text.status());
  fmt::print("{}", *text);
  if (!closed.ok()) return fail(1, closed);
  if (pages_wrong > 0) return fail(4, corrupt(fmt::format("{} pages were wrong", pages_wrong)));
  return 0;
}

}  // namespace kvtier
