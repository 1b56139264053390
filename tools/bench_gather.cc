#include "kernels/checksum.h"
#include "kernels/move_blocks.h"
#include "memory/region.h"
#include "tools/bench_gpu.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <optional>
#include <random>
#include <thread>

namespace kvtier {
namespace {

constexpr std::size_t kSizes[] = {512, 1024, 2048, 4096, 16384, 65536};
/// What one repetition moves, and what a large copy moves.
constexpr std::size_t kBytesMoved = std::size_t{64} << 20;
constexpr std::size_t kLargeCopy = std::size_t{1} << 30;
/// Blocks that are copied one call each: calls cost microseconds.
constexpr std::size_t kCalls = 2048;

void fill_region(std::span<std::byte> bytes) {
  const unsigned threads = std::max(1u, std::thread::hardware_concurrency());
  std::vector<std::thread> workers;
  const std::size_t part = bytes.size() / threads / 8 * 8;
  for (unsigned t = 0; t < threads; ++t) {
    workers.emplace_back([=] {
      std::uint64_t state = t + 1;
      for (std::size_t at = t * part; at < (t + 1) * part; at += 8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        std::memcpy(bytes.data() + at, &state, 8);
      }
    });
  }
  for (std::thread& worker : workers) worker.join();
}

/// One list of moves on the GPU, in the order given.
struct MoveList {
  std::vector<BlockMove> moves;
  DeviceBuffer device_moves;
  DeviceBuffer seeds;
  DeviceBuffer sums;
  DeviceBuffer states;
};

enum class Order { kRandom, kByAddress, kContiguous };

class GatherBench {
 public:
  GatherBench(const GpuBench& bench, const GpuBenchOptions& options, PinnedRegion host,
              DeviceBuffer slab)
      : bench_(bench), options_(options), host_(std::move(host)), slab_(std::move(slab)) {}

  /// Adds the rows of one block size.
  Status run(std::size_t block_bytes, nlohmann::ordered_json& rows) {
    block_bytes_ = block_bytes;
    for (const bool to_device : {true, false}) {
      KVTIER_ASSIGN_OR_RETURN(auto row, measure(to_device));
      rows.push_back(std::move(row));
    }
    return {};
  }
  bool verified() const { return verified_; }

  /// GB/s of gather and scatter at one time, each on its own stream.
  Result<double> both_ways(std::size_t block_bytes) {
    block_bytes_ = block_bytes;
    KVTIER_ASSIGN_OR_RETURN(const MoveList in, make_list(true, Order::kRandom, false));
    KVTIER_ASSIGN_OR_RETURN(const MoveList out, make_list(false, Order::kRandom, false));
    KVTIER_ASSIGN_OR_RETURN(const GpuStream other, GpuStream::create(bench_.gpu()));
    std::vector<double> rates;
    for (unsigned r = 0; r <= options_.repetitions; ++r) {
      const auto begin = std::chrono::steady_clock::now();
      for (int i = 0; i < 8; ++i) {
        KVTIER_RETURN_IF_ERROR(move(in, true, MoveCheck::kNone, bench_.stream()));
        KVTIER_RETURN_IF_ERROR(move(out, false, MoveCheck::kNone, other.ref()));
      }
      KVTIER_RETURN_IF_ERROR(bench_.wait());
      KVTIER_RETURN_IF_ERROR(bench_.gpu().synchronize(other.ref()));
      const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
      if (r > 0) rates.push_back(16.0 * double(kBytesMoved) / seconds.count() / 1e9);
    }
    std::sort(rates.begin(), rates.end());
    return rates[rates.size() / 2];
  }

 private:
  std::size_t count() const { return kBytesMoved / block_bytes_; }

  Result<MoveList> make_list(bool to_device, Order order, bool with_sums) {
    std::mt19937_64 random(block_bytes_ + std::size_t{to_device});
    std::vector<std::uint64_t> host_places(count());
    std::vector<std::uint64_t> slots(count());
    for (std::size_t i = 0; i < count(); ++i) {
      const std::size_t place =
          order == Order::kContiguous ? i : random() % (host_.bytes().size() / block_bytes_);
      host_places[i] = place * block_bytes_;
      slots[i] = i * block_bytes_;
    }
    // Scattered blocks must not overlap: the random places of a list are made distinct.
    std::sort(host_places.begin(), host_places.end());
    host_places.erase(std::unique(host_places.begin(), host_places.end()), host_places.end());
    if (order == Order::kRandom) std::shuffle(host_places.begin(), host_places.end(), random);
    std::shuffle(slots.begin(), slots.end(), random);
    std::vector<BlockMove> moves;
    std::vector<std::uint64_t> seeds;
    std::vector<std::uint64_t> sums;
    for (std::size_t i = 0; i < host_places.size(); ++i) {
      moves.push_back(to_device ? BlockMove{host_places[i], slots[i]}
                                : BlockMove{slots[i], host_places[i]});
      seeds.push_back(random());
      sums.push_back(
          with_sums
              ? seeded_checksum(host_.bytes().subspan(host_places[i], block_bytes_), seeds.back())
              : 0);
    }
    return upload(std::move(moves), seeds, sums);
  }

  Result<MoveList> upload(std::vector<BlockMove> moves, const std::vector<std::uint64_t>& seeds,
                          const std::vector<std::uint64_t>& sums) const {
    const auto buffer = [&](std::span<const std::byte> bytes) -> Result<DeviceBuffer> {
      KVTIER_ASSIGN_OR_RETURN(DeviceBuffer made,
                              DeviceBuffer::allocate(bench_.gpu(), bytes.size(), bench_.stream()));
      KVTIER_RETURN_IF_ERROR(made.upload(bytes));
      KVTIER_RETURN_IF_ERROR(bench_.wait());
      return made;
    };
    const std::vector<MoveState> states(moves.size());
    KVTIER_ASSIGN_OR_RETURN(DeviceBuffer a, buffer(std::as_bytes(std::span(moves))));
    KVTIER_ASSIGN_OR_RETURN(DeviceBuffer b, buffer(std::as_bytes(std::span(seeds))));
    KVTIER_ASSIGN_OR_RETURN(DeviceBuffer c, buffer(std::as_bytes(std::span(sums))));
    KVTIER_ASSIGN_OR_RETURN(DeviceBuffer d, buffer(std::as_bytes(std::span(states))));
    return MoveList{std::move(moves), std::move(a), std::move(b), std::move(c), std::move(d)};
  }

  Status move(const MoveList& list, bool to_device, MoveCheck check, StreamRef stream) const {
    MoveBlocksParams params;
    params.source = to_device ? std::span<const std::byte>(host_.bytes())
                              : std::span<const std::byte>(slab_.data(), slab_.size());
    params.target = to_device ? std::span<std::byte>(slab_.data(), slab_.size()) : host_.bytes();
    params.block_bytes = block_bytes_;
    params.moves = list.device_moves.as<BlockMove>();
    params.moves_max = static_cast<std::uint32_t>(list.moves.size());
    params.check = check;
    params.seeds = list.seeds.as<std::uint64_t>();
    params.sums = list.sums.as<std::uint64_t>();
    params.states = list.states.as<MoveState>();
    return move_blocks(bench_.gpu(), params, stream);
  }

  const std::byte* source_of(const BlockMove& move, bool to_device) const {
    return (to_device ? host_.bytes().data() : slab_.data()) + move.source_offset;
  }
  std::byte* target_of(const BlockMove& move, bool to_device) const {
    return (to_device ? slab_.data() : host_.bytes().data()) + move.target_offset;
  }

  Status copy_each(const MoveList& list, bool to_device) const {
    CudaCalls& calls = bench_.gpu().calls();
    for (std::size_t i = 0; i < std::min(kCalls, list.moves.size()); ++i) {
      KVTIER_RETURN_IF_ERROR(cuda_status(
          calls,
          calls.copy(target_of(list.moves[i], to_device), source_of(list.moves[i], to_device),
                     block_bytes_, bench_.stream().get()),
          "copying a block"));
    }
    return {};
  }

  Status copy_as_batch(const MoveList& list, bool to_device) const {
    std::vector<void*> targets;
    std::vector<void*> sources;
    for (std::size_t i = 0; i < std::min(kCalls, list.moves.size()); ++i) {
      targets.push_back(target_of(list.moves[i], to_device));
      sources.push_back(const_cast<std::byte*>(source_of(list.moves[i], to_device)));
    }
    const std::vector<std::size_t> bytes(targets.size(), block_bytes_);
    CudaCalls& calls = bench_.gpu().calls();
    return cuda_status(
        calls,
        calls.copy_batch({targets.data(), sources.data(), bytes.data(), bytes.size()},
                         bench_.stream().get()),
        "copying a batch");
  }

  Result<nlohmann::ordered_json> measure(bool to_device) {
    KVTIER_ASSIGN_OR_RETURN(const MoveList random, make_list(to_device, Order::kRandom, to_device));
    KVTIER_ASSIGN_OR_RETURN(const MoveList sorted, make_list(to_device, Order::kByAddress, false));
    KVTIER_ASSIGN_OR_RETURN(const MoveList contiguous,
                            make_list(to_device, Order::kContiguous, false));
    const MoveCheck check = to_device ? MoveCheck::kVerify : MoveCheck::kCompute;
    const auto large = [&] {
      std::byte* device = slab_.data();
      std::byte* host = host_.bytes().data();
      CudaCalls& calls = bench_.gpu().calls();
      return cuda_status(calls,
                         calls.copy(to_device ? device : host, to_device ? host : device,
                                    kLargeCopy, bench_.stream().get()),
                         "a large copy");
    };
    // Checked and unchecked follow the same work: what comes before changes a rate by a third.
    std::vector<std::function<Status()>> works = {
        large,
        [&] { return move(random, to_device, MoveCheck::kNone, bench_.stream()); },
        [&] { return move(random, to_device, MoveCheck::kNone, bench_.stream()); },
        [&] { return move(random, to_device, check, bench_.stream()); },
        [&] { return move(sorted, to_device, MoveCheck::kNone, bench_.stream()); },
        [&] { return move(contiguous, to_device, MoveCheck::kNone, bench_.stream()); },
        [&] { return copy_each(random, to_device); }};
    const bool batches = copy_as_batch(random, to_device).ok();
    if (batches) works.emplace_back([&] { return copy_as_batch(random, to_device); });
    KVTIER_ASSIGN_OR_RETURN(const auto times, bench_.measure(works, options_.repetitions));
    KVTIER_RETURN_IF_ERROR(verify(random, to_device));
    return to_row(to_device, random.moves.size(), times);
  }

  nlohmann::ordered_json to_row(bool to_device, std::size_t blocks,
                                const std::vector<GpuSamples>& times) const {
    const auto rate = [&](double us, std::size_t of_blocks) {
      return double(of_blocks * block_bytes_) / us / 1e3;
    };
    const double large = double(kLargeCopy) / times[0].median / 1e3;
    const std::size_t called = std::min(kCalls, blocks);
    nlohmann::ordered_json row;
    row["direction"] = to_device ? "gather" : "scatter";
    row["block"] = block_bytes_;
    row["large_copy"] = large;
    row["random"] = rate(times[2].median, blocks);
    row["least"] = rate(times[2].most, blocks);
    row["most"] = rate(times[2].least, blocks);
    row["share"] = rate(times[2].median, blocks) / large;
    row["M_places/s"] = double(blocks) / times[2].median;
    row["by_address"] = rate(times[4].median, blocks);
    row["contiguous"] = rate(times[5].median, count());
    row["checked"] = rate(times[3].median, blocks);
    row["check_cost_%"] = 100.0 * (times[3].median / times[2].median - 1.0);
    row["memcpyAsync"] = rate(times[6].median, called);
    row["batch"] = nullptr;
    if (times.size() > 7) row["batch"] = rate(times[7].median, called);
    return row;
  }

  /// Every block of the last checked run, byte for byte.
  Status verify(const MoveList& list, bool to_device) {
    KVTIER_RETURN_IF_ERROR(move(
        list, to_device, to_device ? MoveCheck::kVerify : MoveCheck::kCompute, bench_.stream()));
    std::vector<std::byte> slab(kBytesMoved);
    std::vector<MoveState> states(list.moves.size());
    std::vector<std::uint64_t> sums(list.moves.size());
    std::vector<std::uint64_t> seeds(list.moves.size());
    KVTIER_RETURN_IF_ERROR(slab_.download(slab));
    KVTIER_RETURN_IF_ERROR(list.states.download(std::as_writable_bytes(std::span(states))));
    KVTIER_RETURN_IF_ERROR(list.sums.download(std::as_writable_bytes(std::span(sums))));
    KVTIER_RETURN_IF_ERROR(list.seeds.download(std::as_writable_bytes(std::span(seeds))));
    KVTIER_RETURN_IF_ERROR(bench_.wait());
    for (std::size_t i = 0; i < list.moves.size(); ++i) {
      const std::uint64_t host =
          to_device ? list.moves[i].source_offset : list.moves[i].target_offset;
      const std::uint64_t slot =
          to_device ? list.moves[i].target_offset : list.moves[i].source_offset;
      const std::byte* expected = host_.bytes().data() + host;
      verified_ &= std::memcmp(slab.data() + slot, expected, block_bytes_) == 0;
      verified_ &= states[i] == MoveState::kMoved;
      verified_ &= sums[i] == seeded_checksum({expected, block_bytes_}, seeds[i]);
    }
    return {};
  }

  const GpuBench& bench_;
  const GpuBenchOptions& options_;
  PinnedRegion host_;
  DeviceBuffer slab_;
  std::size_t block_bytes_ = 0;
  bool verified_ = true;
};

Result<int> run(const GpuBenchOptions& options) {
  if (options.region_bytes < kLargeCopy || options.repetitions == 0) {
    return invalid_argument("expected repetitions > 0 and a region of at least 1 GiB");
  }
  KVTIER_ASSIGN_OR_RETURN(const GpuBench bench, GpuBench::open());
  KVTIER_ASSIGN_OR_RETURN(Region region, Region::allocate({.bytes = options.region_bytes}));
  fill_region(region.bytes());
  KVTIER_ASSIGN_OR_RETURN(PinnedRegion host, PinnedRegion::pin(bench.gpu(), std::move(region)));
  KVTIER_ASSIGN_OR_RETURN(DeviceBuffer slab,
                          DeviceBuffer::allocate(bench.gpu(), kLargeCopy, bench.stream()));
  nlohmann::ordered_json machine = bench.machine();
  machine["region"] = fmt::format("{} GiB page-locked, {} MiB in huge pages",
                                  host.bytes().size() >> 30, host.stats().huge_page_bytes >> 20);
  GatherBench gather(bench, options, std::move(host), std::move(slab));
  nlohmann::ordered_json rows = nlohmann::ordered_json::array();
  for (const std::size_t bytes : kSizes) KVTIER_RETURN_IF_ERROR(gather.run(bytes, rows));
  KVTIER_ASSIGN_OR_RETURN(const double both, gather.both_ways(4096));
  machine["both_ways"] = fmt::format("{:.1f} GB/s in sum, 4 KiB at random places", both);
  machine["unit"] = "GB/s of payload";
  print_gpu_report(options, "bench-gather", machine, rows);
  if (!gather.verified()) fmt::print(stderr, "bench gather: a block is not what it must be\n");
  return gather.verified() ? 0 : 4;
}

}  // namespace

int run_bench_gather(const GpuBenchOptions& options) {
  const Result<int> code = run(options);
  return code.ok() ? *code : gpu_bench_failure("bench gather", code.status());
}

}  // namespace kvtier
