#include "kernels/cluster_rows.h"

#include "kernels/simd_targets.h"
#include "memory/dtype.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

namespace kvtier {
namespace {

struct ClusterRowsInput {
  ClusterRowsInput(std::size_t rows, std::uint32_t dim, DType dtype, std::size_t gap,
                   std::uint32_t seed)
      : bytes(rows * (dim * size_of(dtype) + gap)),
        view{bytes.data(), rows, dim, dim * size_of(dtype) + gap, dtype},
        random(seed) {
    for (std::size_t r = 0; r < rows; ++r) {
      for (std::uint32_t i = 0; i < dim; ++i) {
        store_element(bytes.data() + r * view.stride_bytes, dtype, i, next());
      }
    }
  }
  float next() { return std::uniform_real_distribution<float>(-1.0f, 1.0f)(random); }
  std::vector<float> floats(std::size_t count) {
    std::vector<float> result(count);
    for (float& value : result) value = next();
    return result;
  }
  std::vector<std::byte> bytes;
  RowsView view;
  std::mt19937 random;
};

/// A table of random centroids; the padding would win if anybody looked at it.
struct TableInput {
  TableInput(ClusterRowsInput& rows, std::uint32_t count) {
    const std::size_t stride =
        (count + kCentroidMultiple - 1) / kCentroidMultiple * kCentroidMultiple;
    elements = rows.floats(rows.view.dim * stride);
    bias = rows.floats(stride);
    std::fill(bias.begin() + count, bias.end(), std::numeric_limits<float>::lowest());
    table = {elements.data(), bias.data(), count, stride};
  }
  std::vector<float> elements;
  std::vector<float> bias;
  CentroidTable table;
};

double score_of(const RowsView& rows, std::size_t r, const CentroidTable& table, std::uint32_t c) {
  double dot = double{table.bias[c]};
  for (std::uint32_t i = 0; i < rows.dim; ++i) {
    dot += double{load_element(rows.row(r), rows.dtype, i)} *
           double{table.elements[i * table.stride + c]};
  }
  return dot;
}

const DType kClusterDTypes[] = {DType::kF16, DType::kBF16, DType::kF32};

TEST(AssignRows, FindsTheBestCentroidOnEveryShapeTypeAndInstructionSet) {
  for (const std::uint32_t dim : {8u, 64u, 72u, 128u, 520u}) {
    for (const std::uint32_t count : {1u, 7u, 64u, 65u, 200u}) {
      for (const DType dtype : kClusterDTypes) {
        ClusterRowsInput rows(29, dim, dtype, 16, dim + count);
        const TableInput centroids(rows, count);
        std::vector<std::uint16_t> expected(rows.view.rows);
        assign_rows_reference(rows.view, centroids.table, expected);
        for (const std::string& target : simd_targets()) {
          const ScopedSimdTarget use(target);
          std::vector<std::uint16_t> found(rows.view.rows, 60000);
          assign_rows(rows.view, centroids.table, found);
          for (std::size_t r = 0; r < found.size(); ++r) {
            if (found[r] == expected[r]) continue;
            // Another one may win where two are level but for rounding: dim roundings of sums below
            // dim + 1 each.
            ASSERT_LT(found[r], count);
            EXPECT_NEAR(score_of(rows.view, r, centroids.table, found[r]),
                        score_of(rows.view, r, centroids.table, expected[r]),
                        2.0 * dim * (dim + 1) * 0x1p-24)
                << target << " " << to_string(dtype) << " dim " << dim << " of " << count;
          }
        }
      }
    }
  }
}

TEST(AssignRows, TheLowestOfEqualsWinsAndNotANumberNeverDoes) {
  ClusterRowsInput rows(5, 8, DType::kF32, 0, 3);
  TableInput centroids(rows, 130);
  for (std::uint32_t c : {17u, 18u, 66u, 129u}) {
    for (std::uint32_t i = 0; i < 8; ++i) centroids.elements[i * centroids.table.stride + c] = 0.0f;
    centroids.bias[c] = 100.0f;
  }
  store_element(rows.bytes.data() + 4 * 32, DType::kF32, 2, std::nanf(""));
  for (const std::string& target : simd_targets()) {
    const ScopedSimdTarget use(target);
    std::vector<std::uint16_t> found(5);
    assign_rows(rows.view, centroids.table, found);
    EXPECT_EQ(found, (std::vector<std::uint16_t>{17, 17, 17, 17, 0})) << target;
  }
}

TEST(AddRowsByLabel, AddsEachRowWhereItsLabelSays) {
  for (const DType dtype : kClusterDTypes) {
    for (const std::uint32_t dim : {8u, 72u, 128u}) {
      ClusterRowsInput rows(40, dim, dtype, 8, dim);
      std::vector<std::uint16_t> labels(40);
      for (std::size_t r = 0; r < 40; ++r) labels[r] = static_cast<std::uint16_t>(r * r % 7);
      for (const std::string& target : simd_targets()) {
        const ScopedSimdTarget use(target);
        std::vector<float> sums(7 * dim, 1.0f);
        add_rows_by_label(rows.view, labels, sums.data());
        for (std::uint16_t label = 0; label < 7; ++label) {
          for (std::uint32_t i = 0; i < dim; ++i) {
            double expected = 1.0;
            for (std::size_t r = 0; r < 40; ++r) {
              if (labels[r] == label) expected += double{load_element(rows.view.row(r), dtype, i)};
            }
            // At most 40 roundings of sums below 41.
            ASSERT_NEAR(double{sums[label * dim + i]}, expected, 40 * 41 * 0x1p-24) << target;
          }
        }
      }
    }
  }
}

TEST(AddWeightedRows, AgreesWithTheReferenceOnEveryShapeTypeAndInstructionSet) {
  for (const std::uint32_t dim : {8u, 64u, 72u, 128u, 520u}) {
    for (const std::size_t queries : {1u, 3u, 6u, 7u, 32u}) {
      for (const DType dtype : kClusterDTypes) {
        ClusterRowsInput rows(37, dim, dtype, 16, dim);
        const std::vector<float> weights = rows.floats(queries * 40);
        const std::vector<float> before = rows.floats(queries * dim);
        std::vector<float> expected = before;
        add_weighted_rows_reference(rows.view, weights.data(), 40, queries, expected.data());
        for (const std::string& target : simd_targets()) {
          const ScopedSimdTarget use(target);
          std::vector<float> found = before;
          add_weighted_rows(rows.view, weights.data(), 40, queries, found.data());
          // 38 roundings of sums below 38.
          for (std::size_t i = 0; i < found.size(); ++i) {
            ASSERT_NEAR(found[i], expected[i], 38 * 38 * 0x1p-24)
                << target << " " << to_string(dtype) << " dim " << dim;
          }
        }
      }
    }
  }
}

TEST(AddWeightedRows, NoRowsAddNothing) {
  std::vector<float> sums = {1, 2, 3, 4, 5, 6, 7, 8};
  const std::vector<float> before = sums;
  add_weighted_rows({nullptr, 0, 8, 16, DType::kF16}, nullptr, 0, 1, sums.data());
  EXPECT_EQ(sums, before);
}

}  // namespace
}  // namespace kvtier
