#pragma once

#include "kernels/weigh_cells.h"
#include "kernels/worker_pool.h"
#include "selectors/selector.h"

#include <cstdint>

namespace kvtier {

/// Some queries of one KV head, and a slice of tokens whose logits they want.
struct TokenPiece {
  std::uint32_t head = 0;
  /// A multiple of `kCellRowTokens`.
  std::uint32_t first_token = 0;
  std::uint32_t end_token = 0;  ///< At most `kCellRowTokens` further.
  /// Rows [first_row, first_row + rows) of the head: query * queries_per_kv_head + query head. The
  /// first is a multiple of eight.
  std::uint32_t first_row = 0;
  std::uint32_t rows = 0;
  const float* queries = nullptr;  ///< [rows, head_dim], contiguous.
  /// [rows, kCellRowTokens]: row r, token t to `logits[r * kCellRowTokens + t - first_token]`.
  /// What lies behind `end_token` is scratch.
  float* logits = nullptr;
};

/// Where the logits of single tokens come from: whatever a selector keeps of their keys.
class TokenLogits {
 public:
  virtual ~TokenLogits() = default;

  /// Before the pieces of a step. `queries`: [KV heads, rows, head_dim], of the step's request;
  /// tokens before `visible` will be asked for. May allocate when there are more rows than ever.
  virtual Status prepare(const SelectRequest& request, const float* queries, std::uint32_t rows,
                         std::uint32_t visible, WorkerPool& pool) = 0;
  /// Writes the logits of a piece. Called by several threads at once.
  virtual void fill(const TokenPiece& piece) = 0;
};

}  // namespace kvtier
