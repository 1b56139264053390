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

}  // namespace kvtier
