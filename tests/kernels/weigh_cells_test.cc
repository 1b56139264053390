#include "kernels/weigh_cells.h"

#include "kernels/kv_view.h"
#include "kernels/simd_targets.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

namespace kvtier {
namespace {

struct alignas(64) Row {
  float logits[kCellRowTokens];
};

Row random_row(float spread) {
  std::mt19937 random(7);
  std::uniform_real_distribution<float> uniform(-spread, spread);
  Row row;
  for (float& logit : row.logits) logit = 20.0f + uniform(random);
  return row;
}

TEST(WeighCells, AgreesWithTheReferenceOnEveryShapeAndInstructionSet) {
  struct Shape {
    std::uint32_t count, begin, end, cell;
  };
  const Shape shapes[] = {{1, 0, 1, 1},         {1024, 0, 1024, 8},    {1024, 0, 1024, 1},
                          {1024, 4, 1024, 8},   {1000, 3, 997, 8},     {17, 0, 17, 16},
                          {1023, 0, 1023, 512}, {1024, 1, 1023, 1024}, {63, 62, 63, 2},
                          {100, 40, 40, 4},     {700, 699, 700, 64}};
  for (const std::string& target : simd_targets()) {
    const ScopedSimdTarget use(target);
    for (const Shape& shape : shapes) {
      for (float spread : {0.0f, 5.0f, 90.0f}) {
        Row row = random_row(spread);
        // What lies behind the row takes no part.
        std::fill(row.logits + shape.count, row.logits + kCellRowTokens, 1e30f);
        std::vector<float> expected(kCellRowTokens, -1.0f);
        std::vector<float> cells(kCellRowTokens, -1.0f);
        CellRow job{row.logits, shape.count, shape.begin, shape.end, shape.cell, expected.data()};
        const float lse = weigh_cells_reference(job);
        job.cells = cells.data();
        // The sum's rounding in float32 and that of the logarithm: 2^-18 of one, and the result's.
        ASSERT_NEAR(weigh_cells(job), lse, 0x1p-18f + 0x1p-22f * std::abs(lse)) << target;
        for (std::size_t c = 0; c < cells.size(); ++c) {
          // exp() is off by a few units in its last place, a sum of positive terms by one per
          // addition in a row (16 vectors, 6 halves), and shifted logits by half a unit of 90.
          ASSERT_NEAR(cells[c], expected[c], 0x1p-16f * std::abs(expected[c]) + 1e-37f)
              << target << " " << shape.count << " " << shape.begin << " " << shape.cell << " "
              << c;
        }
      }
    }
  }
}

TEST(WeighCells, RefusesWhatIsNotFinite) {
  for (const std::string& target : simd_targets()) {
    const ScopedSimdTarget use(target);
    for (float bad :
         {std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity(),
          std::numeric_limits<float>::quiet_NaN()}) {
      for (std::uint32_t place : {0u, 100u, 998u}) {
        Row row = random_row(1.0f);
        row.logits[place] = bad;
        std::vector<float> cells(kCellRowTokens, -1.0f);
        EXPECT_TRUE(std::isnan(weigh_cells({row.logits, 999, 0, 999, 8, cells.data()})));
        EXPECT_EQ(std::ranges::count(cells, -1.0f), std::ptrdiff_t{kCellRowTokens});
      }
    }
  }
}

TEST(WeighCells, NothingWeighsNothing) {
  Row row = random_row(1.0f);
  EXPECT_EQ(weigh_cells({.logits = row.logits}), kEmptyLse);
}

}  // namespace
}  // namespace kvtier
