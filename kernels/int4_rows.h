#pragma once

#include "kernels/kv_view.h"
#include "kernels/worker_pool.h"
#include "memory/status.h"

#include <cstddef>
#include <cstdint>
#include <span>

namespace kvtier {

/// Rows of 4-bit integers with one scale each (SALE's per-token grouping): element = scale * code,
/// code from -7 to 7, rounded to nearest, so that an element is off by at most half a scale, and
/// the scale is the row's largest magnitude / 7, rounded up to bfloat16 (at most 1/128 more).
///
/// A row is `int4_words(dim)` 16-bit words of four nibbles: nibble n of word w holds element
/// n * words + w, as code + 8. One shift and one mask then give as many 16-bit codes as a vector
/// has lanes, in an order that a query can be brought into once.
struct Int4Rows {
  const std::uint16_t* words = nullptr;   ///< [rows, int4_words(dim)]
  const std::uint16_t* scales = nullptr;  ///< [rows], bfloat16
  std::size_t rows = 0;
  std::uint32_t dim = 0;
};

/// Words of a row: a multiple of 16, so heads of 64, 128, 256 waste nothing.
constexpr std::size_t int4_words(std::uint32_t dim) { return (dim / 4 + 15) / 16 * 16; }

/// Codes one row. A row that is not finite gets an infinite scale, so that its logits are not
/// finite either.
void quantise_int4(std::span<const float> row, std::uint16_t* words, std::uint16_t& scale);
/// The elements that the codes stand for.
void dequantise_int4(const std::uint16_t* words, std::uint16_t scale, std::span<float> row);

/// Scores 4-bit rows against the queries of one KV head. Queries are rounded to 16-bit integers
/// (off by at most 1/65534 of a query's largest magnitude): sums are exact in 32 bits.
struct Int4Task {
  Int4Rows rows;
  const float* queries = nullptr;  ///< [queries, dim]
  std::size_t query_stride = 0;
  std::uint32_t query_count = 0;  ///< 1 to 128.
  /// [queries] or null: added to a query's dots, for what was taken off the rows before coding.
  const float* offsets = nullptr;
  float* logits = nullptr;  ///< [queries, rows]
  std::size_t logit_stride = 0;
};

/// logits[q][r] = cap(softmax.scale * (dot(queries[q], rows[r]) + offsets[q])). Splits the rows
/// over the workers; the result does not depend on their number. Allocates nothing. `unsupported`
/// for a dim that is no multiple of 8 up to 576.
Status score_int4(const SoftmaxOptions& softmax, std::span<const Int4Task> tasks, WorkerPool& pool);

/// Obvious float64 loops over the unrounded queries, for tests.
void score_int4_reference(const SoftmaxOptions& softmax, const Int4Task& task);

}  // namespace kvtier
