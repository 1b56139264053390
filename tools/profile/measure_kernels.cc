#include "kernels/checksum.h"
#include "kernels/partial_attention.h"
#include "memory/dtype.h"
#include "memory/region.h"
#include "selectors/registry.h"
#include "tools/profile/measure.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <random>
#include <span>
#include <utility>

namespace kvtier {

namespace {

constexpr std::uint32_t kProfileBlockTokens = 8;
constexpr std::uint32_t kSelectTokens = 32768;
constexpr std::uint32_t kSelectHeads = 2;
constexpr std::uint32_t kSelectGroup = 4;
constexpr const char* kSelectors[] = {"scan", "scan(bits=2)", "mean", "minmax"};

void fill_halves(std::span<std::byte> bytes) {
  std::mt19937 random(1);
  std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
  for (std::size_t i = 0; i < bytes.size() / 2; ++i) {
    if (i < (1u << 19)) {
      store_element(bytes.data(), DType::kF16, i, uniform(random));
    } else {
      bytes[2 * i] = bytes[2 * i - (1u << 20)];
      bytes[2 * i + 1] = bytes[2 * i + 1 - (1u << 20)];
    }
  }
}

/// One call of the attention kernel over blocks in address order, of one KV head after another.
class AttentionCall {
 public:
  AttentionCall(std::span<const std::byte> region, std::uint32_t dim, std::uint32_t group,
                std::uint32_t queries, std::size_t call_bytes)
      : layout_(make_layout(dim)), group_(group), queries_(queries) {
    const std::size_t blocks = std::max<std::size_t>(1, call_bytes / layout_.block_bytes());
    for (std::size_t i = 0; i < region.size() / layout_.block_bytes(); ++i) {
      ranges_.push_back({region.data() + i * layout_.block_bytes(), 0, kProfileBlockTokens, 0});
    }
    blocks_ = std::min(blocks, ranges_.size());
    rows_.resize(std::size_t{group} * queries * dim);
    for (std::size_t i = 0; i < rows_.size(); ++i) rows_[i] = float(i % 13) / 6.0f - 1.0f;
    out_.resize(rows_.size());
    lse_.resize(std::size_t{group} * queries);
  }

  double bytes() const { return static_cast<double>(blocks_ * layout_.block_bytes()); }
  /// Multiplications and additions of a call.
  double operations() const {
    return 2.0 * double(blocks_ * kProfileBlockTokens) * double(group_ * queries_) *
           (layout_.head_dim() + layout_.value_dim());
  }

  /// Each call takes the next part of the region, as long as there is one.
  void run(WorkerPool& pool) {
    at_ = (at_ + 1) % (ranges_.size() / blocks_);
    call(std::span(ranges_).subspan(at_ * blocks_, blocks_), pool);
  }

  Status verify(WorkerPool& pool) {
    const auto blocks = std::span(ranges_).first(std::min<std::size_t>(blocks_, 64));
    call(blocks, pool);
    const std::vector<float> out = out_;
    partial_attention_reference(params(), task(blocks));
    float difference = 0;
    for (std::size_t i = 0; i < out.size(); ++i) {
      difference = std::max(difference, std::abs(out[i] - out_[i]));
    }
    if (difference < 1e-3f) return {};
    return corrupt(fmt::format("kernel.attention: a result is {} from the reference", difference));
  }

 private:
  static BlockLayout make_layout(std::uint32_t dim) {
    BlockShape shape;
    shape.head_dim = shape.value_dim = dim;
    shape.tokens_per_block = kProfileBlockTokens;
    return BlockLayout::make(shape).value();
  }

  AttentionParams params() const {
    return {&layout_, group_, {1.0f / std::sqrt(float(layout_.head_dim())), 0.0f}};
  }

  AttentionTask task(std::span<const BlockRange> blocks) {
    AttentionTask one;
    one.queries = rows_.data();
    one.query_stride = std::size_t{group_} * layout_.head_dim();
    one.query_count = queries_;
    one.blocks = blocks;
    one.out = out_.data();
    one.out_stride = one.query_stride;
    one.lse = lse_.data();
    one.lse_stride = group_;
    return one;
  }

  void call(std::span<const BlockRange> blocks, WorkerPool& pool) {
    const AttentionTask one = task(blocks);
    const Status status = partial_attention(params(), std::span(&one, 1), workspace_, pool);
    KVTIER_CHECK(status.ok(), "{}", status.to_string());
  }

  BlockLayout layout_;
  std::uint32_t group_;
  std::uint32_t queries_;
  std::vector<BlockRange> ranges_;
  std::size_t blocks_ = 0;
  std::size_t at_ = 0;
  std::vector<float> rows_;
  std::vector<float> out_;
  std::vector<float> lse_;
  AttentionWorkspace workspace_;
};

Status measure_attention(ProfileRun& run, std::span<const std::byte> region) {
  for (const std::uint32_t dim : {64u, 128u}) {
    for (const std::size_t call_bytes :
         {std::size_t{1} << 20, std::size_t{8} << 20, std::size_t{64} << 20}) {
      if (call_bytes > region.size()) continue;
      AttentionCall call(region, dim, 4, 1, call_bytes);
      KVTIER_RETURN_IF_ERROR(call.verify(run.pool()));
      run.rate({.name = "kernel.attention",
                .parameters = {{"head_dim", double(dim)},
                               {"group", 4.0},
                               {"call_bytes", call.bytes()},
                               {"threads", double(run.pool().threads())}},
                .unit = "bytes_per_s",
                .note = "float16, one query, blocks in address order, compared with float64"},
               call.bytes(), [&] { call.run(run.pool()); });
    }
  }
  // As many rows as the kernel takes over blocks that stay in the cache: as near to a product of
  // matrices as this library comes, since it never computes the rest of a prefill.
  AttentionCall dense(region.first(std::size_t{1} << 20), 128, kMaxGroupQueries, kMaxStepQueries,
                      std::size_t{1} << 19);
  KVTIER_RETURN_IF_ERROR(dense.verify(run.pool()));
  run.rate({.name = "gemm",
            .parameters = {{"method", std::string("attention kernel")},
                           {"threads", double(run.pool().threads())}},
            .unit = "flop_per_s",
            .note = "a stand-in: 128 query rows attend 1024 cached tokens of 128 + 128, float16 "
                    "with float32 sums; a tuned matrix product is faster"},
           dense.operations(), [&] { dense.run(run.pool()); });
  return {};
}

Status measure_selector(ProfileRun& run, const char* name, std::uint32_t dim,
                        std::span<const std::byte> rows) {
  const ProfileEntry entry{.name = "kernel.select",
                           .parameters = {{"selector", std::string(name)},
                                          {"tokens", double(kSelectTokens)},
                                          {"head_dim", double(dim)},
                                          {"group", double(kSelectGroup)},
                                          {"threads", double(run.pool().threads())}},
                           .unit = "head_tokens_per_s",
                           .note =
                               "a step at a budget of 2 %, made-up keys, estimates of the rest "
                               "not included"};
  KVTIER_ASSIGN_OR_RETURN(const SelectorFactory factory, make_selector_factory(name));
  SelectorShape shape;
  shape.kv_heads = kSelectHeads;
  shape.queries_per_kv_head = kSelectGroup;
  shape.head_dim = shape.value_dim = dim;
  shape.tokens_per_block = kProfileBlockTokens;
  shape.softmax.scale = 1.0f / std::sqrt(float(dim));
  shape.tokens_max = kSelectTokens;
  KVTIER_ASSIGN_OR_RETURN(const auto selector, factory(shape, LayerIndex{0}));
  run.show(entry.name);
  const std::size_t row = dim * 2;
  const std::size_t token = kSelectHeads * row;
  const std::uint32_t chunk = 2048;
  for (std::uint32_t t = 0; t < kSelectTokens; t += chunk) {
    selector->append({.first_position = t,
                      .tokens = chunk,
                      .keys = rows.data() + t * token,
                      .key_token_stride = token,
                      .key_head_stride = row,
                      .values = rows.data() + t * token,
                      .value_token_stride = token,
                      .value_head_stride = row});
  }
  std::vector<float> queries(std::size_t{kSelectHeads} * kSelectGroup * dim);
  for (std::size_t i = 0; i < queries.size(); ++i) queries[i] = float(i % 17) / 8.0f - 1.0f;
  std::vector<GroupSelection> selection(shape.head_groups());
  Status status;
  run.rate(entry, double(kSelectTokens) * kSelectHeads, [&] {
    const SelectRequest request{.queries = queries.data(),
                                .query_stride = queries.size(),
                                .first_position = kSelectTokens - 1,
                                .budget_tokens = kSelectTokens / 50};
    const Status step = selector->select(request, selection, run.pool());
    if (!step.ok()) status = step;
  });
  return status;
}

void measure_checksums(ProfileRun& run, std::span<const std::byte> region) {
  for (const std::size_t block : {std::size_t{2048}, std::size_t{131072}}) {
    std::uint64_t sum = 0;
    run.rate({.name = "kernel.checksum",
              .parameters = {{"block_bytes", double(block)}, {"threads", 1.0}},
              .unit = "bytes_per_s",
              .note = "XXH3-64 of blocks in address order"},
             double(region.size() / block * block), [&] {
               for (std::size_t at = 0; at + block <= region.size(); at += block) {
                 sum ^= seeded_checksum(region.subspan(at, block), at);
               }
               [[maybe_unused]] volatile std::uint64_t sink = sum;
             });
  }
}

}  // namespace

Status measure_kernels(ProfileRun& run) {
  const std::size_t bytes = std::min<std::size_t>(run.memory_bytes(), std::size_t{256} << 20);
  auto region = Region::allocate({.bytes = bytes});
  if (!region.ok()) {
    for (const char* name : {"kernel.checksum", "kernel.attention", "kernel.select", "gemm"}) {
      run.waive(name, {}, region.status().message());
    }
    return {};
  }
  fill_halves(region->bytes());
  measure_checksums(run, region->bytes().first(std::size_t{32} << 20));
  KVTIER_RETURN_IF_ERROR(measure_attention(run, region->bytes()));
  for (const char* name : kSelectors) {
    for (const std::uint32_t dim : {64u, 128u}) {
      KVTIER_RETURN_IF_ERROR(measure_selector(run, name, dim, region->bytes()));
    }
  }
  return {};
}

}  // namespace kvtier
