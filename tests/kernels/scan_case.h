#pragma once

#include "kernels/choose_cells.h"
#include "kernels/code_runs.h"
#include "kernels/scan_codes.h"
#include "memory/dtype.h"
#include "tests/kernels/gpu_fixture.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

namespace kvtier {

/// One row of the shape table.
struct ScanCaseShape {
  DType dtype = DType::kBF16;
  std::uint32_t dim = 128;
  std::uint32_t sequences = 1;
  std::uint32_t heads = 2;
  std::uint32_t group = 4;
  std::uint32_t tokens_per_block = 8;
  std::uint32_t runs = 5;  ///< Of the longest sequence; others are shorter, one has none.
  std::uint32_t sinks = 8;
  float spread = 1.0f;  ///< Of keys.
  float logit_cap = 0.0f;

  std::uint32_t lists() const { return sequences * heads; }
  std::uint32_t blocks_per_run() const { return 64 / tokens_per_block; }
  std::uint32_t cells_max() const { return runs * blocks_per_run(); }
  std::uint32_t run_count(std::uint32_t sequence) const {
    return sequence == 0 ? runs : sequence == 1 ? 0 : 1 + sequence * 7 % runs;
  }
  std::string describe() const {
    return fmt::format("{} dim {} S {} heads {} G {} T {} runs {} sinks {} spread {} cap {}",
                       to_string(dtype), dim, sequences, heads, group, tokens_per_block, runs,
                       sinks, spread, logit_cap);
  }
};

/// Random blocks of all lists in one slab, list after list in the order of tokens, and queries.
/// Channels differ in size and mean, as keys' channels do.
class ScanCase {
 public:
  ScanCase(const ScanCaseShape& shape, std::uint32_t seed) : shape_(shape), random_(seed) {
    std::normal_distribution<float> normal;
    std::vector<float> sizes(shape.dim);
    std::vector<float> means(shape.dim);
    for (std::uint32_t i = 0; i < shape.dim; ++i) {
      sizes[i] = 0.2f + std::abs(normal(random_));
      means[i] = 2.0f * normal(random_);
    }
    slab_.resize(slots() * block_bytes());
    for (std::size_t i = 0; i < slab_.size() / 2; ++i) {
      const std::uint32_t channel = static_cast<std::uint32_t>(i % shape.dim);
      const float x = shape.spread * (means[channel] + sizes[channel] * normal(random_));
      store_element(slab_.data(), shape.dtype, i, x);
    }
    queries_.resize(std::size_t{shape.lists()} * shape.group * shape.dim * 2);
    for (std::size_t i = 0; i < queries_.size() / 2; ++i) {
      store_element(queries_.data(), shape.dtype, i, 0.7f * normal(random_));
    }
  }

  const ScanCaseShape& shape() const { return shape_; }
  std::vector<std::byte>& slab() { return slab_; }
  const std::vector<std::byte>& queries() const { return queries_; }
  std::size_t block_bytes() const { return std::size_t{shape_.tokens_per_block} * shape_.dim * 4; }
  std::size_t slots() const { return std::size_t{shape_.lists()} * shape_.cells_max(); }
  SoftmaxOptions softmax() const { return {1.0f / std::sqrt(float(shape_.dim)), shape_.logit_cap}; }
  DeviceCodes layout() const { return {shape_.dim, shape_.dtype}; }
  KeyCodes key_codes() const { return {.bits = 4, .dim = shape_.dim, .dtype = shape_.dtype}; }

  /// 64 rows of keys, or of values, of one run.
  std::vector<std::byte> rows(std::uint32_t list, std::uint32_t run, bool values) const {
    const std::size_t row = std::size_t{shape_.dim} * 2;
    std::vector<std::byte> result(64 * row);
    for (std::uint32_t t = 0; t < 64; ++t) {
      const std::size_t block = (std::size_t{list} * shape_.runs + run) * shape_.blocks_per_run() +
                                t / shape_.tokens_per_block;
      const std::size_t in_block =
          (t % shape_.tokens_per_block + (values ? shape_.tokens_per_block : 0)) * row;
      std::copy_n(slab_.data() + block * block_bytes() + in_block, row, result.data() + t * row);
    }
    return result;
  }

  std::uint32_t skip(std::uint32_t run) const { return run == 0 ? shape_.sinks : 0; }

  /// The run's codes as the CPU makes them.
  std::vector<CodeLine> cpu_codes(std::uint32_t list, std::uint32_t run) const {
    const std::vector<std::byte> keys = rows(list, run, false);
    std::vector<CodeLine> lines(key_codes().run_lines());
    quantise_run(key_codes(),
                 {keys.data(), 64, shape_.dim, std::size_t{shape_.dim} * 2, shape_.dtype},
                 skip(run), lines.data());
    return lines;
  }

  /// Means of a run's values in float64.
  std::vector<float> mean_values(std::uint32_t list, std::uint32_t run) const {
    const std::vector<std::byte> values = rows(list, run, true);
    std::vector<float> means(shape_.dim);
    for (std::uint32_t i = 0; i < shape_.dim && skip(run) < 64; ++i) {
      double sum = 0.0;
      for (std::uint32_t t = skip(run); t < 64; ++t) {
        sum += double{load_element(values.data(), shape_.dtype, std::size_t{t} * shape_.dim + i)};
      }
      means[i] = static_cast<float>(sum / (64 - skip(run)));
    }
    return means;
  }

  std::vector<float> list_queries(std::uint32_t list) const {
    std::vector<float> result(std::size_t{shape_.group} * shape_.dim);
    for (std::size_t i = 0; i < result.size(); ++i) {
      result[i] = load_element(queries_.data(), shape_.dtype, list * result.size() + i);
    }
    return result;
  }

 private:
  ScanCaseShape shape_;
  std::mt19937 random_;
  std::vector<std::byte> slab_;
  std::vector<std::byte> queries_;
};

/// A case on the GPU: its blocks, the memory of a scan, and the launchers' parameters.
class ScanOnGpu {
 public:
  ScanOnGpu(const Gpu& gpu, StreamRef stream, ScanCase& c) : case_(c), gpu_(gpu), stream_(stream) {
    const ScanCaseShape& shape = c.shape();
    const std::size_t lists = shape.lists();
    const std::size_t runs = lists * shape.runs;
    const std::size_t rows = lists * shape.group;
    slab_.emplace(upload(std::span<const std::byte>(c.slab())));
    queries_.emplace(upload(std::span<const std::byte>(c.queries())));
    std::vector<CodeRunJob> jobs;
    std::vector<std::uint32_t> slots;
    for (std::uint32_t list = 0; list < lists; ++list) {
      for (std::uint32_t run = 0; run < shape.runs; ++run) jobs.push_back({list, run});
    }
    for (std::uint32_t slot = 0; slot < c.slots(); ++slot) slots.push_back(slot);
    std::vector<std::uint32_t> counts;
    for (std::uint32_t s = 0; s < shape.sequences; ++s) counts.push_back(shape.run_count(s));
    jobs_.emplace(upload(std::as_bytes(std::span(jobs))));
    slots_.emplace(upload(std::as_bytes(std::span(slots))));
    counts_.emplace(upload(std::as_bytes(std::span(counts))));

    code.slab = {.blocks = slab_->data(),
                 .slots = static_cast<std::uint32_t>(c.slots()),
                 .block_bytes = c.block_bytes(),
                 .dtype = shape.dtype,
                 .head_dim = shape.dim,
                 .value_dim = shape.dim,
                 .tokens_per_block = shape.tokens_per_block};
    code.jobs = jobs_->as<CodeRunJob>();
    code.slots = slots_->as<std::uint32_t>();
    code.job_count = static_cast<std::uint32_t>(jobs.size());
    code.sinks = shape.sinks;
    code.lists = shape.lists();
    code.runs_max = shape.runs;
    code.codes = take<std::byte>(codes_, runs * c.layout().run_bytes());
    code.value_means = take<std::byte>(means_, runs * shape.dim * 2);

    scan.codes = c.layout();
    scan.runs = code.codes;
    scan.value_means = code.value_means;
    scan.value_dim = shape.dim;
    scan.lists = shape.lists();
    scan.lists_per_sequence = shape.heads;
    scan.runs_max = shape.runs;
    scan.run_counts = counts_->as<std::uint32_t>();
    scan.sinks = shape.sinks;
    scan.tokens_per_cell = shape.tokens_per_block;
    scan.group = shape.group;
    scan.queries = queries_->data();
    scan.softmax = c.softmax();
    ScanWeights& weights = scan.weights;
    weights.cells = take<float>(cells_, rows * shape.cells_max());
    weights.tops = take<float>(tops_, runs * shape.group);
    weights.sums = take<float>(sums_, runs * shape.group);
    weights.part_lse2 = take<float>(part_lse2_, rows * scan_parts(gpu, scan));
    weights.lse2 = take<float>(lse2_, rows);
    weights.scores = take<float>(scores_, lists * shape.cells_max());
    weights.bins = take<std::uint32_t>(bins_, lists * kScoreBins);
    weights.touched = take<std::uint8_t>(touched_, runs);
    weights.rest = take<float>(rest_, rows * rest_parts(gpu, scan) * (shape.dim + 4));
    rest.out = take<float>(rest_out_, rows * shape.dim);
    rest.lse = take<float>(rest_lse_, rows);
  }

  void set_near_lse(const std::vector<float>& lse) {
    near_.emplace(upload(std::as_bytes(std::span(lse))));
    scan.near_lse = near_->as<float>();
  }
  ChooseCellsParams choice(std::uint32_t k) {
    ChooseCellsParams params;
    params.k = k;
    params.chosen = take<std::uint32_t>(chosen_, std::size_t{k} * scan.lists);
    params.workspace = take<std::byte>(workspace_, choose_cells_workspace_bytes(gpu_, scan));
    return params;
  }
  template <typename T>
  std::vector<T> read(const T* from, std::size_t count) const {
    std::vector<T> values(count);
    const CudaError error =
        gpu_.calls().copy(values.data(), from, count * sizeof(T), stream_.get());
    KVTIER_CHECK(error == 0 && gpu_.synchronize(stream_).ok(), "reading back failed: {}", error);
    return values;
  }

  CodeRunsParams code;
  ScanParams scan;
  ScanRestParams rest;

 private:
  DeviceBuffer upload(std::span<const std::byte> bytes) const {
    DeviceBuffer buffer = DeviceBuffer::allocate(gpu_, bytes.size(), stream_).value();
    KVTIER_CHECK(buffer.upload(bytes).ok() && gpu_.synchronize(stream_).ok(), "no upload");
    return buffer;
  }
  /// Filled with 0xEE: what is read before it is written shows.
  template <typename T>
  T* take(std::optional<DeviceBuffer>& buffer, std::size_t count) {
    buffer.reset();
    buffer.emplace(DeviceBuffer::allocate(gpu_, count * sizeof(T), stream_).value());
    KVTIER_CHECK(buffer->fill(0xEE).ok(), "no fill");
    return buffer->as<T>();
  }

  ScanCase& case_;
  const Gpu& gpu_;
  StreamRef stream_;
  std::optional<DeviceBuffer> slab_, queries_, jobs_, slots_, counts_, codes_, means_, cells_,
      tops_, sums_, part_lse2_, lse2_, scores_, bins_, touched_, rest_, rest_out_, rest_lse_, near_,
      chosen_, workspace_;
};

}  // namespace kvtier
