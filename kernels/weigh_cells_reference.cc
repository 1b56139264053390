#include "kernels/weigh_cells.h"

#include "kernels/kv_view.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace kvtier {

float weigh_cells_reference(const CellRow& row) {
  if (row.count == 0) return kEmptyLse;
  for (std::uint32_t t = 0; t < row.count; ++t) {
    if (!std::isfinite(row.logits[t])) return std::numeric_limits<float>::quiet_NaN();
  }
  const double top = double{*std::max_element(row.logits, row.logits + row.count)};
  double sum = 0.0;
  for (std::uint32_t t = 0; t < row.count; ++t) sum += std::exp(double{row.logits[t]} - top);
  for (std::uint32_t t = row.begin; t < row.end;) {
    const std::uint32_t cell = t / row.cell_tokens;
    double of_cell = 0.0;
    for (; t < row.end && t / row.cell_tokens == cell; ++t) {
      of_cell += std::exp(double{row.logits[t]} - top) / sum;
    }
    row.cells[cell] = static_cast<float>(of_cell);
  }
  return static_cast<float>(top + std::log(sum));
}

}  // namespace kvtier
