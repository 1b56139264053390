#include "tools/bench_prefill.h"

#include "kernels/partial_attention.h"
#include "memory/check.h"
#include "memory/dtype.h"
#include "memory/region.h"
#include "tools/bench_clock.h"
#include "tools/bench_torch_peer.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>

namespace kvtier {
namespace {

struct PrefillShape {
  std::uint32_t head_dim;
  std::uint32_t group;
  std::uint32_t kv_heads;
  DType dtype;
};

// SmolLM2-135M, and two of the eight KV heads of Llama-3-8B.
constexpr PrefillShape kPrefillShapes[] = {{64, 3, 3, DType::kF32},
                                           {64, 3, 3, DType::kF16},
                                           {128, 4, 2, DType::kF32},
                                           {128, 4, 2, DType::kF16}};

double median(std::vector<double> values) {
  std::ranges::sort(values);
  return values[values.size() / 2];
}

/// One sequence's blocks, and the last queries of it.
class PrefillLoad {
 public:
  PrefillLoad(const PrefillShape& shape, const BenchPrefillOptions& options)
      : shape_(shape), tokens_(options.tokens) {
    BlockShape block;
    block.dtype = shape.dtype;
    block.head_dim = block.value_dim = shape.head_dim;
    block.kv_heads = shape.kv_heads;
    layout_ = std::make_unique<BlockLayout>(BlockLayout::make(block).value());
    heads_ = shape.kv_heads * shape.group;
    for (std::uint32_t i = 0; i < options.queries; ++i) {
      positions_.push_back(options.tokens - options.queries + i);
    }
    queries_.resize(std::size_t{options.queries} * heads_ * shape.head_dim);
    for (std::size_t i = 0; i < queries_.size(); ++i) {
      queries_[i] = static_cast<float>(i * 2654435761u % 1024) / 512.0f - 1.0f;
    }
    out_.resize(queries_.size());
    lse_.resize(std::size_t{options.queries} * heads_);
  }

  Status fill() {
    const std::uint32_t per_block = layout_->tokens_per_block();
    const std::size_t blocks = (tokens_ + per_block - 1) / per_block;
    KVTIER_ASSIGN_OR_RETURN(Region region, Region::allocate({.bytes = blocks * shape_.kv_heads *
                                                                      layout_->block_bytes()}));
    region_ = std::make_unique<Region>(std::move(region));
    const std::span<std::byte> bytes = region_->bytes();
    for (std::size_t i = 0; i < bytes.size() / size_of(shape_.dtype); ++i) {
      store_element(bytes.data(), shape_.dtype, i,
                    static_cast<float>(i * 2246822519u % 1000) / 500.0f - 1.0f);
    }
    for (std::size_t i = 0; i < blocks * shape_.kv_heads; ++i) {
      const auto first = static_cast<std::uint32_t>(i % blocks) * per_block;
      ranges_.push_back({bytes.data() + i * layout_->block_bytes(), 0,
                         std::min(per_block, tokens_ - first), first});
    }
    return {};
  }

  void run(WorkerPool& pool) {
    const Status status = partial_attention(params(), tasks(0), workspace_, pool);
    KVTIER_CHECK(status.ok(), "{}", status.to_string());
  }

  /// Largest difference of the last queries' results from the reference; after `run`.
  float verify() {
    const std::vector<float> out = out_;
    const std::vector<float> lse = lse_;
    const std::size_t queries = std::min<std::size_t>(positions_.size(), 4);
    const std::size_t first = positions_.size() - queries;
    for (const AttentionTask& task : tasks(first)) partial_attention_reference(params(), task);
    float largest = 0.0f;
    for (std::size_t i = first * heads_ * shape_.head_dim; i < out.size(); ++i) {
      largest = std::max(largest, std::abs(out[i] - out_[i]));
    }
    for (std::size_t i = first * heads_; i < lse.size(); ++i) {
      largest = std::max(largest, std::abs(lse[i] - lse_[i]));
    }
    return largest;
  }

  /// Multiplications and additions of both products, over what the mask leaves.
  double operations() const {
    double pairs = 0;
    for (const std::uint32_t position : positions_) pairs += position + 1.0;
    return pairs * heads_ * 4.0 * shape_.head_dim;
  }

 private:
  AttentionParams params() const {
    return {
        layout_.get(), shape_.group, {1.0f / std::sqrt(static_cast<float>(shape_.head_dim)), 0.0f}};
  }

  /// The queries from `first` on.
  std::vector<AttentionTask> tasks(std::size_t first) {
    std::vector<AttentionTask> tasks(shape_.kv_heads);
    const std::size_t blocks = ranges_.size() / shape_.kv_heads;
    for (std::size_t head = 0; head < tasks.size(); ++head) {
      const std::size_t row = first * heads_ + head * shape_.group;
      AttentionTask& task = tasks[head];
      task.queries = queries_.data() + row * shape_.head_dim;
      task.query_stride = task.out_stride = std::size_t{heads_} * shape_.head_dim;
      task.query_count = static_cast<std::uint32_t>(positions_.size() - first);
      task.query_positions = std::span<const std::uint32_t>(positions_).subspan(first);
      task.blocks = std::span<const BlockRange>(ranges_).subspan(head * blocks, blocks);
      task.out = out_.data() + row * shape_.head_dim;
      task.lse = lse_.data() + row;
      task.lse_stride = heads_;
    }
    return tasks;
  }

  PrefillShape shape_;
  std::uint32_t tokens_;
  std::uint32_t heads_ = 0;
  std::unique_ptr<BlockLayout> layout_;
  std::unique_ptr<Region> region_;
  std::vector<BlockRange> ranges_;
  std::vector<std::uint32_t> positions_;
  std::vector<float> queries_;
  std::vector<float> out_;
  std::vector<float> lse_;
  AttentionWorkspace workspace_;
};

/// One line of the table; the largest difference from the reference.
Result<float> measure_prefill(const PrefillShape& shape, unsigned threads,
                              const BenchPrefillOptions& options, TorchPeer* torch) {
  PrefillLoad load(shape, options);
  KVTIER_RETURN_IF_ERROR(load.fill());
  WorkerPool pool(threads);
  load.run(pool);
  const float difference = load.verify();
  std::vector<double> seconds;
  std::vector<double> ratios;
  for (unsigned i = 0; i < options.repetitions; ++i) {
    seconds.push_back(seconds_of([&] { load.run(pool); }));
    if (torch == nullptr) continue;
    const auto peer = torch->seconds({.head_dim = shape.head_dim,
                                      .group = shape.group,
                                      .kv_heads = shape.kv_heads,
                                      .tokens = options.tokens,
                                      .calls = 1,
                                      .threads = threads,
                                      .repetition = i,
                                      .queries = options.queries,
                                      .element_bytes = size_of(shape.dtype)});
    if (peer) ratios.push_back(*peer / seconds.back());
  }
  const double middle = median(seconds);
  const std::string ratio = ratios.empty() ? "-" : fmt::format("{:.2f}", median(ratios));
  fmt::print("{:>4} {:>5} {:>8} {:>5} {:>7} {:>9.1f} {:>9.1f} {:>10} {:>10.1e}\n", shape.head_dim,
             shape.group, shape.kv_heads, to_string(shape.dtype), threads, middle * 1e3,
             load.operations() / middle / 1e9, ratio, difference);
  return difference;
}

}  // namespace

int run_bench_prefill(const BenchPrefillOptions& options) {
  if (options.repetitions == 0 || options.threads.empty() || options.queries <= kMaxStepQueries ||
      options.queries > options.tokens) {
    fmt::print(stderr,
               "bench prefill: expected repetitions, threads, and more queries than {} but no more "
               "than tokens\n",
               kMaxStepQueries);
    return 2;
  }
#ifndef __OPTIMIZE__
  fmt::print(stderr, "warning: built without optimisation; the figures mean nothing\n");
#endif
  const std::unique_ptr<TorchPeer> torch = TorchPeer::start(options.python, std::size_t{256} << 20);
  fmt::print("{} queries over {} tokens, causal; PyTorch: {}, without a mask, its faster way\n",
             options.queries, options.tokens, torch ? torch->version() : "none");
  fmt::print("{:>4} {:>5} {:>8} {:>5} {:>7} {:>9} {:>9} {:>10} {:>10}\n", "dim", "group",
             "KV heads", "dtype", "threads", "ms", "GFLOP/s", "x PyTorch", "difference");
  bool verified = true;
  for (const PrefillShape& shape : kPrefillShapes) {
    for (const unsigned threads : options.threads) {
      const Result<float> difference = measure_prefill(shape, threads, options, torch.get());
      if (!difference.ok()) {
        fmt::print(stderr, "bench prefill: {}\n", difference.status().to_string());
        return 1;
      }
      verified = verified && *difference < 1e-3f;
    }
  }
  if (!verified) fmt::print(stderr, "bench prefill: a result differs from the reference\n");
  return verified ? 0 : 4;
}

}  // namespace kvtier
