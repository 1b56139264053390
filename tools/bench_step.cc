#include "tools/bench_step.h"

#include "kernels/read_bytes.h"
#include "memory/dtype.h"
#include "runtime/device_step.h"
#include "tools/bench_torch_gpu.h"
#include "tools/step_load.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <thread>

namespace kvtier {
namespace {

/// Read before each repetition: everything else leaves the L2 cache.
constexpr std::size_t kColdBytes = std::size_t{512} << 20;
constexpr std::size_t kLargeCopy = std::size_t{256} << 20;

/// Normal numbers, on all cores.
void fill_region(std::span<std::byte> bytes) {
  constexpr std::size_t kTable = 1 << 16;
  std::vector<std::byte> table(kTable * 2);
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  for (std::size_t i = 0; i < kTable; ++i) {
    store_element(table.data(), DType::kBF16, i, normal(random));
  }
  const std::size_t threads = std::max(1u, std::thread::hardware_concurrency());
  const std::size_t part = bytes.size() / threads / 8 * 8;
  std::vector<std::thread> workers;
  for (std::size_t t = 0; t < threads; ++t) {
    const std::size_t end = t + 1 == threads ? bytes.size() / 8 * 8 : (t + 1) * part;
    workers.emplace_back([=, &table] {
      std::uint64_t state = t + 1;
      for (std::size_t at = t * part; at < end; at += 8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        for (std::size_t i = 0; i < 4; ++i) {
          std::memcpy(bytes.data() + at + 2 * i, table.data() + (state >> 16 * i & 0xFFFF) * 2, 2);
        }
      }
    });
  }
  for (std::thread& worker : workers) worker.join();
}

/// What the machine gives: GB/s.
struct Rates {
  double memory = 0;
  double link = 0;
};

/// A step in the ways that are compared, over one load.
class StepBench {
 public:
  static Result<std::unique_ptr<StepBench>> make(const GpuBench& bench, const StepCase& c,
                                                 std::span<const std::byte> host,
                                                 const DeviceBuffer& cold,
                                                 const BenchStepOptions& options) {
    KVTIER_ASSIGN_OR_RETURN(std::unique_ptr<StepLoad> load, StepLoad::make(bench, c, host));
    std::unique_ptr<StepBench> step(new StepBench(bench, c, cold, options, std::move(load)));
    KVTIER_RETURN_IF_ERROR(step->capture());
    return step;
  }

  Result<nlohmann::ordered_json> measure(unsigned percent, const Rates& rates, double sdpa_us);
  bool verified() const { return verified_; }

 private:
  enum Way : unsigned { kSelection, kGraph, kBefore, kUnchecked, kLaunches, kWays };

  StepBench(const GpuBench& bench, const StepCase& c, const DeviceBuffer& cold,
            const BenchStepOptions& options, std::unique_ptr<StepLoad> load)
      : bench_(bench), case_(c), cold_(cold), options_(options), load_(std::move(load)) {}

  Result<DeviceStep> make_step(const DeviceStepOptions& options) const {
    return DeviceStep::make(bench_.gpu(), case_.shape(), options, bench_.stream());
  }
  Status capture();
  Status run(Way way) const {
    if (way == kLaunches) return steps_[0].enqueue(load_->tables(), bench_.stream());
    return graphs_[way].launch(bench_.stream());
  }
  /// The state before the step again, and cold caches.
  Status prepare() const {
    KVTIER_RETURN_IF_ERROR(load_->restore());
    return read_bytes(bench_.gpu(), {cold_.data(), kColdBytes}, cold_.as<std::uint64_t>(),
                      bench_.stream());
  }
  /// Times of every way, in turn. What prepares a run is enqueued with it, so that the GPU has work
  /// while the CPU launches.
  Result<std::vector<GpuSamples>> time_all() const;
  Status verify(unsigned percent);

  const GpuBench& bench_;
  StepCase case_;
  const DeviceBuffer& cold_;
  const BenchStepOptions& options_;
  std::unique_ptr<StepLoad> load_;
  std::vector<DeviceStep> steps_;
  std::vector<GpuGraph> graphs_;
  std::vector<float> first_out_;
  bool verified_ = true;
};

Status StepBench::capture() {
  for (const DeviceStepOptions& options :
       {DeviceStepOptions{}, DeviceStepOptions{.order = FetchOrder::kBefore},
        DeviceStepOptions{.verify = false}}) {
    KVTIER_ASSIGN_OR_RETURN(DeviceStep step, make_step(options));
    steps_.push_back(std::move(step));
  }
  const auto add = [&](const std::function<Status()>& enqueue) -> Status {
    KVTIER_ASSIGN_OR_RETURN(GpuGraph graph,
                            GpuGraph::capture(bench_.gpu(), bench_.stream(), enqueue));
    graphs_.push_back(std::move(graph));
    return {};
  };
  KVTIER_RETURN_IF_ERROR(
      add([&] { return steps_[0].enqueue_selection(load_->tables(), bench_.stream()); }));
  for (const DeviceStep& step : steps_) {
    KVTIER_RETURN_IF_ERROR(add([&] { return step.enqueue(load_->tables(), bench_.stream()); }));
  }
  return {};
}

Result<std::vector<GpuSamples>> StepBench::time_all() const {
  KVTIER_ASSIGN_OR_RETURN(const GpuTimer timer, GpuTimer::create(bench_.gpu()));
  std::vector<std::vector<double>> times(kWays);
  for (unsigned repetition = 0; repetition <= options_.repetitions; ++repetition) {
    for (unsigned way = 0; way < kWays; ++way) {
      KVTIER_RETURN_IF_ERROR(prepare());
      KVTIER_RETURN_IF_ERROR(timer.start(bench_.stream()));
      KVTIER_RETURN_IF_ERROR(run(Way(way)));
      KVTIER_RETURN_IF_ERROR(timer.stop(bench_.stream()));
      KVTIER_ASSIGN_OR_RETURN(const double us, timer.elapsed_us());
      if (repetition > 0) times[way].push_back(us);
    }
  }
  std::vector<GpuSamples> samples;
  for (std::vector<double>& of_way : times) {
    std::sort(of_way.begin(), of_way.end());
    samples.push_back({of_way[of_way.size() / 2], of_way.front(), of_way.back()});
  }
  return samples;
}

/// Graph and launches give the same bits, hits and misses nearly the same numbers, all finite, and
/// the ratio of hits is the one that was forced.
Status StepBench::verify(unsigned percent) {
  KVTIER_RETURN_IF_ERROR(load_->restore());
  KVTIER_RETURN_IF_ERROR(run(kLaunches));
  KVTIER_ASSIGN_OR_RETURN(const auto launched, load_->out());
  KVTIER_RETURN_IF_ERROR(load_->restore());
  KVTIER_RETURN_IF_ERROR(run(kGraph));
  KVTIER_ASSIGN_OR_RETURN(const auto replayed, load_->out());
  verified_ &= std::memcmp(launched.data(), replayed.data(), launched.size() * 4) == 0;
  verified_ &= std::ranges::all_of(launched, [](float x) { return std::isfinite(x); });
  if (first_out_.empty()) first_out_ = launched;
  for (std::size_t i = 0; i < launched.size(); ++i) {
    verified_ &= std::abs(launched[i] - first_out_[i]) < 1e-4f;
  }
  const FetchReport& report = load_->report();
  const std::uint32_t hits = case_.chosen() * percent / 100 * case_.lists();
  verified_ &= report.failed == 0 && report.hits == hits &&
               report.hits + report.misses == case_.chosen() * case_.lists();
  return {};
}

Result<nlohmann::ordered_json> StepBench::measure(unsigned percent, const Rates& rates,
                                                  double sdpa_us) {
  // Fetches what is missing, so that the bytes of the choice are on the GPU.
  KVTIER_RETURN_IF_ERROR(run(kGraph));
  KVTIER_RETURN_IF_ERROR(bench_.wait());
  KVTIER_RETURN_IF_ERROR(load_->force_hits(steps_[0], percent));
  KVTIER_ASSIGN_OR_RETURN(const auto times, time_all());
  KVTIER_RETURN_IF_ERROR(verify(percent));
  const double selection = double(steps_[0].selection_bytes(case_.shape().runs_max));
  const double missed = double(load_->report().misses) * double(case_.block_bytes());
  const double selection_us = selection / rates.memory / 1e3;
  const double link_us = missed / rates.link / 1e3;
  const double us = times[kGraph].median;
  const double bound = selection_us + link_us;
  nlohmann::ordered_json row;
  row["batch"] = case_.sequences;
  row["context"] = case_.context;
  row["block"] = case_.tokens_per_block;
  row["budget"] = case_.budget;
  row["hits_%"] = percent;
  row["step_us"] = us;
  row["least"] = times[kGraph].least;
  row["most"] = times[kGraph].most;
  row["select_us"] = times[kSelection].median;
  row["select_MB"] = selection / 1e6;
  row["missed_KB"] = missed / 1e3;
  row["bytes_us"] = bound;
  row["over"] = us / bound;
  row["goal_us"] = 1.25 * bound + 15.0;
  row["before_us"] = times[kBefore].median;
  row["unchecked_us"] = times[kUnchecked].median;
  row["launches_us"] = times[kLaunches].median;
  row["sdpa_us"] = nullptr;
  row["faster"] = nullptr;
  if (sdpa_us > 0.0) {
    row["sdpa_us"] = sdpa_us;
    row["faster"] = sdpa_us / us;
  }
  return row;
}

Result<Rates> measure_rates(const GpuBench& bench, std::span<const std::byte> host,
                            const DeviceBuffer& cold, unsigned repetitions) {
  const std::size_t copied = std::min(kLargeCopy, host.size());
  const std::function<Status()> works[] = {
      [&] {
        return read_bytes(bench.gpu(), {cold.data(), kColdBytes}, cold.as<std::uint64_t>(),
                          bench.stream());
      },
      [&] {
        return cuda_status(
            bench.gpu().calls(),
            bench.gpu().calls().copy(cold.data(), host.data(), copied, bench.stream().get()),
            "a large copy");
      }};
  KVTIER_ASSIGN_OR_RETURN(const auto times, bench.measure(works, repetitions));
  return Rates{double(kColdBytes) / times[0].median / 1e3, double(copied) / times[1].median / 1e3};
}

Status check_options(const BenchStepOptions& options) {
  for (const std::uint32_t context : options.contexts) {
    if (context % 1024 != 0) return invalid_argument("expected contexts of whole KiB of tokens");
  }
  for (const std::uint32_t budget : options.budgets) {
    for (const std::uint32_t context : options.contexts) {
      if (budget < 128 || budget % 8 != 0 || budget > 4096 || budget + 128 > context) {
        return invalid_argument(
            fmt::format("found a budget of {}, expected multiples of 8 from 128 to 4096, and less "
                        "than the context",
                        budget));
      }
    }
  }
  const bool hits = std::ranges::all_of(options.hits, [](auto percent) { return percent <= 100; });
  if (!hits || options.batch == 0 || options.batch > 128) {
    return invalid_argument("expected hits of 0 to 100 percent, and a batch of 1 to 128");
  }
  return {};
}

std::vector<StepCase> cases_of(const BenchStepOptions& options) {
  std::vector<StepCase> cases;
  for (const std::uint32_t context : options.contexts) {
    for (const std::uint32_t block : options.blocks) {
      for (const std::uint32_t budget : options.budgets) {
        cases.push_back({options.batch, context, budget, block});
      }
    }
  }
  return cases;
}

Result<int> run(const BenchStepOptions& options) {
  KVTIER_RETURN_IF_ERROR(check_options(options));
  const std::vector<StepCase> cases = cases_of(options);
  std::size_t host_bytes = 0;
  for (const StepCase& c : cases) host_bytes = std::max(host_bytes, c.host_bytes());
  KVTIER_ASSIGN_OR_RETURN(const GpuBench bench, GpuBench::open());
  KVTIER_ASSIGN_OR_RETURN(Region region, Region::allocate({.bytes = host_bytes}));
  fill_region(region.bytes());
  KVTIER_ASSIGN_OR_RETURN(const PinnedRegion host,
                          PinnedRegion::pin(bench.gpu(), std::move(region)));
  KVTIER_ASSIGN_OR_RETURN(const DeviceBuffer cold,
                          DeviceBuffer::allocate(bench.gpu(), kColdBytes, bench.stream()));
  KVTIER_RETURN_IF_ERROR(cold.fill(0x5A));
  KVTIER_ASSIGN_OR_RETURN(const Rates rates,
                          measure_rates(bench, host.bytes(), cold, options.repetitions));
  const std::unique_ptr<TorchGpuPeer> torch = TorchGpuPeer::start(options.python);
  bool verified = true;
  nlohmann::ordered_json rows = nlohmann::ordered_json::array();
  double sdpa_us = 0.0;
  std::uint32_t sdpa_context = 0;
  for (const StepCase& c : cases) {
    if (torch != nullptr && sdpa_context != c.context) {
      const auto answer = torch->measure({c.sequences, c.context, 2});
      sdpa_us = answer ? answer->us : 0.0;
      sdpa_context = c.context;
    }
    KVTIER_ASSIGN_OR_RETURN(const std::unique_ptr<StepBench> step,
                            StepBench::make(bench, c, host.bytes(), cold, options));
    for (const std::uint32_t percent : options.hits) {
      KVTIER_ASSIGN_OR_RETURN(auto row, step->measure(percent, rates, sdpa_us));
      rows.push_back(std::move(row));
    }
    verified &= step->verified();
  }
  GpuBenchOptions report;
  report.format = options.format;
  report.python = options.python;
  report.repetitions = options.repetitions;
  report.region_bytes = host_bytes;
  nlohmann::ordered_json machine = bench.machine();
  machine["shape"] = "bfloat16, 8 KV heads x 128, 32 query heads, one query; L2 cold";
  machine["memory_GB/s"] = rates.memory;
  machine["link_GB/s"] = rates.link;
  machine["torch"] = torch == nullptr ? "not there" : torch->version();
  print_gpu_report(report, "bench-step", machine, rows);
  if (!verified) fmt::print(stderr, "bench step: a result is not what it must be\n");
  return verified ? 0 : 4;
}

}  // namespace

int run_bench_step(const BenchStepOptions& options) {
  const Result<int> code = run(options);
  return code.ok() ? *code : gpu_bench_failure("bench step", code.status());
}

}  // namespace kvtier
