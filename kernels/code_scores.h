#pragma once

#include "kernels/kv_view.h"
#include "memory/status.h"

#include <cstddef>
#include <cstdint>
#include <span>

namespace kvtier {

/// Centroids per part of a product codebook: what one byte tells apart.
inline constexpr std::size_t kCodeCentroids = 256;

/// A codebook for rows cut into `parts` pieces of dim / parts elements: each piece is stood for by
/// one of 256 centroids, so a row is `parts` bytes. View.
struct CodebookView {
  /// [parts, dim / parts, 256]: one element of all centroids of a part lies together.
  const float* centroids = nullptr;
  /// [parts, 256]: half the squared length; infinite for a centroid that is not in use.
  const float* half_norms = nullptr;
  std::uint32_t dim = 0;
  std::uint32_t parts = 1;  ///< Divides `dim`.

  std::uint32_t part_dim() const { return dim / parts; }
};

/// codes[r][p]: the centroid nearest to part p of row r (ties: any one, always the same).
/// `rows` is [count, dim] float32, contiguous. A row that is not finite gets some code.
void nearest_codes(const CodebookView& codebook, const float* rows, std::size_t count,
                   std::uint8_t* codes);
void nearest_codes_reference(const CodebookView& codebook, const float* rows, std::size_t count,
                             std::uint8_t* codes);

/// Floats that the tables of so many queries take: whole groups of four queries.
constexpr std::size_t code_table_size(std::size_t queries, std::size_t parts) {
  return (queries + 3) / 4 * 4 * parts * kCodeCentroids;
}

/// Scores coded rows against the queries of one KV head.
struct CodeTask {
  const std::uint8_t* codes = nullptr;  ///< [rows, codebook.parts]
  std::size_t rows = 0;
  CodebookView codebook;
  const float* queries = nullptr;  ///< [queries, dim]
  std::size_t query_stride = 0;
  std::uint32_t query_count = 0;
  /// `code_table_size` floats: [groups of four queries, parts, 256, 4], so that one load finds what
  /// a code is worth to four queries.
  float* tables = nullptr;
  float* logits = nullptr;  ///< [queries, rows]
  std::size_t logit_stride = 0;
};

/// Fills the tables for the queries, whatever the rows.
void fill_code_tables(const CodeTask& task);
/// logits[q][r] = cap(softmax.scale * sum over parts of dot(query part, centroid)), by the tables
/// that were filled for these queries. Serial: the caller splits the rows. No allocation.
void score_codes(const SoftmaxOptions& softmax, const CodeTask& task);
/// Obvious float64 loops without tables, for tests.
void score_codes_reference(const SoftmaxOptions& softmax, const CodeTask& task);

}  // namespace kvtier
