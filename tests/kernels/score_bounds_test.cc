#include "kernels/score_bounds.h"

#include "kernels/simd_targets.h"
#include "memory/dtype.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

namespace kvtier {
namespace {

/// Rows of random elements in [-1, 1], a gap between them.
struct BoundedRows {
  BoundedRows(std::size_t rows, std::uint32_t dim, DType dtype, std::uint32_t seed)
      : bytes(rows * (dim * size_of(dtype) + 16)),
        view{bytes.data(), rows, dim, dim * size_of(dtype) + 16, dtype} {
    std::mt19937 random(seed);
    std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
    for (std::size_t r = 0; r < rows; ++r) {
      for (std::uint32_t i = 0; i < dim; ++i) {
        store_element(bytes.data() + r * view.stride_bytes, dtype, i, uniform(random));
      }
    }
  }
  std::vector<std::byte> bytes;
  RowsView view;
};

constexpr std::size_t kBoxedRows = 29;

TEST(ScoreBounds, BoxesAreThoseOfTheReferenceToTheBit) {
  for (const DType dtype : {DType::kF16, DType::kBF16, DType::kF32}) {
    for (const std::uint32_t dim : {8u, 64u, 72u, 77u, 256u}) {
      const BoundedRows rows(kBoxedRows, dim, dtype, dim);
      for (const std::uint32_t per_group : {1u, 4u, 16u, 64u}) {
        const std::size_t groups = (kBoxedRows + per_group - 1) / per_group;
        std::vector<std::byte> expected(groups * 2 * dim * size_of(dtype));
        box_rows_reference(rows.view, per_group, expected.data());
        for (const std::string& target : simd_targets()) {
          const ScopedSimdTarget use(target);
          std::vector<std::byte> boxes(expected.size());
          box_rows(rows.view, per_group, boxes.data());
          EXPECT_EQ(boxes, expected) << target << ", dim " << dim << ", groups of " << per_group;
        }
      }
    }
  }
}

TEST(ScoreBounds, JoinedBoxesAreTheBoxOfAllRows) {
  for (const DType dtype : {DType::kF16, DType::kBF16, DType::kF32}) {
    constexpr std::uint32_t kDim = 72;
    const BoundedRows rows(kBoxedRows, kDim, dtype, 5);
    const std::size_t box_bytes = 2 * kDim * size_of(dtype);
    std::vector<std::byte> boxes(8 * box_bytes);
    box_rows(rows.view, 4, boxes.data());
    std::vector<std::byte> expected(box_bytes);
    box_rows_reference(rows.view, kBoxedRows, expected.data());
    for (const std::string& target : simd_targets()) {
      const ScopedSimdTarget use(target);
      std::vector<std::byte> joined(box_bytes);
      join_boxes({boxes.data(), 8, 2 * kDim, box_bytes, dtype}, joined.data());
      EXPECT_EQ(joined, expected) << target;
    }
  }
}

// The promise: no logit of a boxed row is above the bound, the bound is the definition's, and a box
// inside another has no larger one.
TEST(ScoreBounds, BoundEveryLogitAndGrowWithTheBox) {
  WorkerPool pool(1);
  for (const DType dtype : {DType::kF16, DType::kBF16, DType::kF32}) {
    for (const std::uint32_t dim : {64u, 72u, 576u}) {
      const BoundedRows rows(64, dim, dtype, dim);
      std::mt19937 random(3);
      std::normal_distribution<float> normal;
      std::vector<float> queries(5 * dim);
      std::vector<float> split(5 * 2 * dim);
      for (float& q : queries) q = normal(random);
      for (std::size_t q = 0; q < 5; ++q) {
        split_by_sign(std::span(queries).subspan(q * dim, dim), 1.0f, split.data() + q * 2 * dim);
      }
      const std::size_t box_bytes = 2 * dim * size_of(dtype);
      // Eight boxes of eight rows, and behind them the box of all.
      std::vector<std::byte> boxes(9 * box_bytes);
      box_rows(rows.view, 8, boxes.data());
      box_rows(rows.view, 64, boxes.data() + 8 * box_bytes);
      for (const std::string& target : simd_targets()) {
        const ScopedSimdTarget use(target);
        std::vector<float> bounds(5 * 9);
        const ScoreTask task{{boxes.data(), 9, 2 * dim, box_bytes, dtype},
                             split.data(),
                             2 * dim,
                             5,
                             bounds.data(),
                             9};
        ASSERT_TRUE(score_rows({}, std::span(&task, 1), pool).ok());
        for (std::size_t q = 0; q < 5; ++q) {
          const std::span query(queries.data() + q * dim, dim);
          double size = 0;
          for (float value : query) size += std::abs(double{value});
          // 2d roundings, each of a sum no larger than the sum of |q_i| (elements are below 1).
          const double tolerance = 2 * dim * 0x1p-24 * size;
          for (std::size_t box = 0; box < 9; ++box) {
            const float bound = bounds[q * 9 + box];
            ASSERT_NEAR(double{bound},
                        score_bound_reference(query, boxes.data() + box * box_bytes, dtype),
                        tolerance);
            ASSERT_LE(bound, bounds[q * 9 + 8]) << "a box inside another";
          }
          for (std::size_t r = 0; r < 64; ++r) {
            double logit = 0;
            for (std::uint32_t i = 0; i < dim; ++i) {
              logit += double{query[i]} * double{load_element(rows.view.row(r), dtype, i)};
            }
            ASSERT_LE(logit, double{bounds[q * 9 + r / 8]} + tolerance) << target;
          }
        }
      }
    }
  }
}

TEST(ScoreBounds, ASmallBoxByHand) {
  const std::vector<float> keys = {1, -2, 0, 0, 0, 0, 0, 0, 3, -5, 0, 0, 0, 0, 0, 0};
  std::vector<float> box(16);
  box_rows({reinterpret_cast<const std::byte*>(keys.data()), 2, 8, 32, DType::kF32}, 2,
           reinterpret_cast<std::byte*>(box.data()));
  EXPECT_EQ(box, (std::vector<float>{3, -2, 0, 0, 0, 0, 0, 0, 1, -5, 0, 0, 0, 0, 0, 0}));
  const std::vector<float> query = {2, -1, 4, 0, 0, 0, 0, 0};
  std::vector<float> split(16);
  split_by_sign(query, 0.5f, split.data());
  EXPECT_EQ(split, (std::vector<float>{1, 0, 2, 0, 0, 0, 0, 0, 0, -0.5f, 0, 0, 0, 0, 0, 0}));
  // 2 * 3 + (-1) * (-5): more than either key has (4 and 11).
  EXPECT_EQ(
      score_bound_reference(query, reinterpret_cast<const std::byte*>(box.data()), DType::kF32),
      11.0);
}

TEST(ScoreRows, ListedRowsAreScoredInTheirOrder) {
  const BoundedRows rows(300, 64, DType::kF16, 8);
  std::mt19937 random(4);
  std::vector<float> queries(3 * 64);
  for (float& q : queries) q = static_cast<float>(random() % 1000) / 500.0f - 1.0f;
  std::vector<float> all(3 * 300);
  ASSERT_TRUE(score_rows({}, ScoreTask{rows.view, queries.data(), 64, 3, all.data(), 300}).ok());
  std::vector<std::uint32_t> listed;
  for (std::uint32_t i = 0; i < 270; ++i)
    listed.push_back(static_cast<std::uint32_t>(random() % 300));
  std::vector<float> some(3 * 270);
  const ScoreTask task{rows.view, queries.data(), 64, 3, some.data(), 270, listed};
  ASSERT_TRUE(score_rows({}, task).ok());
  std::vector<float> expected(3 * 270);
  ScoreTask reference = task;
  reference.logits = expected.data();
  score_rows_reference({}, reference);
  for (std::size_t q = 0; q < 3; ++q) {
    for (std::size_t i = 0; i < 270; ++i) {
      EXPECT_EQ(some[q * 270 + i], all[q * 300 + listed[i]]);
      // 64 roundings of sums up to 64.
      EXPECT_NEAR(some[q * 270 + i], expected[q * 270 + i], 64 * 64 * 0x1p-24);
    }
  }
  WorkerPool pool(2);
  std::vector<float> shared(3 * 270);
  reference.logits = shared.data();
  ASSERT_TRUE(score_rows({}, std::span(&reference, 1), pool).ok());
  EXPECT_EQ(shared, some);
}

}  // namespace
}  // namespace kvtier
