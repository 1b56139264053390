#pragma once

#include "kernels/kv_view.h"

#include <cstddef>
#include <cstdint>
#include <span>

namespace kvtier {

/// Centroids laid out for `assign_rows`: element i of centroid c is `elements[i * stride + c]`.
/// Columns from `count` to `stride` are padding; whatever they hold, `bias` must be the lowest
/// float there.
struct CentroidTable {
  const float* elements = nullptr;  ///< [dim, stride]
  const float* bias = nullptr;      ///< [stride], added to the dot of each centroid.
  std::uint32_t count = 0;
  std::size_t stride = 0;  ///< A multiple of `kCentroidMultiple`.
};
inline constexpr std::size_t kCentroidMultiple = 64;
/// Largest `RowsView::dim` of these kernels: several KV heads can be one long row.
inline constexpr std::uint32_t kMaxClusterDim = 8192;

/// nearest[r] = the centroid with the largest dot(rows[r], centroid) + bias, the lowest of equals;
/// 0 when no dot is a number. float32 accumulation, in the order of elements. One thread, no
/// allocation.
void assign_rows(const RowsView& rows, const CentroidTable& centroids,
                 std::span<std::uint16_t> nearest);

/// sums[labels[r]] += rows[r] for every row: `sums` is [labels, rows.dim], float32.
void add_rows_by_label(const RowsView& rows, std::span<const std::uint16_t> labels, float* sums);

/// sums[q] += the sum over r of weights[q][r] * rows[r]: `weights` is [queries, rows], `sums`
/// [queries, rows.dim], contiguous. Rows are taken in order, so that results repeat.
void add_weighted_rows(const RowsView& rows, const float* weights, std::size_t weight_stride,
                       std::size_t queries, float* sums);

/// Obvious float64 loops, for tests.
void assign_rows_reference(const RowsView& rows, const CentroidTable& centroids,
                           std::span<std::uint16_t> nearest);
void add_weighted_rows_reference(const RowsView& rows, const float* weights,
                                 std::size_t weight_stride, std::size_t queries, float* sums);

}  // namespace kvtier
