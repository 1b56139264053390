#pragma once

#include "memory/block_layout.h"

#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>

namespace kvtier {

/// "Nothing was attended": the log-sum-exp of an empty set. Merging with it changes nothing.
inline constexpr float kEmptyLse = -std::numeric_limits<float>::infinity();

/// Tokens of one block that are to be attended. View: the block outlives the call.
struct BlockRange {
  /// The block's first byte, laid out by `BlockLayout`; 64-byte aligned.
  const std::byte* block = nullptr;
  /// Tokens [first_token, first_token + tokens) of the block.
  std::uint32_t first_token = 0;
  std::uint32_t tokens = 0;
  /// Position in the sequence of `first_token`; read only where causality may cut the range.
  std::uint32_t position = 0;
  /// Where the keys are instead, laid out as in a block; null: in the block. The block's own are
  /// then not read, so that a block of which only the values are there can be attended.
  const std::byte* keys = nullptr;

  const std::byte* keys_begin() const { return keys != nullptr ? keys : block; }
};

/// Rows of keys or values in ordinary storage: row i starts at `data + i * stride_bytes`.
struct RowsView {
  const std::byte* data = nullptr;
  std::size_t rows = 0;
  std::uint32_t dim = 0;
  std::size_t stride_bytes = 0;
  DType dtype = DType::kF16;

  const std::byte* row(std::size_t i) const { return data + i * stride_bytes; }
};

/// How logits become weights; the same for every kernel and reference.
struct SoftmaxOptions {
  /// Multiplies q.k.
  float scale = 1.0f;
  /// Soft-capping: logit = cap * tanh(logit / cap), after scaling; 0 is off (Gemma 2: 50).
  float logit_cap = 0.0f;
};

}  // namespace kvtier
