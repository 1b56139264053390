#include "kernels/lower_triangle.h"

#include "kernels/simd_targets.h"

#include <gtest/gtest.h>

#include <random>
#include <vector>

namespace kvtier {
namespace {

TEST(LowerTriangle, AgreesWithTheReferenceOnEveryInstructionSet) {
  std::mt19937 random(1);
  std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
  for (const std::uint32_t dim : {1u, 8u, 17u, 64u, 80u, 128u}) {
    std::vector<float> triangle(std::size_t{dim} * dim);
    std::vector<float> row(dim);
    for (float& value : triangle) value = uniform(random);
    for (float& value : row) value = uniform(random);
    std::vector<float> expected(dim);
    multiply_transposed_reference(triangle.data(), dim, row.data(), expected.data());
    std::vector<float> expected_triangle = triangle;
    add_outer_product_reference(row.data(), dim, expected_triangle.data());
    for (const std::string& target : simd_targets()) {
      const ScopedSimdTarget use(target);
      std::vector<float> product(dim, 7.0f);
      multiply_transposed(triangle.data(), dim, row.data(), product.data());
      std::vector<float> sum = triangle;
      add_outer_product(row.data(), dim, sum.data());
      for (std::size_t i = 0; i < dim; ++i) {
        // At most dim roundings of sums below dim.
        EXPECT_NEAR(product[i], expected[i], dim * dim * 0x1p-24) << dim << " " << target;
      }
      for (std::size_t i = 0; i < sum.size(); ++i) {
        // Above the diagonal nothing is written.
        EXPECT_NEAR(sum[i], expected_triangle[i], i % dim > i / dim ? 0.0 : 0x1p-22) << target;
      }
    }
  }
}

}  // namespace
}  // namespace kvtier
