#pragma once

#include "kernels/kv_view.h"
#include "kernels/quantised_keys.h"
#include "memory/status.h"

#include <cstddef>
#include <cstdint>
#include <span>

namespace kvtier {

/// Rows of 4-bit integers with one scale each (SALE's per-token grouping): element = scale * code,
/// code from -7 to 7, rounded to nearest, so that an element is off by at most half a scale, and
/// the scale is the row's largest magnitude / 7, rounded up to bfloat16 (at most 1/128 more).
///
/// Codes lie in tiles of 16 rows, each code + 8, in the layout of `KeyCodes` with 4 bits: lanes are
/// rows. A row takes dim / 2 bytes in its tile and 2 beside it.
struct Int4Rows {
  static constexpr std::uint32_t kTileRows = KeyCodes::kTileTokens;

  const CodeLine* tiles = nullptr;        ///< [ceil(rows / 16), int4_tile_lines(dim)]
  const std::uint16_t* scales = nullptr;  ///< [rows], bfloat16
  std::size_t rows = 0;
  std::uint32_t dim = 0;  ///< A multiple of 8 up to 576.
};

constexpr std::size_t int4_tile_lines(std::uint32_t dim) { return dim / 8; }

/// Codes one row as row `place` of a tile; other rows of the tile stay as they are. A row that is
/// not finite gets an infinite scale, so that its logits are not finite either.
void quantise_int4(std::span<const float> row, std::uint32_t place, CodeLine* tile,
                   std::uint16_t& scale);
/// The elements that the codes stand for.
void dequantise_int4(const CodeLine* tile, std::uint32_t place, std::uint16_t scale,
                     std::span<float> row);

/// Scores 4-bit rows against the queries of one KV head.
struct Int4Task {
  Int4Rows rows;
  const float* queries = nullptr;  ///< [queries, dim]
  std::size_t query_stride = 0;
  std::uint32_t query_count = 0;
  /// [queries] or null: added to a query's dots, for what was taken off the rows before coding.
  const float* offsets = nullptr;
  float* logits = nullptr;  ///< [queries, rows up to a whole tile]; scratch behind the rows.
  std::size_t logit_stride = 0;
};

/// logits[q][r] = cap(softmax.scale * (dot(queries[q], rows[r]) + offsets[q])). Queries are rounded
/// to 7 bits and a sign relative to their largest magnitude (an element is off by at most a 254th
/// of it); sums are exact. Serial: the caller splits. Allocates nothing.
void score_int4(const SoftmaxOptions& softmax, const Int4Task& task);

/// Obvious float64 loops over the unrounded queries, for tests.
void score_int4_reference(const SoftmaxOptions& softmax, const Int4Task& task);

}  // namespace kvtier
