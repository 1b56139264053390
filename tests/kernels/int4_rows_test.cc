#include "kernels/int4_rows.h"

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

struct CodedRows {
  CodedRows(std::size_t rows, std::uint32_t dim, std::uint32_t seed)
      : plain(rows * dim), tiles((rows + 15) / 16 * int4_tile_lines(dim)), scales(rows) {
    std::mt19937 random(seed);
    std::uniform_real_distribution<float> uniform(-2.0f, 2.0f);
    for (float& value : plain) value = uniform(random);
    for (std::uint32_t r = 0; r < rows; ++r) {
      quantise_int4(std::span(plain).subspan(r * dim, dim), r % 16, tile_of(r, dim), scales[r]);
    }
    view = {tiles.data(), scales.data(), rows, dim};
  }
  CodeLine* tile_of(std::uint32_t row, std::uint32_t dim) {
    return tiles.data() + row / 16 * int4_tile_lines(dim);
  }
  std::vector<float> plain;
  std::vector<CodeLine> tiles;
  std::vector<std::uint16_t> scales;
  Int4Rows view;
};

TEST(Int4Rows, AnElementIsOffByAtMostHalfAScaleThatIsASeventhOfTheLargest) {
  for (std::uint32_t dim : {8u, 64u, 80u, 128u, 576u}) {
    CodedRows rows(50, dim, dim);
    std::vector<float> back(dim);
    for (std::uint32_t r = 0; r < 50; ++r) {
      dequantise_int4(rows.tile_of(r, dim), r % 16, rows.scales[r], back);
      const float scale = bf16_to_f32(rows.scales[r]);
      float most = 0.0f;
      for (std::uint32_t i = 0; i < dim; ++i) {
        const float exact = rows.plain[r * dim + i];
        most = std::max(most, std::abs(exact));
        EXPECT_LE(std::abs(exact - back[i]), scale * 0.5f * (1.0f + 0x1p-20f)) << r << ", " << i;
      }
      EXPECT_GE(scale * 7.0f, most);
      EXPECT_LE(scale * 7.0f, most * (1.0f + 0x1p-7f));
    }
  }
}

TEST(Int4Rows, KnownCodes) {
  // The largest magnitude is 7, so the scale is 1 and integers are exact; halves go up.
  std::vector<float> row(64, 0.0f);
  row[0] = -7.0f;
  row[1] = 3.0f;
  row[16] = 2.5f;
  row[63] = -2.6f;
  std::vector<CodeLine> tile(int4_tile_lines(64), CodeLine{});
  ASSERT_EQ(tile.size(), 8u);
  std::uint16_t scale = 0;
  quantise_int4(row, 2, tile.data(), scale);
  EXPECT_EQ(bf16_to_f32(scale), 1.0f);
  // A byte for every sixteen elements, the even ones in its low half.
  EXPECT_EQ(tile[0].bytes[8], std::byte{0xb1});
  EXPECT_EQ(tile[0].bytes[9], std::byte{0x8b});
  EXPECT_EQ(tile[7].bytes[11], std::byte{0x58});
  EXPECT_EQ(tile[0].bytes[7], std::byte{0}) << "of another row";
  EXPECT_EQ(tile[0].bytes[12], std::byte{0}) << "of another row";
  std::vector<float> zeros(64, 0.0f);
  quantise_int4(zeros, 2, tile.data(), scale);
  EXPECT_EQ(scale, 0);
  EXPECT_EQ(tile[3].bytes[10], std::byte{0x88});
}

TEST(Int4Rows, ScoresAgreeWithTheReferenceOnEveryShapeAndInstructionSet) {
  struct Shape {
    std::uint32_t rows, dim, queries;
    float cap;
  };
  for (const Shape& shape :
       {Shape{1, 64, 1, 0}, Shape{3, 128, 4, 0}, Shape{515, 128, 7, 0}, Shape{1030, 64, 3, 0},
        Shape{37, 80, 5, 20}, Shape{9, 576, 2, 0}, Shape{12, 8, 128, 0}, Shape{100, 96, 1, 3}}) {
    const CodedRows rows(shape.rows, shape.dim, 3);
    std::vector<float> queries(shape.queries * (shape.dim + 3));
    std::mt19937 random(4);
    std::uniform_real_distribution<float> uniform(-3.0f, 3.0f);
    for (float& value : queries) value = uniform(random);
    const SoftmaxOptions softmax{1.0f / std::sqrt(float(shape.dim)), shape.cap};
    const std::size_t stride = (shape.rows + 15) / 16 * 16 + 5;
    std::vector<float> expected(shape.queries * stride, 7.0f);
    std::vector<float> offsets(shape.queries);
    for (float& value : offsets) value = uniform(random);
    Int4Task task{.rows = rows.view,
                  .queries = queries.data(),
                  .query_stride = shape.dim + 3u,
                  .query_count = shape.queries,
                  .offsets = shape.queries % 2 == 0 ? nullptr : offsets.data(),
                  .logits = expected.data(),
                  .logit_stride = stride};
    score_int4_reference(softmax, task);
    // Queries are off by 3 / 254 an element, elements are at most 2.02; float32 roundings are
    // smaller by far.
    const double tolerance = shape.dim * 2.02 * (3.0 / 254 + 8 * 0x1p-24) * double{softmax.scale};
    for (const std::string& target : simd_targets()) {
      const ScopedSimdTarget use(target);
      std::vector<float> logits(expected.size(), 7.0f);
      task.logits = logits.data();
      score_int4(softmax, task);
      double error = 0.0;
      for (std::size_t i = 0; i < logits.size(); ++i) {
        // What lies behind the rows up to a whole tile is scratch.
        const std::size_t row = i % stride;
        if (row >= shape.rows && row < stride - 5) continue;
        error += std::abs(double{logits[i]} - double{expected[i]});
        ASSERT_NEAR(logits[i], expected[i], tolerance)
            << i << " of " << shape.rows << "x" << shape.dim << " " << target;
      }
      // Roundings fall either way, so the mean error is far below what they could add up to.
      if (shape.dim >= 64) {
        EXPECT_LT(error / double(logits.size()), tolerance / 4.0) << target;
      }
    }
  }
}

TEST(Int4Rows, WhatIsNotFiniteStaysSo) {
  std::vector<float> row(64, 1.0f);
  row[5] = std::numeric_limits<float>::infinity();
  std::vector<CodeLine> tile(int4_tile_lines(64), CodeLine{});
  std::uint16_t scale = 0;
  quantise_int4(row, 0, tile.data(), scale);
  const std::vector<float> query(64, 1.0f);
  float logits[16] = {};
  score_int4({}, {.rows = {tile.data(), &scale, 1, 64},
                  .queries = query.data(),
                  .query_stride = 64,
                  .query_count = 1,
                  .logits = logits,
                  .logit_stride = 16});
  EXPECT_FALSE(std::isfinite(logits[0]));
}

TEST(Int4Rows, NothingToScoreIsNothingDone) {
  float logit = 7.0f;
  score_int4({}, {.rows = {nullptr, nullptr, 0, 64}, .query_count = 0, .logits = &logit});
  EXPECT_EQ(logit, 7.0f);
}

}  // namespace
}  // namespace kvtier
