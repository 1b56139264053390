#include "tools/disk_load.h"

#include "kernels/checksum.h"

#include <fmt/format.h>
#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <utility>

namespace kvtier {
namespace {

constexpr Duration kPatience = std::chrono::seconds(30);

double cpu_seconds() {
  rusage usage{};
  ::getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](const timeval& time) {
    return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_usec) * 1e-6;
  };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

}  // namespace

void fill_page(std::uint64_t number, std::byte* page) {
  std::uint64_t state = (number + 1) * 0x9E3779B97F4A7C15u;
  for (std::size_t at = 0; at < kDiskPageBytes; at += sizeof(state)) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    std::memcpy(page + at, &state, sizeof(state));
  }
}

Result<DiskLoad> DiskLoad::make(File& file, std::size_t io_bytes_max, std::uint32_t depth_max) {
  const std::size_t count = depth_max + kSpare;
  KVTIER_ASSIGN_OR_RETURN(Region buffers, Region::allocate({.bytes = count * io_bytes_max}));
  const std::span<std::byte> range = buffers.bytes();
  KVTIER_RETURN_IF_ERROR(file.register_buffers({&range, 1}));
  return DiskLoad(file, std::move(buffers), io_bytes_max, depth_max);
}

DiskLoad::DiskLoad(File& file, Region buffers, std::size_t io_bytes_max, std::uint32_t depth_max)
    : file_(&file),
      buffers_(std::move(buffers)),
      io_bytes_max_(io_bytes_max),
      depth_max_(depth_max),
      operations_(depth_max + kSpare),
      sums_(file.size_bytes() / kDiskPageBytes),
      content_(sums_.size()),
      busy_(sums_.size()) {
  accepted_.reserve(operations_.size());
}

std::uint64_t DiskLoad::half_bytes() const {
  // Whole operations of the largest size.
  return file_->size_bytes() / 2 / io_bytes_max_ * io_bytes_max_;
}

std::uint64_t DiskLoad::next_random() {
  random_ ^= random_ << 13;
  random_ ^= random_ >> 7;
  random_ ^= random_ << 17;
  return random_;
}

Status DiskLoad::submit(std::vector<FileOperation*>& ready) {
  std::size_t done = 0;
  while (done < ready.size()) {
    const std::size_t accepted = file_->submit(std::span(ready).subspan(done));
    if (accepted == 0) return io_error("the file accepts no operation with its queue not full");
    done += accepted;
  }
  ready.clear();
  return {};
}

Status DiskLoad::drain() {
  std::array<FileOperation*, kSpare> done;
  while (file_->reap(done, kPatience) > 0) {
  }
  return {};
}

Status DiskLoad::fill() {
  const std::size_t pages_per_io = io_bytes_max_ / kDiskPageBytes;
  std::uint64_t place = 0;
  std::vector<FileOperation*> spare;
  for (FileOperation& operation : operations_) spare.push_back(&operation);
  std::array<FileOperation*, kSpare> done;
  std::size_t in_flight = 0;
  while (place * io_bytes_max_ < file_->size_bytes() || in_flight > 0) {
    while (!spare.empty() && in_flight < depth_max_ &&
           place * io_bytes_max_ < file_->size_bytes()) {
      FileOperation& operation = *spare.back();
      spare.pop_back();
      const auto index = static_cast<std::size_t>(&operation - operations_.data());
      operation.kind = FileOperation::Kind::kWrite;
      operation.offset = place * io_bytes_max_;
      operation.buffer = buffers_.bytes().subspan(index * io_bytes_max_, io_bytes_max_);
      for (std::size_t i = 0; i < pages_per_io; ++i) {
        const std::uint64_t page = place * pages_per_io + i;
        fill_page(page, operation.buffer.data() + i * kDiskPageBytes);
        sums_[page] = checksum(operation.buffer.subspan(i * kDiskPageBytes, kDiskPageBytes));
        content_[page] = static_cast<std::uint32_t>(page);
      }
      accepted_.assign(1, &operation);
      KVTIER_RETURN_IF_ERROR(submit(accepted_));
      ++in_flight;
      ++place;
    }
    const std::size_t count = file_->reap(done, kPatience);
    for (std::size_t i = 0; i < count; ++i) {
      if (!done[i]->status.ok()) {
        const Status failed = done[i]->status;
        KVTIER_RETURN_IF_ERROR(drain());
        return failed;
      }
      spare.push_back(done[i]);
    }
    in_flight -= count;
  }
  return file_->sync();
}

void DiskLoad::prepare(FileOperation& operation, Task& task) {
  const auto index = static_cast<std::size_t>(&operation - operations_.data());
  std::uint64_t place = 0;
  // Two writes of one place at a time would leave either of their contents.
  do {
    place = task.pattern.random ? next_random() % task.places : task.next++ % task.places;
  } while (busy_[place] != 0);
  busy_[place] = 1;
  operation.kind = task.pattern.write ? FileOperation::Kind::kWrite : FileOperation::Kind::kRead;
  operation.offset = place * task.io_bytes;
  operation.buffer = buffers_.bytes().subspan(index * io_bytes_max_, task.io_bytes);
  if (!task.pattern.write) return;
  // A buffer holds the pages that it was filled with before the run; the checksums are what sealing
  // a block costs.
  const std::size_t pages_per_io = task.io_bytes / kDiskPageBytes;
  for (std::size_t i = 0; i < pages_per_io; ++i) {
    if (task.verify) {
      sum_of_sums_ += checksum(operation.buffer.subspan(i * kDiskPageBytes, kDiskPageBytes));
    }
    content_[place * pages_per_io + i] =
        static_cast<std::uint32_t>(index * (io_bytes_max_ / kDiskPageBytes) + i);
  }
}

Status DiskLoad::finish(const FileOperation& operation, const Task& task, DiskRun& run) {
  busy_[operation.offset / task.io_bytes] = 0;
  KVTIER_RETURN_IF_ERROR(operation.status);
  if (operation.transferred != task.io_bytes) {
    return io_error(fmt::format("{} of {} B at offset {}", operation.transferred, task.io_bytes,
                                operation.offset));
  }
  run.bytes += task.io_bytes;
  if (task.pattern.write || !task.verify) return {};
  for (std::size_t at = 0; at < task.io_bytes; at += kDiskPageBytes) {
    const std::uint32_t content = content_[(operation.offset + at) / kDiskPageBytes];
    if (checksum(operation.buffer.subspan(at, kDiskPageBytes)) != sums_[content]) {
      ++run.pages_wrong;
    }
  }
  return {};
}

Result<DiskRun> DiskLoad::run(DiskPattern pattern, std::size_t io_bytes, std::uint32_t depth,
                              double seconds, bool verify) {
  Task task{.pattern = pattern,
            .io_bytes = io_bytes,
            .places = half_bytes() / io_bytes,
            .verify = verify};
  std::ranges::fill(busy_, std::uint8_t{0});
  if (pattern.write) {
    for (std::size_t page = 0; page < buffers_.bytes().size() / kDiskPageBytes; ++page) {
      fill_page(page, buffers_.bytes().data() + page * kDiskPageBytes);
    }
  }
  std::vector<FileOperation*> spare;
  for (FileOperation& operation : operations_) spare.push_back(&operation);
  std::array<FileOperation*, kSpare> done;
  DiskRun run;
  const double cpu_before = cpu_seconds();
  const auto begin = std::chrono::steady_clock::now();
  const auto elapsed = [&begin] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  };
  for (std::uint32_t i = 0; i < depth; ++i) {
    accepted_.push_back(spare.back());
    spare.pop_back();
    prepare(*accepted_.back(), task);
  }
  KVTIER_RETURN_IF_ERROR(submit(accepted_));
  std::size_t in_flight = depth;
  Status status;
  while (in_flight > 0) {
    const std::size_t count = file_->reap(done, kPatience);
    if (count == 0) continue;
    in_flight -= count;
    if (status.ok() && elapsed() < seconds) {
      for (std::size_t i = 0; i < count; ++i) {
        accepted_.push_back(spare.back());
        spare.pop_back();
        prepare(*accepted_.back(), task);
      }
      status = submit(accepted_);
      in_flight += count;
    }
    for (std::size_t i = 0; i < count; ++i) {
      const Status finished = finish(*done[i], task, run);
      if (status.ok()) status = finished;
      spare.push_back(done[i]);
    }
  }
  run.seconds = elapsed();
  run.cpu_seconds = cpu_seconds() - cpu_before;
  KVTIER_RETURN_IF_ERROR(status);
  return run;
}

Result<std::uint64_t> DiskLoad::verify_written() {
  Task task{.pattern = {.write = false, .random = false},
            .io_bytes = io_bytes_max_,
            .places = half_bytes() / io_bytes_max_,
            .verify = true};
  std::ranges::fill(busy_, std::uint8_t{0});
  DiskRun run;
  std::array<FileOperation*, 1> done;
  for (std::uint64_t place = 0; place < task.places; ++place) {
    accepted_.assign(1, &operations_[0]);
    prepare(operations_[0], task);
    KVTIER_RETURN_IF_ERROR(submit(accepted_));
    while (file_->reap(done, kPatience) == 0) {
    }
    KVTIER_RETURN_IF_ERROR(finish(operations_[0], task, run));
  }
  return run.pages_wrong;
}

}  // namespace kvtier
