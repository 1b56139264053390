#include "kernels/weighted_rows.h"

#include "kernels/simd_targets.h"

#include <gtest/gtest.h>

#include <random>
#include <vector>

namespace kvtier {
namespace {

TEST(SumWeightedRows, AgreesWithTheReferenceOnEveryShapeTypeAndInstructionSet) {
  struct Shape {
    std::size_t rows;
    std::uint32_t dim;
    std::uint32_t sums;
  };
  for (const Shape& shape : {Shape{0, 64, 2}, Shape{1, 8, 1}, Shape{77, 72, 5}, Shape{300, 128, 4},
                             Shape{33, 80, 9}, Shape{20, 576, 3}}) {
    for (const DType dtype : {DType::kF16, DType::kBF16, DType::kF32}) {
      std::mt19937 random(shape.dim);
      std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
      const std::size_t stride = shape.dim * size_of(dtype) + 16;
      std::vector<std::byte> bytes(shape.rows * stride + 64);
      for (std::size_t r = 0; r < shape.rows; ++r) {
        for (std::size_t i = 0; i < shape.dim; ++i) {
          store_element(bytes.data() + r * stride, dtype, i, uniform(random));
        }
      }
      std::vector<float> weights(shape.sums * (shape.rows + 3));
      for (float& weight : weights) weight = uniform(random);
      std::vector<float> expected(shape.sums * (shape.dim + 1), 7.0f);
      WeightedRows task{{bytes.data(), shape.rows, shape.dim, stride, dtype},
                        weights.data(),
                        shape.rows + 3,
                        shape.sums,
                        expected.data(),
                        shape.dim + 1u};
      sum_weighted_rows_reference(task);
      for (const std::string& target : simd_targets()) {
        const ScopedSimdTarget use(target);
        std::vector<float> sums(expected.size(), 7.0f);
        task.target = sums.data();
        sum_weighted_rows(task);
        for (std::size_t i = 0; i < sums.size(); ++i) {
          // A rounding for each of the rows, of sums no larger than their number.
          const double rows = double(shape.rows) + 1;
          ASSERT_NEAR(sums[i], expected[i], 0x1p-24 * rows * rows) << i << " " << target;
        }
      }
    }
  }
}

}  // namespace
}  // namespace kvtier
