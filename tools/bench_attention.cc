#include "tools/bench_attention.h"

#include "kernels/partial_attention.h"
#include "memory/dtype.h"
#include "memory/region.h"
#include "tools/bench_attention_report.h"
#include "tools/bench_clock.h"
#include "tools/bench_reads.h"
#include "tools/bench_torch_peer.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <random>
#include <utility>

namespace kvtier {
namespace {

constexpr std::uint32_t kTokensPerBlock = 8;

// SmolLM2-135M (64, 3), Qwen2.5-0.5B (64, 7), Llama-3-8B (128, 4) and Qwen2.5-7B (128, 7); of the
// longest lists fewer heads, so that several calls fit into the region.
constexpr BenchShape kShapes[] = {{64, 3, 3, 2048},  {64, 3, 3, 16384},  {64, 3, 1, 131072},
                                  {64, 7, 2, 2048},  {64, 7, 2, 16384},  {64, 7, 1, 131072},
                                  {128, 4, 8, 2048}, {128, 4, 2, 16384}, {128, 4, 1, 131072},
                                  {128, 7, 4, 2048}, {128, 7, 2, 16384}, {128, 7, 1, 131072}};

/// Fills memory with float16 numbers in [-1, 1].
void fill_f16(std::span<std::byte> bytes) {
  std::mt19937 random(1);
  std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
  const std::size_t piece = std::min(bytes.size(), std::size_t{1} << 20);
  for (std::size_t i = 0; i < piece / 2; ++i) {
    store_element(bytes.data(), DType::kF16, i, uniform(random));
  }
  for (std::size_t at = piece; at < bytes.size(); at += piece) {
    std::memcpy(bytes.data() + at, bytes.data(), std::min(piece, bytes.size() - at));
  }
}

/// Blocks of one shape in the region, and calls that read them part by part.
class AttentionLoad {
 public:
  AttentionLoad(const BenchShape& shape, std::span<std::byte> region, std::size_t least_bytes)
      : shape_(shape), layout_(make_layout(shape)) {
    const std::size_t count = region.size() / layout_.block_bytes();
    for (std::size_t i = 0; i < count; ++i) {
      ranges_.push_back({region.data() + i * layout_.block_bytes(), 0, kTokensPerBlock, 0});
    }
    calls_ = std::clamp<std::size_t>(least_bytes / shape.bytes(), 1, region.size() / shape.bytes());
    const std::size_t rows = std::size_t{shape.kv_heads} * shape.group;
    queries_.resize(rows * shape.head_dim);
    for (std::size_t i = 0; i < queries_.size(); ++i) queries_[i] = float(i % 13) / 6.0f - 1.0f;
    out_.resize(queries_.size());
    lse_.resize(rows);
  }

  void shuffle_blocks() { std::shuffle(ranges_.begin(), ranges_.end(), std::mt19937_64(2)); }

  std::size_t calls() const { return calls_; }
  std::size_t bytes() const { return calls_ * shape_.bytes(); }
  std::size_t block_bytes() const { return layout_.block_bytes(); }

  /// What one repetition reads: each another part of the region, as long as there is one.
  std::span<const BlockRange> blocks(std::size_t repetition) const {
    const std::size_t count = bytes() / layout_.block_bytes();
    return std::span(ranges_).subspan(repetition % (ranges_.size() / count) * count, count);
  }

  /// One repetition: `calls()` calls, together over all its blocks.
  void run(std::size_t repetition, WorkerPool& pool) {
    std::span<const BlockRange> left = blocks(repetition);
    for (std::size_t call = 0; call < calls_; ++call) {
      const Status status = partial_attention(params(), take_tasks(left), workspace_, pool);
      KVTIER_CHECK(status.ok(), "{}", status.to_string());
    }
  }

  /// Largest difference from the reference over the first tokens of one call.
  float verify(WorkerPool& pool) {
    std::span<const BlockRange> left = blocks(0);
    std::vector<AttentionTask> tasks = take_tasks(left);
    for (AttentionTask& task : tasks) {
      task.blocks = task.blocks.first(std::min<std::size_t>(task.blocks.size(), 80));
    }
    const Status status = partial_attention(params(), tasks, workspace_, pool);
    KVTIER_CHECK(status.ok(), "{}", status.to_string());
    const std::vector<float> out = out_;
    const std::vector<float> lse = lse_;
    for (const AttentionTask& task : tasks) partial_attention_reference(params(), task);
    float largest = 0.0f;
    for (std::size_t i = 0; i < out.size(); ++i)
      largest = std::max(largest, std::abs(out[i] - out_[i]));
    for (std::size_t i = 0; i < lse.size(); ++i)
      largest = std::max(largest, std::abs(lse[i] - lse_[i]));
    return largest;
  }

 private:
  static BlockLayout make_layout(const BenchShape& shape) {
    BlockShape block;
    block.head_dim = shape.head_dim;
    block.value_dim = shape.head_dim;
    block.tokens_per_block = kTokensPerBlock;
    return BlockLayout::make(block).value();
  }

  AttentionParams params() const {
    return {&layout_, shape_.group, {1.0f / std::sqrt(float(shape_.head_dim)), 0.0f}};
  }

  /// One call's tasks over the first blocks of `left`, which it takes away.
  std::vector<AttentionTask> take_tasks(std::span<const BlockRange>& left) {
    std::vector<AttentionTask> tasks;
    const std::size_t blocks = shape_.tokens / kTokensPerBlock;
    for (std::size_t head = 0; head < shape_.kv_heads; ++head) {
      AttentionTask task;
      task.queries = queries_.data() + head * shape_.group * shape_.head_dim;
      task.blocks = left.first(blocks);
      task.out = out_.data() + head * shape_.group * shape_.head_dim;
      task.lse = lse_.data() + head * shape_.group;
      tasks.push_back(task);
      left = left.subspan(blocks);
    }
    return tasks;
  }

  BenchShape shape_;
  BlockLayout layout_;
  std::vector<BlockRange> ranges_;
  std::size_t calls_ = 1;
  std::vector<float> queries_;
  std::vector<float> out_;
  std::vector<float> lse_;
  AttentionWorkspace workspace_;
};

/// Seconds of each repetition.
struct Timings {
  std::vector<double> attention;
  std::vector<double> blocks;
};

std::vector<double> speeds(std::size_t bytes, const std::vector<double>& seconds) {
  std::vector<double> gbps;
  for (const double s : seconds) gbps.push_back(double(bytes) / s / 1e9);
  return gbps;
}

/// Repetition by repetition, how many times as fast the first was.
Spread speedup(const std::vector<double>& seconds, const std::vector<double>& baseline_seconds) {
  std::vector<double> ratios;
  for (std::size_t i = 0; i < seconds.size(); ++i) {
    ratios.push_back(baseline_seconds[i] / seconds[i]);
  }
  return Spread::of(ratios);
}

/// Rows of one shape and number of threads: one per placement of the blocks.
std::vector<BenchRow> measure(const BenchShape& shape, unsigned threads,
                              const BenchAttentionOptions& options, std::span<std::byte> region,
                              TorchPeer* torch) {
  WorkerPool pool(threads);
  AttentionLoad ordered(shape, region, options.bytes_per_repetition);
  AttentionLoad shuffled(shape, region, options.bytes_per_repetition);
  shuffled.shuffle_blocks();
  AttentionLoad* const loads[] = {&ordered, &shuffled};
  std::vector<BenchRow> rows;
  for (AttentionLoad* load : loads) {
    BenchRow& row = rows.emplace_back();
    row.shape = shape;
    row.threads = threads;
    row.placement = load == &ordered ? "order" : "random";
    row.bytes = load->bytes();
    row.difference = load->verify(pool);
    row.read_ahead = best_read_ahead(load->blocks(0), load->block_bytes(), pool);
  }
  Timings timings[std::size(loads)];
  std::vector<double> stream;
  std::vector<double> torch_seconds;
  const std::size_t bytes = ordered.bytes();
  for (unsigned i = 0; i < options.repetitions; ++i) {
    for (std::size_t p = 0; p < std::size(loads); ++p) {
      AttentionLoad& load = *loads[p];
      timings[p].attention.push_back(seconds_of([&] { load.run(i, pool); }));
      timings[p].blocks.push_back(
          read_blocks_seconds(load.blocks(i), load.block_bytes(), rows[p].read_ahead, pool));
    }
    const std::size_t at = i % (region.size() / bytes) * bytes;
    stream.push_back(read_stream_seconds(region.subspan(at, bytes), pool));
    if (torch == nullptr) continue;
    const std::optional<double> seconds = torch->seconds(
        {shape.head_dim, shape.group, shape.kv_heads, shape.tokens, ordered.calls(), threads, i});
    if (seconds) torch_seconds.push_back(*seconds);
  }
  for (std::size_t p = 0; p < std::size(loads); ++p) {
    rows[p].attention_gbps = Spread::of(speeds(bytes, timings[p].attention));
    rows[p].stream_gbps = Spread::of(speeds(bytes, stream));
    rows[p].blocks_gbps = Spread::of(speeds(bytes, timings[p].blocks));
    rows[p].share_of_stream = speedup(timings[p].attention, stream);
    rows[p].share_of_blocks = speedup(timings[p].attention, timings[p].blocks);
    if (torch_seconds.size() != stream.size()) continue;
    rows[p].torch_gbps = Spread::of(speeds(bytes, torch_seconds));
    rows[p].ratio_to_torch = speedup(timings[p].attention, torch_seconds);
  }
  return rows;
}

}  // namespace

int run_bench_attention(const BenchAttentionOptions& options) {
  if (options.repetitions == 0 || options.threads.empty() ||
      (options.format != "table" && options.format != "json") ||
      options.region_bytes < (std::size_t{256} << 20)) {
    fmt::print(stderr,
               "bench attention: expected repetitions > 0, threads, format table or json and a "
               "region of at least 256 MiB\n");
    return 2;
  }
#ifndef __OPTIMIZE__
  fmt::print(stderr, "warning: built without optimisation; the figures mean nothing\n");
#endif
  Result<Region> region = Region::allocate({.bytes = options.region_bytes});
  if (!region.ok()) {
    fmt::print(stderr, "bench attention: {}\n", region.status().to_string());
    return 1;
  }
  fill_f16(region->bytes());
  const std::unique_ptr<TorchPeer> torch = TorchPeer::start(options.python, options.region_bytes);
  BenchReport report{options, region->stats(), {}, {}};
  if (torch != nullptr) report.torch_version = torch->version();
  for (const BenchShape& shape : kShapes) {
    for (const unsigned threads : options.threads) {
      for (BenchRow& row : measure(shape, threads, options, region->bytes(), torch.get())) {
        report.rows.push_back(std::move(row));
      }
    }
  }
  if (options.format == "json") {
    print_json(report);
  } else {
    print_table(report);
  }
  // Rounding stays below 1e-4 on these shapes (tests/kernels); a wrong block shows in the first
  // digit.
  const bool verified = std::all_of(report.rows.begin(), report.rows.end(),
                                    [](const BenchRow& row) { return row.difference < 1e-3f; });
  if (!verified) fmt::print(stderr, "bench attention: a result differs from the reference\n");
  return verified ? 0 : 4;
}

}  // namespace kvtier
