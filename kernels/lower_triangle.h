#pragma once

#include <cstdint>

namespace kvtier {

/// Loops over the lower triangle of a [dim, dim] matrix of float32, stored whole, row by row; what
/// is above the diagonal is neither read nor written. Allocate nothing, run on the caller's thread.

/// target[j] = sum over i >= j of triangle[i][j] * source[i]: the transpose times a column.
/// `target` may not be `source`.
void multiply_transposed(const float* triangle, std::uint32_t dim, const float* source,
                         float* target);
/// triangle[i][j] += row[i] * row[j] for j <= i.
void add_outer_product(const float* row, std::uint32_t dim, float* triangle);

/// Obvious float64 loops, for tests.
void multiply_transposed_reference(const float* triangle, std::uint32_t dim, const float* source,
                                   float* target);
void add_outer_product_reference(const float* row, std::uint32_t dim, float* triangle);

}  // namespace kvtier
