#include "kernels/lower_triangle.h"

#include <cstddef>

namespace kvtier {

void multiply_transposed_reference(const float* triangle, std::uint32_t dim, const float* source,
                                   float* target) {
  for (std::size_t j = 0; j < dim; ++j) {
    double sum = 0.0;
    for (std::size_t i = j; i < dim; ++i) {
      sum += double{triangle[i * dim + j]} * double{source[i]};
    }
    target[j] = static_cast<float>(sum);
  }
}

void add_outer_product_reference(const float* row, std::uint32_t dim, float* triangle) {
  for (std::size_t i = 0; i < dim; ++i) {
    for (std::size_t j = 0; j <= i; ++j) {
      triangle[i * dim + j] =
          static_cast<float>(double{triangle[i * dim + j]} + double{row[i]} * double{row[j]});
    }
  }
}

}  // namespace kvtier
