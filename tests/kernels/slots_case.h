#pragma once

#include "kernels/attend_slots.h"
#include "kernels/partial_attention.h"
#include "tests/kernels/attention_case.h"
#include "tests/kernels/gpu_fixture.h"

#include <string>
#include <vector>

namespace kvtier {

/// One row of the shape table.
struct SlotsShape {
  std::uint32_t head_dim = 128;
  bool values_in_keys = false;
  std::uint32_t sequences = 1;
  std::uint32_t head_groups = 2;
  std::uint32_t heads = 1;  ///< KV heads per block.
  std::uint32_t tokens_per_block = 8;
  std::uint32_t group = 4;
  std::uint32_t queries = 1;
  std::uint32_t ranges = 40;  ///< Of the longest list; others are shorter, one is empty.
  bool ragged = false;        ///< Ranges start and end inside blocks; some are empty.
  bool causal = false;        ///< Query positions that cut into the last tokens.
  float logit_cap = 0.0f;

  std::uint32_t value_dim() const { return values_in_keys ? 512 : head_dim; }
  std::uint32_t tasks() const { return sequences * head_groups; }
  std::uint32_t query_heads() const { return head_groups * heads * group; }
  std::size_t rows() const { return std::size_t{sequences} * queries * query_heads(); }
  std::string describe() const {
    return fmt::format("dim {}{} S {} groups {} H {} T {} G {} Q {} ranges {}{}{} cap {}", head_dim,
                       values_in_keys ? " in one row" : "", sequences, head_groups, heads,
                       tokens_per_block, group, queries, ranges, ragged ? " ragged" : "",
                       causal ? " causal" : "", logit_cap);
  }
};

/// A batch over a slab of random blocks, on the host, with the reference's answer.
/// Keys and values are uniform in [-1, 1], queries in [-3, 3], the scale is 1/sqrt(head_dim).
class SlotsCase {
 public:
  SlotsCase(const SlotsShape& shape, DType dtype, std::uint32_t seed)
      : shape_(shape), layout_(make_layout(shape, dtype)), random_(seed) {
    fill_slab();
    fill_lists();
    fill_queries();
  }

  const SlotsShape& shape() const { return shape_; }
  std::vector<SlotRange>& ranges() { return ranges_; }
  const std::vector<SlotRange>& ranges() const { return ranges_; }
  const std::vector<std::uint32_t>& offsets() const { return offsets_; }
  const std::vector<std::byte>& queries() const { return queries_; }
  const std::vector<std::uint32_t>& positions() const { return positions_; }
  std::vector<std::byte>& slab() { return slab_; }
  std::uint32_t slots() const { return shape_.tasks() * shape_.ranges + 3; }
  std::size_t block_bytes() const {
    return shape_.values_in_keys ? rows_per_block() * layout_.key_row_bytes()
                                 : layout_.block_bytes();
  }

  /// Everything but pointers to device memory.
  AttendSlotsParams params() const {
    AttendSlotsParams params;
    params.slab = {.slots = slots(),
                   .block_bytes = block_bytes(),
                   .dtype = layout_.dtype(),
                   .head_dim = shape_.head_dim,
                   .value_dim = shape_.value_dim(),
                   .values_in_keys = shape_.values_in_keys,
                   .heads_per_block = shape_.heads,
                   .tokens_per_block = shape_.tokens_per_block};
    params.softmax = softmax();
    params.sequences = shape_.sequences;
    params.head_groups = shape_.head_groups;
    params.queries_per_kv_head = shape_.group;
    params.query_count = shape_.queries;
    params.query_stride = std::size_t{shape_.query_heads()} * shape_.head_dim;
    params.sequence_stride = params.query_stride * shape_.queries;
    params.list_ranges_max = shape_.ranges;
    return params;
  }

  AttentionResult reference() const {
    AttentionResult result;
    result.out.resize(shape_.rows() * shape_.value_dim());
    result.lse.resize(shape_.rows());
    const std::vector<std::byte> blocks = blocks_of_layout();
    std::vector<float> queries(queries_.size() / 2);
    for (std::size_t i = 0; i < queries.size(); ++i) {
      queries[i] = load_element(queries_.data(), layout_.dtype(), i);
    }
    for (std::uint32_t t = 0; t < shape_.tasks(); ++t) {
      std::vector<BlockRange> list;
      for (std::uint32_t i = offsets_[t]; i < offsets_[t + 1]; ++i) {
        const SlotRange& r = ranges_[i];
        list.push_back(
            {blocks.data() + r.slot * layout_.block_bytes(), r.first_token, r.tokens, r.position});
      }
      attend_task(t, queries, list, result);
    }
    return result;
  }

  /// What rounding explains, u = 2^-23 (a tensor core may cut where others round): roundings of a
  /// dot of d products add like a random walk, so a logit of about 1 errs by u sqrt(d); eight
  /// standard deviations; a weight errs by twice as much. Weights are carried in two parts of the
  /// slab's type: 2^-17 or 2^-21. Sums over tokens add 64 u.
  float tolerance() const {
    const float u = 0x1p-23f;
    const float parts = layout_.dtype() == DType::kBF16 ? 0x1p-17f : 0x1p-21f;
    return 2.0f * 8.0f * u * std::sqrt(float(shape_.head_dim)) + parts + 64.0f * u;
  }

 private:
  SoftmaxOptions softmax() const {
    return {1.0f / std::sqrt(float(shape_.head_dim)), shape_.logit_cap};
  }
  std::size_t rows_per_block() const { return std::size_t{shape_.heads} * shape_.tokens_per_block; }
  static BlockLayout make_layout(const SlotsShape& shape, DType dtype) {
    BlockShape block;
    block.dtype = dtype;
    block.head_dim = shape.head_dim;
    block.value_dim = shape.value_dim();
    block.kv_heads = shape.heads;
    block.kv_heads_per_block = shape.heads;
    block.tokens_per_block = shape.tokens_per_block;
    block.extent_bytes = std::size_t{4} << 20;
    return BlockLayout::make(block).value();
  }
  float uniform() { return std::uniform_real_distribution<float>(-1.0f, 1.0f)(random_); }

  void fill_slab() {
    slab_.resize(slots() * block_bytes());
    for (std::size_t i = 0; i < slab_.size() / 2; ++i) {
      store_element(slab_.data(), layout_.dtype(), i, uniform());
    }
  }

  /// Blocks as the reference knows them, with values of their own.
  std::vector<std::byte> blocks_of_layout() const {
    if (!shape_.values_in_keys) return slab_;
    std::vector<std::byte> blocks(slots() * layout_.block_bytes());
    for (std::uint32_t s = 0; s < slots(); ++s) {
      const std::byte* from = slab_.data() + s * block_bytes();
      std::byte* to = blocks.data() + s * layout_.block_bytes();
      std::copy_n(from, block_bytes(), to);
      for (std::size_t row = 0; row < rows_per_block(); ++row) {
        std::copy_n(from + row * layout_.key_row_bytes(), layout_.value_row_bytes(),
                    to + layout_.value_offset(0, 0) + row * layout_.value_row_bytes());
      }
    }
    return blocks;
  }

  void fill_lists() {
    std::vector<std::uint32_t> places(slots());
    for (std::uint32_t i = 0; i < slots(); ++i) places[i] = i;
    std::shuffle(places.begin(), places.end(), random_);
    offsets_.push_back(0);
    for (std::uint32_t t = 0; t < shape_.tasks(); ++t) {
      // The first list is the longest; the third is empty.
      const std::uint32_t count = t == 0 ? shape_.ranges : t == 2 ? 0 : random_() % shape_.ranges;
      for (std::uint32_t i = 0; i < count; ++i) ranges_.push_back(range(i, places[ranges_.size()]));
      offsets_.push_back(static_cast<std::uint32_t>(ranges_.size()));
    }
  }
  SlotRange range(std::uint32_t i, std::uint32_t slot) const {
    const std::uint32_t t = shape_.tokens_per_block;
    const std::uint32_t begin = shape_.ragged ? i % t : 0;
    const std::uint32_t tokens = shape_.ragged ? (i * 7) % (t - begin + 1) : t;
    return {slot, i * t + begin, static_cast<std::uint16_t>(begin),
            static_cast<std::uint16_t>(tokens)};
  }

  void fill_queries() {
    queries_.resize(shape_.rows() * shape_.head_dim * 2);
    for (std::size_t i = 0; i < queries_.size() / 2; ++i) {
      store_element(queries_.data(), layout_.dtype(), i, 3.0f * uniform());
    }
    if (!shape_.causal) return;
    const std::uint32_t tokens = shape_.ranges * shape_.tokens_per_block;
    for (std::uint32_t s = 0; s < shape_.sequences; ++s) {
      for (std::uint32_t q = 0; q < shape_.queries; ++q) {
        const std::uint32_t behind = shape_.queries - q + 5 * s;
        positions_.push_back(tokens > behind ? tokens - behind : 0);
      }
    }
  }

  void attend_task(std::uint32_t t, const std::vector<float>& queries,
                   const std::vector<BlockRange>& list, AttentionResult& result) const {
    const std::uint32_t sequence = t / shape_.head_groups;
    const std::size_t head = t % shape_.head_groups * shape_.heads * shape_.group;
    const std::size_t first = std::size_t{sequence} * shape_.queries * shape_.query_heads() + head;
    AttentionTask task;
    task.queries = queries.data() + first * shape_.head_dim;
    task.query_stride = std::size_t{shape_.query_heads()} * shape_.head_dim;
    task.query_count = shape_.queries;
    if (shape_.causal) {
      task.query_positions =
          std::span(positions_).subspan(sequence * shape_.queries, shape_.queries);
    }
    task.blocks = list;
    task.out = result.out.data() + first * shape_.value_dim();
    task.out_stride = std::size_t{shape_.query_heads()} * shape_.value_dim();
    task.lse = result.lse.data() + first;
    task.lse_stride = shape_.query_heads();
    partial_attention_reference({&layout_, shape_.group, softmax()}, task);
  }

  SlotsShape shape_;
  BlockLayout layout_;
  std::mt19937 random_;
  std::vector<std::byte> slab_;
  std::vector<SlotRange> ranges_;
  std::vector<std::uint32_t> offsets_;
  std::vector<std::byte> queries_;
  std::vector<std::uint32_t> positions_;
};

}  // namespace kvtier
