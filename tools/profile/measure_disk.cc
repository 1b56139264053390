#include "memory/region.h"
#include "tools/profile/measure.h"
#include "transfer/open_file.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <filesystem>
#include <memory>
#include <random>
#include <span>
#include <utility>

namespace kvtier {

namespace {

using DiskClock = std::chrono::steady_clock;

constexpr std::size_t kSectorBytes = 512;
constexpr std::size_t kLargestIo = std::size_t{1} << 20;
constexpr std::uint32_t kDeepest = 32;

/// What a sector's first word must be: nothing that another sector's, or an empty one, is.
std::uint64_t sector_word(std::uint64_t offset) {
  std::uint64_t word = offset / kSectorBytes + 1;
  word *= 0x9E3779B97F4A7C15u;
  return word ^ (word >> 29);
}

void write_sectors(std::span<std::byte> bytes, std::uint64_t offset) {
  for (std::size_t at = 0; at < bytes.size(); at += kSectorBytes) {
    const std::uint64_t word = sector_word(offset + at);
    std::memcpy(bytes.data() + at, &word, sizeof word);
  }
}

Status check_sectors(std::span<const std::byte> bytes, std::uint64_t offset) {
  for (std::size_t at = 0; at < bytes.size(); at += kSectorBytes) {
    std::uint64_t word = 0;
    std::memcpy(&word, bytes.data() + at, sizeof word);
    if (word != sector_word(offset + at)) {
      return corrupt(
          fmt::format("disk: the sector at {} is not what was written there", offset + at));
    }
  }
  return {};
}

struct DiskPattern {
  FileOperation::Kind kind = FileOperation::Kind::kRead;
  bool random = true;
  std::size_t block = 4096;
  std::uint32_t depth = 1;
};

struct DiskSample {
  double bytes_per_s = 0;
  std::vector<double> latencies_us;
};

/// Keeps `depth` operations in flight over a file of known content.
class DiskLoad {
 public:
  DiskLoad(File& file, std::span<std::byte> buffers) : file_(file), buffers_(buffers) {}

  /// For `seconds`, and at least until each place in flight has finished once; or, with
  /// `seconds` 0, once over the whole file in order.
  Result<DiskSample> run(const DiskPattern& pattern, double seconds) {
    pattern_ = pattern;
    blocks_ = file_.size_bytes() / pattern.block;
    sample_ = {};
    moved_ = 0;
    next_ = seconds > 0 && !pattern.random ? random_() % blocks_ : 0;
    begin_ = DiskClock::now();
    std::size_t submitted = 0;
    std::size_t in_flight = 0;
    Status failed;
    const auto start_another = [&](std::size_t place) {
      const double elapsed = std::chrono::duration<double>(DiskClock::now() - begin_).count();
      const bool wanted =
          seconds > 0 ? elapsed < seconds || submitted < pattern.depth : submitted < blocks_;
      if (!wanted || !failed.ok()) return;
      failed = submit(place);
      if (!failed.ok()) return;
      ++submitted;
      ++in_flight;
    };
    for (std::uint32_t i = 0; i < pattern.depth; ++i) start_another(i);
    // Whatever fails, everything in flight comes back before its buffer goes.
    while (in_flight > 0) {
      std::array<FileOperation*, kDeepest> done{};
      const std::size_t count = file_.reap(done, std::chrono::seconds(1));
      for (std::size_t i = 0; i < count; ++i) {
        const auto place = static_cast<std::size_t>(done[i] - operations_.data());
        --in_flight;
        if (const Status status = finish(place); !status.ok() && failed.ok()) failed = status;
        start_another(place);
      }
    }
    KVTIER_RETURN_IF_ERROR(failed);
    const std::chrono::duration<double> elapsed = DiskClock::now() - begin_;
    sample_.bytes_per_s = static_cast<double>(moved_) / elapsed.count();
    return std::move(sample_);
  }

 private:
  Status submit(std::size_t place) {
    FileOperation& operation = operations_[place];
    const std::uint64_t block = pattern_.random ? random_() % blocks_ : next_++ % blocks_;
    operation = {};
    operation.kind = pattern_.kind;
    operation.offset = block * pattern_.block;
    operation.buffer = buffers_.subspan(place * kLargestIo, pattern_.block);
    if (pattern_.kind == FileOperation::Kind::kWrite) {
      write_sectors(operation.buffer, operation.offset);
    }
    started_[place] = DiskClock::now();
    FileOperation* const one[] = {&operation};
    if (file_.submit(one) == 1) return {};
    return busy("disk: the queue refuses an operation below its depth");
  }

  Status finish(std::size_t place) {
    const FileOperation& operation = operations_[place];
    const std::chrono::duration<double, std::micro> latency = DiskClock::now() - started_[place];
    sample_.latencies_us.push_back(latency.count());
    KVTIER_RETURN_IF_ERROR(operation.status);
    if (operation.transferred != pattern_.block) {
      return io_error(fmt::format("disk: {} of {} bytes moved at {}", operation.transferred,
                                  pattern_.block, operation.offset));
    }
    moved_ += operation.transferred;
    if (pattern_.kind == FileOperation::Kind::kWrite) return {};
    return check_sectors(operation.buffer, operation.offset);
  }

  File& file_;
  std::span<std::byte> buffers_;
  DiskPattern pattern_;
  std::uint64_t blocks_ = 0;
  std::uint64_t next_ = 0;
  std::uint64_t moved_ = 0;
  std::mt19937_64 random_{11};
  std::array<FileOperation, kDeepest> operations_;
  std::array<DiskClock::time_point, kDeepest> started_;
  DiskClock::time_point begin_;
  DiskSample sample_;
};

double quantile_of(std::vector<double>& sorted, double share) {
  const auto last = static_cast<double>(sorted.size() - 1);
  return sorted[static_cast<std::size_t>(last * share)];
}

Status measure_pattern(ProfileRun& run, DiskLoad& load, const char* name,
                       const DiskPattern& pattern) {
  ProfileEntry entry{
      .name = name,
      .parameters = {{"block_bytes", double(pattern.block)}, {"depth", double(pattern.depth)}},
      .unit = "bytes_per_s"};
  run.show(name);
  std::vector<double> rates;
  std::vector<double> latencies;
  for (std::uint32_t i = 0; i < kProfileRepetitions; ++i) {
    KVTIER_ASSIGN_OR_RETURN(const DiskSample sample, load.run(pattern, run.slice()));
    rates.push_back(sample.bytes_per_s);
    latencies.insert(latencies.end(), sample.latencies_us.begin(), sample.latencies_us.end());
  }
  std::ranges::sort(latencies);
  entry.latency_us_p50 = quantile_of(latencies, 0.5);
  entry.latency_us_p99 = quantile_of(latencies, 0.99);
  entry.note = pattern.kind == FileOperation::Kind::kRead
                   ? "direct, every sector checked; what lies below the system may still cache"
                   : "direct; read back and checked";
  run.add(std::move(entry), std::move(rates));
  return {};
}

Status measure_file(ProfileRun& run, File& file, std::span<std::byte> buffers) {
  using Kind = FileOperation::Kind;
  DiskLoad load(file, buffers);
  // A disk that compresses must not find zeros.
  std::mt19937_64 random(5);
  for (std::size_t at = 0; at < buffers.size(); at += 8) {
    const std::uint64_t word = random();
    std::memcpy(buffers.data() + at, &word, sizeof word);
  }
  // Once in order, so that every sector has been written before any is read.
  KVTIER_RETURN_IF_ERROR(load.run({Kind::kWrite, false, kLargestIo, 8}, 0).status());
  KVTIER_RETURN_IF_ERROR(file.sync());
  for (const std::size_t block :
       {std::size_t{4} << 10, std::size_t{16} << 10, std::size_t{64} << 10, std::size_t{128} << 10,
        std::size_t{1} << 20}) {
    for (const std::uint32_t depth : {1u, 8u, kDeepest}) {
      KVTIER_RETURN_IF_ERROR(
          measure_pattern(run, load, "disk.random_read", {Kind::kRead, true, block, depth}));
    }
  }
  for (const std::uint32_t depth : {1u, 8u}) {
    KVTIER_RETURN_IF_ERROR(measure_pattern(run, load, "disk.sequential_read",
                                           {Kind::kRead, false, kLargestIo, depth}));
    KVTIER_RETURN_IF_ERROR(measure_pattern(run, load, "disk.sequential_write",
                                           {Kind::kWrite, false, kLargestIo, depth}));
  }
  // What was overwritten has the same content, so one pass checks all of it.
  return load.run({Kind::kRead, false, kLargestIo, 8}, 0).status();
}

void waive_disk(ProfileRun& run, const std::string& reason) {
  for (const char* name : {"disk.random_read", "disk.sequential_read", "disk.sequential_write"}) {
    run.waive(name, {}, reason);
  }
}

void add_fio_lines(MachineProfile& profile, const std::string& directory, std::uint64_t bytes,
                   double seconds) {
  for (const auto& [name, mode, block, depth] :
       {std::tuple{"random_read", "randread", "128k", 32},
        std::tuple{"random_read", "randread", "4k", 1},
        std::tuple{"sequential_read", "read", "1m", 8},
        std::tuple{"sequential_write", "write", "1m", 8}}) {
    profile.equivalents.push_back(fmt::format(
        "fio --name={} --directory={} --size={} --rw={} --bs={} --iodepth={} --ioengine=io_uring "
        "--direct=1 --time_based --runtime={:.0f}",
        name, directory, bytes, mode, block, depth, std::max(1.0, seconds)));
  }
}

}  // namespace

Status measure_disk(ProfileRun& run) {
  std::error_code error;
  std::string directory = run.options().disk_path;
  if (directory.empty()) directory = std::filesystem::temp_directory_path(error).string();
  const auto space = std::filesystem::space(directory, error);
  if (error) {
    waive_disk(run, fmt::format("{}: {}", directory, error.message()));
    return {};
  }
  run.profile().disk_free_bytes = space.available;
  const std::uint64_t bytes =
      std::min<std::uint64_t>(run.memory_bytes(), space.available / 2) / kLargestIo * kLargestIo;
  add_fio_lines(run.profile(), directory, bytes, run.slice() * kProfileRepetitions);
  auto buffers = Region::allocate({.bytes = kDeepest * kLargestIo});
  if (!buffers.ok() || bytes < 16 * kLargestIo) {
    waive_disk(run, buffers.ok() ? fmt::format("{}: {} bytes free", directory, space.available)
                                 : buffers.status().message());
    return {};
  }
  auto file = open_file({.directory = directory, .bytes = bytes});
  if (!file.ok()) {
    waive_disk(run, file.status().message());
    return {};
  }
  Status status;
  if ((*file)->traits().direct) {
    const std::span<std::byte> registered[] = {buffers->bytes()};
    status = (*file)->register_buffers(registered);
    if (status.ok()) status = measure_file(run, **file, buffers->bytes());
  } else {
    // Through the page cache this would be a figure of memory.
    waive_disk(run,
               fmt::format("{}: direct I/O is refused: {}", directory, (*file)->traits().reason));
  }
  const Status closed = (*file)->close();
  KVTIER_RETURN_IF_ERROR(status);
  return closed;
}

}  // namespace kvtier
