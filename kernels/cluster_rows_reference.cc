#include "kernels/cluster_rows.h"

namespace kvtier {

void assign_rows_reference(const RowsView& rows, const CentroidTable& centroids,
                           std::span<std::uint16_t> nearest) {
  for (std::size_t r = 0; r < rows.rows; ++r) {
    double best = 0.0;
    for (std::uint32_t c = 0; c < centroids.count; ++c) {
      double dot = double{centroids.bias[c]};
      for (std::uint32_t i = 0; i < rows.dim; ++i) {
        dot += double{load_element(rows.row(r), rows.dtype, i)} *
               double{centroids.elements[i * centroids.stride + c]};
      }
      if (c > 0 && dot <= best) continue;
      best = dot;
      nearest[r] = static_cast<std::uint16_t>(c);
    }
  }
}

void add_weighted_rows_reference(const RowsView& rows, const float* weights,
                                 std::size_t weight_stride, std::size_t queries, float* sums) {
  for (std::size_t q = 0; q < queries; ++q) {
    for (std::uint32_t i = 0; i < rows.dim; ++i) {
      double sum = double{sums[q * rows.dim + i]};
      for (std::size_t r = 0; r < rows.rows; ++r) {
        sum += double{weights[q * weight_stride + r]} *
               double{load_element(rows.row(r), rows.dtype, i)};
      }
      sums[q * rows.dim + i] = static_cast<float>(sum);
    }
  }
}

}  // namespace kvtier
