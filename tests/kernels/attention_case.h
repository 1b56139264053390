#pragma once

#include "kernels/partial_attention.h"
#include "memory/block_layout.h"
#include "memory/dtype.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

namespace kvtier {

/// One row of the shape table.
struct AttentionShape {
  std::uint32_t head_dim = 64;
  std::uint32_t value_dim = 64;
  std::uint32_t heads = 1;  ///< KV heads per block.
  std::uint32_t tokens_per_block = 8;
  std::uint32_t group = 3;
  std::uint32_t queries = 1;
  std::uint32_t blocks = 9;
  bool ragged = false;  ///< Ranges start and end inside blocks; some are empty.
  bool causal = false;  ///< Query positions that cut into the last tokens.
  float logit_cap = 0.0f;

  std::string describe() const {
    return fmt::format("{}x{} heads {} T {} G {} Q {} blocks {}{}{} cap {}", head_dim, value_dim,
                       heads, tokens_per_block, group, queries, blocks, ragged ? " ragged" : "",
                       causal ? " causal" : "", logit_cap);
  }
};

/// A result of attention over a task: what two implementations are compared by.
struct AttentionResult {
  std::vector<float> out;
  std::vector<float> lse;
};

/// Blocks of random content in shuffled places, random queries, and a task over them.
/// Keys and values are uniform in [-1, 1], queries in [-3, 3], the scale is 1/sqrt(head_dim).
class AttentionCase {
 public:
  AttentionCase(const AttentionShape& shape, DType dtype, std::uint32_t seed)
      : shape_(shape), layout_(make_layout(shape, dtype)), random_(seed) {
    fill_blocks();
    fill_queries();
  }

  const AttentionShape& shape() const { return shape_; }
  const BlockLayout& layout() const { return layout_; }
  AttentionParams params() const {
    return {&layout_, shape_.group, {1.0f / std::sqrt(float(shape_.head_dim)), shape_.logit_cap}};
  }
  std::vector<BlockRange>& ranges() { return ranges_; }
  const std::vector<BlockRange>& ranges() const { return ranges_; }
  std::size_t rows() const { return std::size_t{shape_.queries} * shape_.group * shape_.heads; }

  AttentionTask task(AttentionResult& result) const { return task(result, ranges_); }
  AttentionTask task(AttentionResult& result, std::span<const BlockRange> ranges) const {
    // Garbage first: an element that is not written shows.
    result.out.assign(rows() * shape_.value_dim, 1e30f);
    result.lse.assign(rows(), 1e30f);
    AttentionTask task;
    task.queries = queries_.data();
    task.query_count = shape_.queries;
    task.query_stride = std::size_t{shape_.heads} * shape_.group * shape_.head_dim;
    task.query_positions = positions_;
    task.blocks = ranges;
    task.out = result.out.data();
    task.out_stride = std::size_t{shape_.heads} * shape_.group * shape_.value_dim;
    task.lse = result.lse.data();
    task.lse_stride = std::size_t{shape_.heads} * shape_.group;
    return task;
  }

  AttentionResult reference() const {
    AttentionResult result;
    partial_attention_reference(params(), task(result));
    return result;
  }
  AttentionResult attend(WorkerPool& pool) const { return attend(pool, ranges_); }
  AttentionResult attend(WorkerPool& pool, std::span<const BlockRange> ranges) const {
    AttentionResult result;
    const AttentionTask one = task(result, ranges);
    AttentionWorkspace workspace;
    const Status status = partial_attention(params(), std::span(&one, 1), workspace, pool);
    KVTIER_CHECK(status.ok(), "{}", status.to_string());
    return result;
  }

  /// Largest difference that rounding explains, u = 2^-24.
  ///
  /// A dot of d products, summed in any order, errs by at most d u sum|q k|; with the case's
  /// numbers scale * sum|q k| <= 3 sqrt(d) always, so a logit errs by e = d u 3 sqrt(d), plus 8 u
  /// of the result for scale and exp (and 8 u cap for tanh). Every weight then has the relative
  /// error 2 e, and the mean of values within [-1, 1] errs by as much; so does the lse by e. Sums
  /// of weights and values run over at most 64 tokens per tile and over tiles and chunks, which
  /// adds (64 + tiles) u. Real errors are far smaller, as roundings do not conspire.
  float tolerance() const {
    const double u = 0x1p-24;
    const double d = shape_.head_dim;
    const double tiles = double(shape_.blocks) * shape_.tokens_per_block / kAttentionTileTokens;
    const double logit = u * (d * 3.0 * std::sqrt(d) + 8.0 * (8.0 + double{shape_.logit_cap}));
    return static_cast<float>(2.0 * logit + u * (64.0 + tiles));
  }

 private:
  static BlockLayout make_layout(const AttentionShape& shape, DType dtype) {
    BlockShape block;
    block.dtype = dtype;
    block.head_dim = shape.head_dim;
    block.value_dim = shape.value_dim;
    block.kv_heads = shape.heads;
    block.kv_heads_per_block = shape.heads;
    block.tokens_per_block = shape.tokens_per_block;
    block.extent_bytes = std::size_t{4} << 20;
    return BlockLayout::make(block).value();
  }

  float uniform() { return std::uniform_real_distribution<float>(-1.0f, 1.0f)(random_); }

  void fill_blocks() {
    // Rounded up by one block's alignment, because vectors promise less than 64 bytes.
    storage_.resize(shape_.blocks * layout_.block_bytes() + BlockLayout::kBlockAlignment);
    auto address = reinterpret_cast<std::uintptr_t>(storage_.data());
    const std::size_t pad =
        (BlockLayout::kBlockAlignment - address % BlockLayout::kBlockAlignment) %
        BlockLayout::kBlockAlignment;
    std::byte* first = storage_.data() + pad;
    const std::size_t elements = layout_.payload_bytes() / size_of(layout_.dtype());
    std::vector<std::uint32_t> places(shape_.blocks);
    for (std::uint32_t i = 0; i < shape_.blocks; ++i) places[i] = i;
    std::shuffle(places.begin(), places.end(), random_);
    for (std::uint32_t i = 0; i < shape_.blocks; ++i) {
      std::byte* block = first + places[i] * layout_.block_bytes();
      for (std::size_t e = 0; e < elements; ++e)
        store_element(block, layout_.dtype(), e, uniform());
      const std::uint32_t t = shape_.tokens_per_block;
      const std::uint32_t begin = shape_.ragged ? i % t : 0;
      const std::uint32_t tokens = shape_.ragged ? (i * 7) % (t - begin + 1) : t;
      ranges_.push_back({block, begin, tokens, i * t + begin});
    }
  }

  void fill_queries() {
    queries_.resize(rows() * shape_.head_dim);
    for (float& q : queries_) q = 3.0f * uniform();
    if (!shape_.causal) return;
    const std::uint32_t tokens = shape_.blocks * shape_.tokens_per_block;
    for (std::uint32_t q = 0; q < shape_.queries; ++q) {
      // The last query sees everything, each one before sees one token less.
      const std::uint32_t behind = shape_.queries - q;
      positions_.push_back(tokens > behind ? tokens - behind : 0);
    }
  }

  AttentionShape shape_;
  BlockLayout layout_;
  std::mt19937 random_;
  std::vector<std::byte> storage_;
  std::vector<BlockRange> ranges_;
  std::vector<float> queries_;
  std::vector<std::uint32_t> positions_;
};

/// Largest difference of out and lse; infinity where only one of two lse is empty, and where a
/// number is none: no bound holds for either.
inline float largest_difference(const AttentionResult& a, const AttentionResult& b) {
  float largest = 0.0f;
  const auto compare = [&largest](const std::vector<float>& x, const std::vector<float>& y) {
    for (std::size_t i = 0; i < x.size(); ++i) {
      if (x[i] == y[i]) continue;
      const float difference = std::abs(x[i] - y[i]);
      largest = std::isnan(difference) ? std::numeric_limits<float>::infinity()
                                       : std::max(largest, difference);
    }
  };
  compare(a.out, b.out);
  compare(a.lse, b.lse);
  return largest;
}

}  // namespace kvtier
