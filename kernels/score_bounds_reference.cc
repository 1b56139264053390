#include "kernels/score_bounds.h"

#include "memory/dtype.h"

#include <algorithm>

namespace kvtier {

void box_rows_reference(const RowsView& rows, std::uint32_t rows_per_group, std::byte* target) {
  for (std::size_t first = 0; first < rows.rows; first += rows_per_group) {
    for (std::uint32_t i = 0; i < rows.dim; ++i) {
      float high = load_element(rows.row(first), rows.dtype, i);
      float low = high;
      for (std::size_t r = first; r < std::min(rows.rows, first + rows_per_group); ++r) {
        high = std::max(high, load_element(rows.row(r), rows.dtype, i));
        low = std::min(low, load_element(rows.row(r), rows.dtype, i));
      }
      store_element(target, rows.dtype, i, high);
      store_element(target, rows.dtype, rows.dim + i, low);
    }
    target += 2 * rows.dim * size_of(rows.dtype);
  }
}

double score_bound_reference(std::span<const float> query, const std::byte* box, DType dtype) {
  double bound = 0.0;
  for (std::size_t i = 0; i < query.size(); ++i) {
    const double q = double{query[i]};
    bound += std::max(q * double{load_element(box, dtype, i)},
                      q * double{load_element(box, dtype, query.size() + i)});
  }
  return bound;
}

}  // namespace kvtier
