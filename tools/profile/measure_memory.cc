#include "memory/region.h"
#include "tools/bench_clock.h"
#include "tools/bench_reads.h"
#include "tools/profile/measure.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <random>
#include <span>
#include <utility>

namespace kvtier {

namespace {

constexpr std::size_t kCopyBlocks[] = {2048, 16384, 131072, std::size_t{16} << 20};

void fill_words(std::span<std::byte> bytes) {
  std::mt19937_64 random(7);
  for (std::size_t at = 0; at + 8 <= bytes.size(); at += 8) {
    const std::uint64_t word = random();
    std::memcpy(bytes.data() + at, &word, 8);
  }
}

/// Blocks of `block` bytes from all over `source`, in an order that no prefetcher knows, one behind
/// the other into `target`: how missing blocks reach the device tier of a build without a GPU.
class ScatteredCopy {
 public:
  ScatteredCopy(std::span<const std::byte> source, std::span<std::byte> target, std::size_t block)
      : source_(source), target_(target), block_(block) {
    const std::size_t count = std::min(source.size(), target.size()) / block;
    for (std::size_t i = 0; i < count; ++i) order_.push_back(i);
    std::shuffle(order_.begin(), order_.end(), std::mt19937_64(3));
  }

  double bytes() const { return static_cast<double>(order_.size() * block_); }

  void run(WorkerPool& pool) {
    pool.run(pool.threads(), [&](std::size_t worker) {
      const std::size_t begin = worker * order_.size() / pool.threads();
      const std::size_t end = (worker + 1) * order_.size() / pool.threads();
      for (std::size_t i = begin; i < end; ++i) {
        std::memcpy(target_.data() + i * block_, source_.data() + order_[i] * block_, block_);
      }
    });
  }

  Status verify() const {
    for (std::size_t i = 0; i < order_.size(); ++i) {
      if (std::memcmp(target_.data() + i * block_, source_.data() + order_[i] * block_, block_) !=
          0) {
        return corrupt(
            fmt::format("host.copy: block {} of {} B is not what was copied", i, block_));
      }
    }
    return {};
  }

 private:
  std::span<const std::byte> source_;
  std::span<std::byte> target_;
  std::size_t block_;
  std::vector<std::size_t> order_;
};

Status measure_copies(ProfileRun& run, bool pinned) {
  const std::string place = pinned ? "pinned" : "pageable";
  const std::size_t half = run.memory_bytes() / 2;
  auto source = Region::allocate({.bytes = half, .page_lock = pinned});
  auto target = Region::allocate({.bytes = half});
  if (!source.ok() || !target.ok()) {
    run.waive("host.copy", {{"memory", place}}, (source.ok() ? target : source).status().message());
    return {};
  }
  if (pinned && !source->stats().page_locked) {
    run.waive("host.copy", {{"memory", place}}, source->stats().note);
    return {};
  }
  fill_words(source->bytes());
  for (const std::size_t block : kCopyBlocks) {
    if (block > half) continue;
    ScatteredCopy copy(source->bytes(), target->bytes(), block);
    run.rate({.name = "host.copy",
              .parameters = {{"memory", place},
                             {"block_bytes", double(block)},
                             {"threads", double(run.pool().threads())}},
              .unit = "bytes_per_s",
              .note = "memcpy from random places; payload, read and written once"},
             copy.bytes(), [&] { copy.run(run.pool()); });
    KVTIER_RETURN_IF_ERROR(copy.verify());
  }
  return {};
}

void measure_reads(ProfileRun& run, std::uint32_t node) {
  auto region = Region::allocate({.bytes = run.memory_bytes(), .numa_node = node});
  if (!region.ok()) {
    run.waive("memory.read", {{"numa_node", fmt::format("{}", node)}}, region.status().message());
    return;
  }
  fill_words(region->bytes());
  WorkerPool alone(1);
  std::vector<WorkerPool*> pools = {&alone};
  if (run.pool().threads() > 1) pools.push_back(&run.pool());
  for (WorkerPool* pool : pools) {
    run.rate({.name = "memory.read",
              .parameters = {{"numa_node", fmt::format("{}", node)},
                             {"threads", double(pool->threads())}},
              .unit = "bytes_per_s",
              .note = "in address order; threads are not bound to the node"},
             double(region->bytes().size()), [&] { read_stream_seconds(region->bytes(), *pool); });
  }
}

void measure_page_locking(ProfileRun& run) {
  run.show("page_lock");
  const std::size_t bytes = run.memory_bytes() / 4;
  std::vector<double> rates;
  for (std::uint32_t i = 0; i < kProfileRepetitions; ++i) {
    std::optional<Result<Region>> region;
    const double seconds =
        seconds_of([&] { region = Region::allocate({.bytes = bytes, .page_lock = true}); });
    if (!region->ok() || !region->value().stats().page_locked) {
      run.waive("page_lock", {},
                region->ok() ? region->value().stats().note : region->status().message());
      return;
    }
    rates.push_back(double(bytes) / seconds);
  }
  run.add({.name = "page_lock",
           .unit = "bytes_per_s",
           .note = "allocating, touching and locking; a GPU's driver takes longer"},
          std::move(rates));
}

}  // namespace

std::size_t ProfileRun::memory_bytes() const {
  const auto wanted = static_cast<std::size_t>(options_.seconds * double(std::size_t{16} << 20));
  return std::clamp<std::size_t>(wanted, std::size_t{64} << 20, std::size_t{1} << 30);
}

Status measure_memory(ProfileRun& run) {
  if (run.profile().numa_nodes.empty()) measure_reads(run, 0);
  for (const NumaNodeDescription& node : run.profile().numa_nodes) measure_reads(run, node.node);
  KVTIER_RETURN_IF_ERROR(measure_copies(run, false));
  KVTIER_RETURN_IF_ERROR(measure_copies(run, true));
  measure_page_locking(run);
  return {};
}

}  // namespace kvtier
