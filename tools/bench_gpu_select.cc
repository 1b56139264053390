#include "kernels/read_bytes.h"
#include "kernels/score_rows.h"
#include "kernels/top_k.h"
#include "memory/dtype.h"
#include "tools/bench_gpu.h"

#include <fmt/format.h>

#include <algorithm>
#include <random>

namespace kvtier {
namespace {

constexpr std::uint32_t kDim = 128;
constexpr std::uint32_t kKvHeads = 8;
constexpr std::uint32_t kGroup = 4;
constexpr std::size_t kColdBytes = std::size_t{512} << 20;

struct Case {
  std::uint32_t tokens;           ///< Of context.
  std::uint32_t tokens_per_unit;  ///< Of a landmark, or of a candidate.
  std::uint32_t k;

  std::uint32_t units() const { return tokens / tokens_per_unit; }
};
constexpr Case kCases[] = {{131072, 16, 512},  {131072, 8, 256},  {131072, 1, 2048},
                           {1048576, 16, 512}, {1048576, 8, 256}, {1048576, 1, 2048}};

/// Random rows and scores on the GPU, and the works over them.
class SelectBench {
 public:
  SelectBench(const GpuBench& bench, DeviceBuffer rows, DeviceBuffer queries, DeviceBuffer logits,
              DeviceBuffer scores, DeviceBuffer picked)
      : bench_(bench),
        rows_(std::move(rows)),
        queries_(std::move(queries)),
        logits_(std::move(logits)),
        scores_(std::move(scores)),
        picked_(std::move(picked)) {}

  Status score(const Case& c) const {
    return score_rows(bench_.gpu(),
                      {.rows = rows_.data(),
                       .task_stride_bytes = std::size_t{c.units()} * kDim * 2,
                       .row_stride_bytes = kDim * 2,
                       .dim = kDim,
                       .tasks = kKvHeads,
                       .rows_max = c.units(),
                       .queries = queries_.data(),
                       .query_count = kGroup,
                       .softmax = {0.0884f, 0.0f},
                       .logits = logits_.as<float>(),
                       .logit_stride = c.units()},
                      bench_.stream());
  }

  TopKParams choice(const Case& c) const {
    return {.scores = scores_.as<float>(),
            .stride = c.units(),
            .lists = kKvHeads,
            .count_max = c.units(),
            .k = c.k,
            .indices = picked_.as<std::uint32_t>()};
  }

  /// Everything else out of the L2 cache.
  Status cool() const {
    return read_bytes(bench_.gpu(), {rows_.data(), kColdBytes}, logits_.as<std::uint64_t>(),
                      bench_.stream());
  }

  /// True if the first head's choice is that of the CPU.
  Result<bool> verify(const Case& c) const {
    std::vector<float> scores(c.units());
    std::vector<std::uint32_t> picked(c.k);
    KVTIER_RETURN_IF_ERROR(scores_.download(std::as_writable_bytes(std::span(scores))));
    KVTIER_RETURN_IF_ERROR(picked_.download(std::as_writable_bytes(std::span(picked))));
    KVTIER_RETURN_IF_ERROR(bench_.wait());
    std::vector<std::uint32_t> order(scores.size());
    const auto expected = kvtier::top_k(scores, c.k, order);
    return std::equal(expected.begin(), expected.end(), picked.begin(), picked.end());
  }

 private:
  const GpuBench& bench_;
  DeviceBuffer rows_;
  DeviceBuffer queries_;
  DeviceBuffer logits_;
  DeviceBuffer scores_;
  DeviceBuffer picked_;
};

Result<DeviceBuffer> upload_random(const GpuBench& bench, std::size_t bytes, DType dtype) {
  KVTIER_ASSIGN_OR_RETURN(DeviceBuffer buffer,
                          DeviceBuffer::allocate(bench.gpu(), bytes, bench.stream()));
  std::mt19937 random(dtype == DType::kF32 ? 1 : 2);
  std::vector<std::byte> piece(std::min(bytes, std::size_t{32} << 20));
  for (std::size_t i = 0; i < piece.size() / size_of(dtype); ++i) {
    store_element(piece.data(), dtype, i, float(random() % 65536) / 32768.0f - 1.0f);
  }
  for (std::size_t at = 0; at < bytes; at += piece.size()) {
    KVTIER_RETURN_IF_ERROR(
        buffer.upload(std::span(piece).first(std::min(piece.size(), bytes - at)), at));
  }
  KVTIER_RETURN_IF_ERROR(bench.wait());
  return buffer;
}

Result<int> run(const GpuBenchOptions& options) {
  if (options.repetitions == 0) return invalid_argument("expected repetitions > 0");
  KVTIER_ASSIGN_OR_RETURN(const GpuBench bench, GpuBench::open());
  const std::size_t rows_bytes = std::size_t{1048576} * kKvHeads * kDim * 2;
  const std::size_t scores_bytes = std::size_t{1048576} * kKvHeads * 4;
  KVTIER_ASSIGN_OR_RETURN(DeviceBuffer rows, upload_random(bench, rows_bytes, DType::kBF16));
  KVTIER_ASSIGN_OR_RETURN(DeviceBuffer queries,
                          upload_random(bench, kKvHeads * kGroup * kDim * 2, DType::kBF16));
  KVTIER_ASSIGN_OR_RETURN(DeviceBuffer logits,
                          upload_random(bench, scores_bytes * kGroup, DType::kF32));
  KVTIER_ASSIGN_OR_RETURN(DeviceBuffer scores, upload_random(bench, scores_bytes, DType::kF32));
  KVTIER_ASSIGN_OR_RETURN(
      DeviceBuffer picked,
      DeviceBuffer::allocate(bench.gpu(), kKvHeads * kMaxTopK * 4, bench.stream()));
  const SelectBench select(bench, std::move(rows), std::move(queries), std::move(logits),
                           std::move(scores), std::move(picked));
  nlohmann::ordered_json result = nlohmann::ordered_json::array();
  bool verified = true;
  for (const Case& c : kCases) {
    TopKParams params = select.choice(c);
    KVTIER_ASSIGN_OR_RETURN(
        const DeviceBuffer workspace,
        DeviceBuffer::allocate(bench.gpu(), top_k_workspace_bytes(bench.gpu(), params),
                               bench.stream()));
    params.workspace = workspace.data();
    KVTIER_ASSIGN_OR_RETURN(const GpuGraph graph,
                            GpuGraph::capture(bench.gpu(), bench.stream(), [&] {
                              return top_k(bench.gpu(), params, bench.stream());
                            }));
    const std::function<Status()> works[] = {
        [&] { return select.cool(); }, [&] { return select.score(c); },
        [&] { return select.cool(); }, [&] { return graph.launch(bench.stream()); }};
    KVTIER_ASSIGN_OR_RETURN(const auto times, bench.measure(works, options.repetitions));
    KVTIER_ASSIGN_OR_RETURN(const bool same, select.verify(c));
    verified &= same;
    const double read_rate = double(kColdBytes) / times[0].median / 1e3;
    const double row_bytes = double(c.units()) * kKvHeads * kDim * 2;
    nlohmann::ordered_json row;
    row["context"] = c.tokens;
    row["tokens_per_unit"] = c.tokens_per_unit;
    row["MB"] = row_bytes / 1e6;
    row["score_us"] = times[1].median;
    row["score_most_us"] = times[1].most;
    row["bytes/HBM_us"] = row_bytes / read_rate / 1e3;
    row["read_GB/s"] = read_rate;
    row["k"] = c.k;
    row["top_k_us"] = times[3].median;
    row["top_k_most_us"] = times[3].most;
    result.push_back(std::move(row));
  }
  nlohmann::ordered_json machine = bench.machine();
  machine["shape"] = "bfloat16, 8 KV heads x 128, 32 query heads; L2 cold";
  print_gpu_report(options, "bench-select", machine, result);
  if (!verified) fmt::print(stderr, "bench gpu-select: a choice differs from the CPU's\n");
  return verified ? 0 : 4;
}

}  // namespace

int run_bench_gpu_select(const GpuBenchOptions& options) {
  const Result<int> code = run(options);
  return code.ok() ? *code : gpu_bench_failure("bench gpu-select", code.status());
}

}  // namespace kvtier
