#pragma once

#include "kernels/kv_view.h"

#include <cstddef>
#include <cstdint>

namespace kvtier {

/// Sums rows (values, or means of values) by weights that are already known.
struct WeightedRows {
  RowsView rows;                   ///< [rows, dim], dim a multiple of 8.
  const float* weights = nullptr;  ///< [sums, rows]
  std::size_t weight_stride = 0;   ///< Elements from one sum's weights to the next's.
  std::uint32_t sums = 0;
  float* target = nullptr;        ///< [sums, dim]
  std::size_t target_stride = 0;  ///< Elements from one sum to the next.
};

/// target[s] = sum over r of weights[s][r] * rows[r], float32, in order of r. Serial; allocates
/// nothing.
void sum_weighted_rows(const WeightedRows& task);

/// Obvious float64 loops, for tests.
void sum_weighted_rows_reference(const WeightedRows& task);

}  // namespace kvtier
