#include "kernels/int4_rows.h"

#include <cmath>
#include <vector>

namespace kvtier {

void score_int4_reference(const SoftmaxOptions& softmax, const Int4Task& task) {
  std::vector<float> row(task.rows.dim);
  for (std::uint32_t r = 0; r < task.rows.rows; ++r) {
    dequantise_int4(task.rows.tiles + r / Int4Rows::kTileRows * int4_tile_lines(task.rows.dim),
                    r % Int4Rows::kTileRows, task.rows.scales[r], row);
    for (std::size_t q = 0; q < task.query_count; ++q) {
      double dot = task.offsets == nullptr ? 0.0 : double{task.offsets[q]};
      for (std::size_t i = 0; i < row.size(); ++i) {
        dot += double{task.queries[q * task.query_stride + i]} * double{row[i]};
      }
      double logit = double{softmax.scale} * dot;
      const double cap = double{softmax.logit_cap};
      if (cap > 0.0) logit = cap * std::tanh(logit / cap);
      task.logits[q * task.logit_stride + r] = static_cast<float>(logit);
    }
  }
}

}  // namespace kvtier
