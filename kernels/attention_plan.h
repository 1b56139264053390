#pragma once

#include "kernels/partial_attention.h"
#include "memory/block_layout.h"

#include <cstddef>
#include <cstdint>
#include <span>

// Private to partial_attention: what its planning hands to the loops of each instruction set.

namespace kvtier {

/// Rows of queries and accumulators are padded to this many floats: one line, the widest vector.
inline constexpr std::size_t kRowPadding = 16;
constexpr std::size_t padded_dim(std::size_t dim) {
  return (dim + kRowPadding - 1) / kRowPadding * kRowPadding;
}

/// One chunk of one task in one KV head, and where its result goes. Row `q * G + g` is query q in
/// query head g of the KV head. Everything it points to lies in the workspace or in the task.
struct AttentionChunk {
  const AttentionTask* task = nullptr;
  /// First range with a token of this chunk, and how many of its tokens the chunk before took.
  const BlockRange* first_range = nullptr;
  std::uint32_t skip = 0;
  std::uint32_t tokens = 0;
  std::uint32_t head = 0;
  std::uint32_t rows = 0;
  const float* queries = nullptr;  ///< [rows, padded_dim(head_dim)], 64-byte aligned.
  float* weighted = nullptr;       ///< [rows, padded_dim(value_dim)]: sum of weight * value.
  float* max = nullptr;            ///< [rows]: largest logit.
  float* sum = nullptr;            ///< [rows]: sum of exp(logit - max).
};

/// Chunks that one worker attends one after another, in this order.
struct AttentionRun {
  const BlockLayout* layout = nullptr;
  std::uint32_t queries_per_kv_head = 1;
  SoftmaxOptions softmax;
  std::span<const AttentionChunk> chunks;
};

/// Folds the chunks of one (task, KV head) in order into the task's out and lse.
struct AttentionFold {
  std::span<const AttentionChunk> chunks;
  std::uint32_t queries_per_kv_head = 1;
  std::uint32_t value_dim = 0;
};

// Chosen by instruction set, in attend_chunks_cpu.cc.
void attend_chunks(const AttentionRun& run);
void fold_chunks(const AttentionFold& fold);

/// Rows that convert each key and value once between them. More share a conversion better, fewer
/// stay in the level-2 cache with their accumulators: 256 rows of 64 floats are 64 KiB each.
inline constexpr std::uint32_t kManyRows = 256;

/// Consecutive rows of one task of many queries in one KV head: what a worker takes. Row
/// `q * G + g` is query q in query head g of the KV head.
struct ManyRows {
  const AttentionTask* task = nullptr;
  std::uint32_t head = 0;
  std::uint32_t first_row = 0;
  std::uint32_t rows = 0;  ///< At most `kManyRows`.
};

struct ManyRun {
  const BlockLayout* layout = nullptr;
  std::uint32_t queries_per_kv_head = 1;
  SoftmaxOptions softmax;
};

// Chosen by instruction set, in attend_many_cpu.cc. Attends all of the task's tokens and writes the
// rows' out and lse. `scratch` has `many_scratch_floats`, 64-byte aligned.
void attend_many(const ManyRun& run, const ManyRows& rows, float* scratch);

/// Rows whose logits of one tile are made, weighed and used while they are in the level-1 cache.
inline constexpr std::size_t kManyLogitRows = 24;

/// Queries and what they gather, maxima and sums, a tile of keys and one of values, and logits.
inline std::size_t many_scratch_floats(const BlockLayout& layout) {
  const std::size_t dims = padded_dim(layout.head_dim()) + padded_dim(layout.value_dim());
  return dims * (kManyRows + kAttentionTileTokens) + 2 * kManyRows +
         kManyLogitRows * kAttentionTileTokens;
}

}  // namespace kvtier
