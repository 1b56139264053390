#pragma once

#include <cstdint>

namespace kvtier {

/// Tokens of a row that `weigh_cells` takes at most: 4 KiB of logits, which stay in the cache.
inline constexpr std::uint32_t kCellRowTokens = 1024;

/// A row of logits whose softmax weights are wanted as sums over cells of neighbouring tokens.
struct CellRow {
  /// [kCellRowTokens], 64-byte aligned. Scratch afterwards, behind `count` too.
  float* logits = nullptr;
  std::uint32_t count = 0;  ///< Logits that there are.
  /// Weights of tokens [begin, end) are added up; the others only count in the softmax.
  std::uint32_t begin = 0;
  std::uint32_t end = 0;          ///< Up to `count`.
  std::uint32_t cell_tokens = 1;  ///< A power of two up to `kCellRowTokens`.
  /// Cell c holds tokens [c * cell_tokens, (c + 1) * cell_tokens); those that overlap [begin, end)
  /// are written, and no others.
  float* cells = nullptr;
};

/// Weighs the row in three passes over the cache: maximum, exp, sums by halves. Weights are
/// exp(logit) / sum of all `count`; a weight below 2^-126 is zero. Returns the log-sum-exp:
/// `kEmptyLse` for no logits, not-a-number if one is not finite (nothing is written then).
/// The bits depend on the instruction set and nothing else. Serial, allocates nothing.
float weigh_cells(const CellRow& row);

/// Obvious float64 loops, for tests; `row.logits` is only read.
float weigh_cells_reference(const CellRow& row);

}  // namespace kvtier
