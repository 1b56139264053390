#include "kernels/score_rows.h"

#include "kernels/simd_targets.h"
#include "memory/dtype.h"

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

namespace kvtier {
namespace {

const DType kRowDTypes[] = {DType::kF16, DType::kBF16, DType::kF32};

/// Rows of random elements in [-1, 1], `gap` bytes between them.
struct Rows {
  Rows(std::size_t rows, std::uint32_t dim, DType dtype, std::size_t gap, std::uint32_t seed)
      : bytes(rows * (dim * size_of(dtype) + gap)),
        view{bytes.data(), rows, dim, dim * size_of(dtype) + gap, dtype} {
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

std::vector<float> random_floats(std::size_t count, std::uint32_t seed) {
  std::mt19937 random(seed);
  std::uniform_real_distribution<float> uniform(-3.0f, 3.0f);
  std::vector<float> floats(count);
  for (float& f : floats) f = uniform(random);
  return floats;
}

struct ScoreShape {
  std::size_t rows;
  std::uint32_t dim;
  std::uint32_t queries;
  float cap;
};

const ScoreShape kScoreShapes[] = {
    {1, 64, 1, 0},    {3, 64, 3, 0},    {4, 80, 4, 0},   {257, 96, 7, 0}, {300, 128, 16, 0},
    {256, 256, 2, 0}, {513, 64, 24, 0}, {9, 576, 5, 0},  {10, 8, 128, 0}, {33, 72, 9, 0},
    {100, 64, 3, 2},  {17, 64, 6, 50},  {1000, 40, 1, 0}};

TEST(ScoreRows, AgreesWithTheReferenceOnEveryShapeTypeAndInstructionSet) {
  WorkerPool pool(2);
  for (const ScoreShape& shape : kScoreShapes) {
    for (const DType dtype : kRowDTypes) {
      const Rows rows(shape.rows, shape.dim, dtype, 16, shape.dim);
      const std::vector<float> queries = random_floats(shape.queries * (shape.dim + 5), 2);
      const SoftmaxOptions softmax{1.0f / std::sqrt(float(shape.dim)), shape.cap};
      const std::size_t stride = shape.rows + 3;
      std::vector<float> expected(shape.queries * stride, 1e30f);
      ScoreTask task{rows.view,     queries.data(),  shape.dim + 5u,
                     shape.queries, expected.data(), stride};
      score_rows_reference(softmax, task);
      // At most d roundings of sum|q k| scale <= 3 sqrt(d), and a few for scale and tanh.
      const double u = 0x1p-24;
      const double tolerance =
          u * (shape.dim * 3.0 * std::sqrt(double(shape.dim)) + 8.0 * (4.0 + double{shape.cap}));
      for (const std::string& target : simd_targets()) {
        const ScopedSimdTarget use(target);
        std::vector<float> logits(expected.size(), 1e30f);
        task.logits = logits.data();
        ASSERT_TRUE(score_rows(softmax, std::span(&task, 1), pool).ok());
        for (std::size_t i = 0; i < logits.size(); ++i) {
          ASSERT_NEAR(logits[i], expected[i], tolerance)
              << i << " of " << shape.rows << "x" << shape.dim << " " << to_string(dtype) << " "
              << target;
        }
      }
    }
  }
}

TEST(ScoreRows, SeveralTasksGiveTheSameBitsWithAnyNumberOfWorkers) {
  const Rows a(1500, 64, DType::kF16, 0, 3);
  const Rows b(700, 64, DType::kF16, 0, 4);
  const std::vector<float> queries = random_floats(4 * 64, 5);
  const auto score = [&](unsigned threads) {
    WorkerPool pool(threads);
    std::vector<float> logits(4 * 1500 + 4 * 700);
    const ScoreTask tasks[] = {{a.view, queries.data(), 64, 4, logits.data(), 1500},
                               {b.view, queries.data(), 64, 4, logits.data() + 4 * 1500, 700}};
    EXPECT_TRUE(score_rows({}, tasks, pool).ok());
    return logits;
  };
  const std::vector<float> expected = score(1);
  EXPECT_EQ(score(2), expected);
  EXPECT_EQ(score(4), expected);
}

TEST(ScoreRows, EmptyInputsAreSuccessAndOddDimsAreRefused) {
  WorkerPool pool(2);
  EXPECT_TRUE(score_rows({}, {}, pool).ok());
  ScoreTask task;
  task.query_count = 1;
  EXPECT_TRUE(score_rows({}, std::span(&task, 1), pool).ok());
  task.rows.dim = 20;
  EXPECT_EQ(score_rows({}, std::span(&task, 1), pool).code(), StatusCode::kUnsupported);
  task.rows.dim = 64;
  task.query_count = 129;
  EXPECT_EQ(score_rows({}, std::span(&task, 1), pool).code(), StatusCode::kUnsupported);
}

TEST(ScoreRows, OffsetsReachBeyondFourGiB) {
  constexpr std::size_t kStride = std::size_t{1} << 30;
  constexpr std::size_t kRows = 6;
  // Reserved, not used: only the pages of the six rows are ever touched.
  void* memory = mmap(nullptr, kRows * kStride, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) GTEST_SKIP() << "no 6 GiB of address space";
  auto* bytes = static_cast<std::byte*>(memory);
  for (std::size_t r = 0; r < kRows; ++r) {
    store_element(bytes + r * kStride, DType::kF16, 0, float(r + 1));
  }
  std::vector<float> query(64, 0.0f);
  query[0] = 2.0f;
  std::vector<float> logits(kRows);
  const ScoreTask task{
      {bytes, kRows, 64, kStride, DType::kF16}, query.data(), 64, 1, logits.data(), kRows};
  WorkerPool pool(1);
  ASSERT_TRUE(score_rows({}, std::span(&task, 1), pool).ok());
  EXPECT_EQ(logits, (std::vector<float>{2, 4, 6, 8, 10, 12}));
  munmap(memory, kRows * kStride);
}

TEST(SoftmaxRow, SumsToOneAndReturnsTheLogSumExp) {
  for (const std::size_t count : {1u, 5u, 16u, 100u, 70000u}) {
    std::vector<float> logits = random_floats(count, 6);
    for (float& logit : logits) logit = logit * 10.0f + 200.0f;
    double sum = 0.0;
    const double top = *std::max_element(logits.begin(), logits.end());
    for (const float logit : logits) sum += std::exp(double{logit} - top);
    for (const std::string& target : simd_targets()) {
      const ScopedSimdTarget use(target);
      std::vector<float> weights = logits;
      // An lse near 230 has the rounding 230 u = 1.4e-5.
      EXPECT_NEAR(softmax_row(weights), top + std::log(sum), 2e-5) << target;
      for (std::size_t i = 0; i < count; ++i) {
        const double expected = std::exp(double{logits[i]} - top) / sum;
        // logit - max is exact here, exp within 2 units of 2 u, and two more roundings; twice that.
        ASSERT_NEAR(double{weights[i]}, expected, 16 * 0x1p-24 * expected + 1e-37) << target;
      }
    }
  }
}

TEST(SoftmaxRow, EmptyAndMaskedRows) {
  EXPECT_EQ(softmax_row({}), kEmptyLse);
  std::vector<float> masked(5, kEmptyLse);
  EXPECT_EQ(softmax_row(masked), kEmptyLse);
  EXPECT_EQ(masked, std::vector<float>(5, 0.0f));
  std::vector<float> partly = {kEmptyLse, 3.0f, kEmptyLse, 3.0f, kEmptyLse};
  EXPECT_FLOAT_EQ(softmax_row(partly), 3.0f + std::log(2.0f));
  EXPECT_EQ(partly, (std::vector<float>{0.0f, 0.5f, 0.0f, 0.5f, 0.0f}));
}

TEST(MeanRows, AgreesWithFloat64OnEveryTypeAndInstructionSet) {
  for (const DType dtype : kRowDTypes) {
    for (const std::uint32_t dim : {8u, 64u, 77u, 256u}) {
      const Rows rows(29, dim, dtype, 8, dim);
      for (const std::uint32_t per_group : {1u, 4u, 8u, 64u}) {
        const std::size_t groups = (29 + per_group - 1) / per_group;
        for (const std::string& target : simd_targets()) {
          const ScopedSimdTarget use(target);
          std::vector<std::byte> means(groups * dim * size_of(dtype));
          mean_rows(rows.view, per_group, means.data());
          for (std::size_t g = 0; g < groups; ++g) {
            const std::size_t end = std::min<std::size_t>(29, (g + 1) * per_group);
            for (std::uint32_t i = 0; i < dim; ++i) {
              double sum = 0.0;
              for (std::size_t r = g * per_group; r < end; ++r) {
                sum += double{load_element(rows.view.row(r), dtype, i)};
              }
              const double expected = sum / double(end - g * per_group);
              const float mean = load_element(means.data(), dtype, g * dim + i);
              // One rounding to the type (2^-11, 2^-8) of a number up to 1; sums of 64 in float32.
              const double unit = dtype == DType::kF16    ? 0x1p-11
                                  : dtype == DType::kBF16 ? 0x1p-8
                                                          : 0;
              ASSERT_NEAR(double{mean}, expected, 0.51 * unit + 66 * 0x1p-24) << target;
            }
          }
        }
      }
    }
  }
}

TEST(MinCosineToMean, AgreesWithFloat64) {
  for (const DType dtype : kRowDTypes) {
    const Rows rows(26, 72, dtype, 0, 9);
    std::vector<std::byte> means(4 * 72 * size_of(dtype));
    mean_rows(rows.view, 8, means.data());
    for (const std::string& target : simd_targets()) {
      const ScopedSimdTarget use(target);
      std::vector<float> least(4);
      min_cosine_to_mean(rows.view, 8, means.data(), least);
      for (std::size_t g = 0; g < 4; ++g) {
        double expected = 1.0;
        for (std::size_t r = g * 8; r < std::min<std::size_t>(26, (g + 1) * 8); ++r) {
          double ab = 0, aa = 0, bb = 0;
          for (std::size_t i = 0; i < 72; ++i) {
            const double a = double{load_element(rows.view.row(r), dtype, i)};
            const double b = double{load_element(means.data(), dtype, g * 72 + i)};
            ab += a * b;
            aa += a * a;
            bb += b * b;
          }
          expected = std::min(expected, ab / std::sqrt(aa * bb));
        }
        // 72 roundings of sums no larger than |a| |b| each in three dots.
        EXPECT_NEAR(double{least[g]}, expected, 3 * 80 * 0x1p-24) << target;
      }
    }
  }
}

TEST(MinCosineToMean, AZeroVectorHasCosineZero) {
  const std::vector<float> values = {1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0};
  const RowsView rows{reinterpret_cast<const std::byte*>(values.data()), 2, 8, 32, DType::kF32};
  std::vector<float> means(8);
  mean_rows(rows, 2, reinterpret_cast<std::byte*>(means.data()));
  std::vector<float> least(1);
  min_cosine_to_mean(rows, 2, reinterpret_cast<const std::byte*>(means.data()), least);
  EXPECT_EQ(least[0], 0.0f);
}

TEST(LogSumExpColumns, AgreesWithFloat64OnEveryInstructionSet) {
  const std::vector<float> logits = random_floats(3 * 48, 6);
  const std::vector<float> offsets = {0.5f, -20.0f, 30.0f};
  for (const std::string& target : simd_targets()) {
    const ScopedSimdTarget use(target);
    for (const std::size_t rows : {1u, 3u}) {
      for (const std::size_t columns : {1u, 4u, 16u, 37u}) {
        std::vector<float> found(columns + 1, 7.0f);
        log_sum_exp_columns(logits.data(), 48, std::span(offsets).first(rows),
                            std::span(found).first(columns));
        for (std::size_t c = 0; c < columns; ++c) {
          double sum = 0.0;
          for (std::size_t r = 0; r < rows; ++r) {
            sum += std::exp(double{logits[r * 48 + c]} - double{offsets[r]});
          }
          // exp and log to two units, offsets and result rounded.
          EXPECT_NEAR(double{found[c]}, std::log(sum), 8 * 0x1p-24 * 33) << target;
        }
        EXPECT_EQ(found[columns], 7.0f) << "written behind the end";
      }
    }
  }
}

}  // namespace
}  // namespace kvtier
