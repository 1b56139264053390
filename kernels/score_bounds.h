#pragma once

#include "kernels/kv_view.h"
#include "kernels/score_rows.h"

#include <cstddef>
#include <cstdint>
#include <span>

namespace kvtier {

// Upper bounds of dot products with any key of a group, from the box around the group's keys:
//   bound(q) = sum_i max(q_i low_i, q_i high_i) >= q . k for every k in the box.
//
// A box is one row, [high_0 .. high_{d-1}, low_0 .. low_{d-1}], and a query split by sign likewise,
// [max(q_i, 0) .., min(q_i, 0) ..]: their dot product is the bound, so that `score_rows` scores
// boxes as it scores keys, with 2d for its dim.
//
// Corners are elements of the keys themselves, so storing them in the keys' type rounds nothing.
// What is left is the rounding of the float32 sums. It is monotone: all boxes are summed in one
// order, so a box inside another never gets the larger bound.

/// Boxes around `rows_per_group` consecutive rows each (a shorter last group takes what it has):
/// `target` is [ceil(rows / rows_per_group), 2 dim] of `rows.dtype`, contiguous.
void box_rows(const RowsView& rows, std::uint32_t rows_per_group, std::byte* target);
/// The smallest box around `boxes` (rows of 2d), at least one of them.
void join_boxes(const RowsView& boxes, std::byte* target);

/// `target` is [2 query.size()]: the query split by sign, times `factor` >= 0.
void split_by_sign(std::span<const float> query, float factor, float* target);

/// The definitions, with obvious loops; for tests.
void box_rows_reference(const RowsView& rows, std::uint32_t rows_per_group, std::byte* target);
double score_bound_reference(std::span<const float> query, const std::byte* box, DType dtype);

}  // namespace kvtier
