#include "selectors/rank_blocks.h"
#include "selectors/vq_codebook.h"
#include "tests/selectors/context.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <ctime>
#include <random>
#include <vector>

namespace kvtier {
namespace {

using testing::Context;
using testing::make;
using testing::select;

SelectorShape vq_shape(std::uint32_t tokens, std::uint32_t dim) {
  SelectorShape shape;
  shape.kv_heads = 1;
  shape.queries_per_kv_head = 2;
  shape.head_dim = dim;
  shape.tokens_per_block = 4;
  shape.sinks = 4;
  shape.window = 16;
  shape.softmax.scale = 0.3f;
  shape.tokens_max = tokens;
  return shape;
}

float unit_random(std::mt19937& random) {
  return static_cast<float>(random() >> 8) * 0x1p-23f - 1.0f;
}

/// Sum of q q', lower triangle.
std::vector<float> sum_of_squares(const std::vector<float>& queries, std::size_t dim) {
  std::vector<float> sum(dim * dim);
  for (std::size_t q = 0; q < queries.size(); q += dim) {
    for (std::size_t i = 0; i < dim; ++i) {
      for (std::size_t j = 0; j <= i; ++j) sum[i * dim + j] += queries[q + i] * queries[q + j];
    }
  }
  return sum;
}

TEST(VqCodebook, MetricSpaceKeepsProducts) {
  std::mt19937 random(1);
  std::vector<float> queries(50 * 16);
  for (float& value : queries) value = unit_random(random);
  VqCodebook codebook(16, 4);
  codebook.set_metric(sum_of_squares(queries, 16), 50);
  std::vector<float> key(16);
  for (float& value : key) value = unit_random(random);
  std::vector<float> other_key(16);
  std::vector<float> other_query(16);
  codebook.transform_key(key.data(), other_key.data());
  codebook.transform_query(queries.data(), other_query.data());
  double expected = 0.0, found = 0.0;
  for (std::size_t i = 0; i < 16; ++i) {
    expected += double{queries[i]} * double{key[i]};
    found += double{other_query[i]} * double{other_key[i]};
  }
  EXPECT_NEAR(found, expected, 1e-4);
  EXPECT_NE(other_key, key);
}

/// Mean squared error of products of `queries` with coded keys.
double product_error(VqCodebook& codebook, const std::vector<float>& keys,
                     const std::vector<float>& queries, std::size_t dim, std::uint32_t parts) {
  WorkerPool pool(1);
  const auto count = static_cast<std::uint32_t>(keys.size() / dim);
  VqCodebook::Scratch scratch(static_cast<std::uint32_t>(dim), parts);
  for (std::size_t k = 0; k < count; ++k) {
    codebook.transform_key(keys.data() + k * dim, scratch.rows.data() + k * dim);
  }
  codebook.train(scratch, count, pool);
  std::vector<std::uint8_t> codes(count * parts);
  nearest_codes(codebook.view(), scratch.rows.data(), count, codes.data());
  double error = 0.0;
  std::vector<float> query(dim);
  for (std::size_t q = 0; q < queries.size(); q += dim) {
    codebook.transform_query(queries.data() + q, query.data());
    for (std::size_t k = 0; k < count; ++k) {
      double gap = 0.0;
      for (std::size_t i = 0; i < dim; ++i) {
        const std::uint8_t code = codes[k * parts + i / (dim / parts)];
        gap += double{queries[q + i]} * double{keys[k * dim + i]} -
               double{query[i]} * double{codebook.view().centroids[i * kCodeCentroids + code]};
      }
      error += gap * gap;
    }
  }
  return error / static_cast<double>(count * queries.size() / dim);
}

// The point of the metric: precise in the directions that queries look, at the cost of others.
TEST(VqCodebook, TheMetricOfTheQueriesLowersTheErrorOfTheirProducts) {
  constexpr std::size_t kDim = 32;
  std::mt19937 random(2);
  std::vector<float> keys(1500 * kDim);
  for (float& value : keys) value = unit_random(random);
  // Queries look in few directions, none of them along an axis.
  std::vector<float> directions(3 * kDim);
  for (float& value : directions) value = unit_random(random);
  std::vector<float> queries(200 * kDim);
  for (std::size_t q = 0; q < 200; ++q) {
    for (std::size_t d = 0; d < 3; ++d) {
      const float weight = unit_random(random);
      for (std::size_t i = 0; i < kDim; ++i) {
        queries[q * kDim + i] += weight * directions[d * kDim + i];
      }
    }
  }
  VqCodebook plain(kDim, 4);
  VqCodebook aware(kDim, 4);
  aware.set_metric(sum_of_squares(queries, kDim), 200);
  EXPECT_LT(product_error(aware, keys, queries, kDim, 4),
            0.5 * product_error(plain, keys, queries, kDim, 4));
}

TEST(VqCodebook, TrainingIsDeterministicAndLowersTheError) {
  std::mt19937 random(3);
  std::vector<float> keys(1000 * 16);
  for (float& value : keys) value = unit_random(random);
  VqCodebook::Scratch scratch(16, 2);
  std::copy(keys.begin(), keys.end(), scratch.rows.data());
  VqCodebook one(16, 2);
  VqCodebook two(16, 2);
  WorkerPool single(1);
  WorkerPool pair(2);
  one.train(scratch, 1000, single);
  two.train(scratch, 1000, pair);
  for (std::size_t i = 0; i < 16 * kCodeCentroids; ++i) {
    ASSERT_EQ(one.view().centroids[i], two.view().centroids[i]);
  }
  const auto error = [&](const CodebookView& view) {
    std::vector<std::uint8_t> codes(2000);
    nearest_codes(view, keys.data(), 1000, codes.data());
    double sum = 0.0;
    for (std::size_t i = 0; i < keys.size(); ++i) {
      const std::uint8_t code = codes[i / 16 * 2 + i % 16 / 8];
      const double gap = double{keys[i]} - double{view.centroids[i % 16 * kCodeCentroids + code]};
      sum += gap * gap;
    }
    return sum;
  };
  // The evenly spread keys that it starts from are every fourth or so.
  VqCodebook start(16, 2);
  for (std::size_t c = 0; c < 256; ++c) {
    std::copy_n(keys.data() + c * 1000 / 256 * 16, 16, scratch.rows.data() + c * 16);
  }
  start.train(scratch, 256, single);
  EXPECT_LT(error(one.view()), 0.9 * error(start.view()));
}

// Up to 256 keys each is a centroid, so that scores are exact.
TEST(Vq, AFewKeysAreScoredExactly) {
  constexpr std::uint32_t kTokens = 256;
  SelectorShape shape = vq_shape(kTokens, 64);
  shape.sinks = 0;
  shape.queries_per_kv_head = 1;  // Each head's weights have a sum of their own.
  const Context context(shape, kTokens, 4);
  for (const bool observed : {false, true}) {
    auto selector = make("vq", shape);
    auto oracle = make("oracle", shape);
    selector->append(context.keys(0, kTokens));
    oracle->append(context.keys(0, kTokens));
    if (observed) context.observe(*selector, 100, 100);
    // At 255 the far region ends at 240: trained on 128 of them.
    const auto found = select(*selector, shape, context.request(kTokens - 1, kTokens));
    const auto expected = select(*oracle, shape, context.request(kTokens - 1, kTokens));
    // Within what was trained on, ratios are those of the true weights.
    const auto ratio = [](const std::vector<GroupSelection>& selection, std::uint32_t block) {
      const auto at = [&](std::uint32_t b) {
        return std::ranges::find(selection[0].ranked, BlockIndex(b), &SelectedUnit::block)->score;
      };
      return double{at(block)} / double{at(0)};
    };
    for (std::uint32_t block = 0; block < 32; ++block) {
      EXPECT_NEAR(ratio(found, block) / ratio(expected, block), 1.0, 0.02) << block;
    }
  }
}

TEST(Vq, TheFinalCodebookLetsGoOfTheKeysAndACutBeforeItStartsOver) {
  constexpr std::uint32_t kTokens = 4400;
  const SelectorShape shape = vq_shape(kTokens, 16);
  const Context context(shape, kTokens, 5);
  auto selector = make("vq(parts=2)", shape);
  selector->append(context.keys(0, 4300));
  const std::size_t before = selector->metadata_bytes();
  select(*selector, shape, context.request(4299, 400));
  EXPECT_EQ(before - selector->metadata_bytes(), 4300u * 16 * 2);
  // Two bytes of codes a token; 256 centroids of 16, and half norms of two parts.
  EXPECT_EQ(selector->metadata_bytes(), 4300u * 2 + 256 * (16 + 2) * 4);
  selector->append(context.keys(4300, 20));
  EXPECT_EQ(selector->metadata_bytes(), 4320u * 2 + 256 * (16 + 2) * 4);
  EXPECT_EQ(selector->truncate_floor(4300), 4300u);
  EXPECT_EQ(selector->truncate_floor(4299), 0u);
  testing::cut(*selector, context, 4290);
  auto undisturbed = make("vq(parts=2)", shape);
  undisturbed->append(context.keys(0, 4290));
  const SelectRequest request = context.request(4289, 400);
  EXPECT_EQ(select(*selector, shape, request)[0].ranked,
            select(*undisturbed, shape, request)[0].ranked);
}

TEST(Vq, AGuessDoesNotMakeTheCodebookFinal) {
  constexpr std::uint32_t kTokens = 4200;
  const SelectorShape shape = vq_shape(kTokens, 16);
  const Context context(shape, kTokens, 6);
  auto selector = make("vq(parts=2)", shape);
  selector->append(context.keys(0, kTokens));
  const std::size_t before = selector->metadata_bytes();
  WorkerPool pool(1);
  std::vector<GroupSelection> guess(1);
  ASSERT_TRUE(selector->hint(context.request(kTokens - 1, 100), guess, pool).ok());
  EXPECT_EQ(selector->metadata_bytes(), before);
  EXPECT_EQ(selector->truncate_floor(10), 10u);
}

// Processor time, since the machine may be busy; the bound is twice what linear would be.
TEST(Vq, TrainingOnThePromptTakesTimeLinearInIt) {
  const auto seconds = [](std::uint32_t tokens) {
    const SelectorShape shape = vq_shape(tokens, 16);
    const Context context(shape, tokens, 7);
    auto selector = make("vq(parts=2)", shape);
    selector->append(context.keys(0, tokens));
    const std::clock_t start = std::clock();
    select(*selector, shape, context.request(tokens - 1, 400));
    return static_cast<double>(std::clock() - start) / CLOCKS_PER_SEC;
  };
  const double one = seconds(8192);
  EXPECT_LT(seconds(8 * 8192), 16 * one);
}

TEST(Vq, PartsMustDivideTheHead) {
  const auto factory = make_selector_factory("vq(parts=5)");
  ASSERT_TRUE(factory.ok());
  EXPECT_EQ((*factory)(vq_shape(100, 64), LayerIndex(0)).status().code(),
            StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace kvtier
