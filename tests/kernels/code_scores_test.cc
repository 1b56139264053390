#include "kernels/code_scores.h"

#include "kernels/simd_targets.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

namespace kvtier {
namespace {

struct Codebook {
  Codebook(std::uint32_t dim, std::uint32_t parts, std::size_t used)
      : centroids(dim * kCodeCentroids), half_norms(parts * kCodeCentroids) {
    std::mt19937 random(dim + parts);
    std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
    for (float& value : centroids) value = uniform(random);
    view = {centroids.data(), half_norms.data(), dim, parts};
    for (std::uint32_t p = 0; p < parts; ++p) {
      for (std::size_t c = 0; c < kCodeCentroids; ++c) {
        float sum = 0.0f;
        for (std::uint32_t i = 0; i < view.part_dim(); ++i) {
          const float x = centroids[(p * view.part_dim() + i) * kCodeCentroids + c];
          sum += x * x;
        }
        half_norms[p * kCodeCentroids + c] =
            c < used ? 0.5f * sum : std::numeric_limits<float>::infinity();
      }
    }
  }
  double distance(const float* row, std::uint32_t part, std::size_t c) const {
    double sum = 0.0;
    for (std::uint32_t i = part * view.part_dim(); i < (part + 1) * view.part_dim(); ++i) {
      const double gap = double{row[i]} - double{centroids[i * kCodeCentroids + c]};
      sum += gap * gap;
    }
    return sum;
  }
  std::vector<float> centroids;
  std::vector<float> half_norms;
  CodebookView view;
};

std::vector<float> some_floats(std::size_t count, std::uint32_t seed) {
  std::mt19937 random(seed);
  std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
  std::vector<float> floats(count);
  for (float& value : floats) value = uniform(random);
  return floats;
}

TEST(CodeScores, TheNearestCentroidIsFoundOnEveryInstructionSet) {
  for (const auto& [dim, parts, used] :
       {std::tuple{64u, 8u, 256u}, {128u, 1u, 256u}, {80u, 8u, 3u}, {96u, 32u, 200u}}) {
    const Codebook codebook(dim, parts, used);
    constexpr std::size_t kRows = 40;
    const std::vector<float> rows = some_floats(kRows * dim, 1);
    std::vector<std::uint8_t> expected(kRows * parts);
    nearest_codes_reference(codebook.view, rows.data(), kRows, expected.data());
    for (const std::string& target : simd_targets()) {
      const ScopedSimdTarget use(target);
      std::vector<std::uint8_t> codes(kRows * parts);
      nearest_codes(codebook.view, rows.data(), kRows, codes.data());
      for (std::size_t i = 0; i < codes.size(); ++i) {
        ASSERT_LT(codes[i], used);
        // Not the code itself: two centroids may be equally near but for rounding.
        const float* row = rows.data() + i / parts * dim;
        const auto part = static_cast<std::uint32_t>(i % parts);
        ASSERT_NEAR(codebook.distance(row, part, codes[i]),
                    codebook.distance(row, part, expected[i]), dim * 8 * 0x1p-24)
            << target;
      }
    }
  }
}

TEST(CodeScores, ScoresAgreeWithTheReferenceOnEveryInstructionSet) {
  for (const auto& [rows, dim, parts, queries, cap] : {std::tuple{1u, 64u, 8u, 1u, 0.0f},
                                                       {2050u, 64u, 4u, 4u, 0.0f},
                                                       {33u, 80u, 8u, 7u, 5.0f},
                                                       {1000u, 128u, 16u, 14u, 0.0f},
                                                       {0u, 64u, 8u, 3u, 0.0f}}) {
    const Codebook codebook(dim, parts, 256);
    std::mt19937 random(9);
    std::vector<std::uint8_t> codes(rows * parts);
    for (std::uint8_t& code : codes) code = static_cast<std::uint8_t>(random());
    const std::vector<float> asked = some_floats(queries * (dim + 1), 5);
    const std::size_t stride = rows + 3;
    std::vector<float> expected(queries * stride, 9.0f);
    std::vector<float> tables(code_table_size(queries, parts));
    CodeTask task{.codes = codes.data(),
                  .rows = rows,
                  .codebook = codebook.view,
                  .queries = asked.data(),
                  .query_stride = dim + 1,
                  .query_count = queries,
                  .tables = tables.data(),
                  .logits = expected.data(),
                  .logit_stride = stride};
    const SoftmaxOptions softmax{0.5f, cap};
    score_codes_reference(softmax, task);
    for (const std::string& target : simd_targets()) {
      const ScopedSimdTarget use(target);
      std::vector<float> logits(expected.size(), 9.0f);
      task.logits = logits.data();
      fill_code_tables(task);
      score_codes(softmax, task);
      for (std::size_t i = 0; i < logits.size(); ++i) {
        // dim roundings of products of at most 1, and a few for scale and cap.
        ASSERT_NEAR(logits[i], expected[i], (dim + 8) * dim * 0x1p-24) << i << " " << target;
      }
    }
  }
}

}  // namespace
}  // namespace kvtier
