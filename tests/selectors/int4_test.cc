#include "kernels/int4_rows.h"
#include "selectors/rank_blocks.h"
#include "tests/selectors/context.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <vector>

namespace kvtier {
namespace {

using testing::Context;
using testing::make;
using testing::select;

SelectorShape int4_shape(std::uint32_t tokens) {
  SelectorShape shape;
  shape.kv_heads = 2;
  shape.queries_per_kv_head = 3;
  shape.head_dim = 64;
  shape.tokens_per_block = 4;
  shape.sinks = 5;
  shape.window = 20;
  shape.softmax.scale = 0.3f;
  shape.tokens_max = tokens;
  return shape;
}

/// Weights of one query head over all tokens, from keys coded as documented, in float64.
std::vector<double> coded_weights(const SelectorShape& shape, const Context& context,
                                  std::uint32_t query_head) {
  const std::uint32_t head = query_head / shape.queries_per_kv_head;
  const std::uint32_t first = std::min(context.tokens(), shape.sinks + 256);
  std::vector<double> mean(shape.head_dim);
  for (std::uint32_t t = shape.sinks; t < first; ++t) {
    for (std::uint32_t i = 0; i < shape.head_dim; ++i) mean[i] += double{context.key(t, head, i)};
  }
  std::vector<double> weights;
  std::vector<float> row(shape.head_dim);
  std::vector<CodeLine> tile(int4_tile_lines(shape.head_dim));
  for (std::uint32_t t = 0; t < context.tokens(); ++t) {
    for (std::uint32_t i = 0; i < shape.head_dim; ++i) {
      row[i] = context.key(t, head, i) - static_cast<float>(mean[i] / (first - shape.sinks));
    }
    std::uint16_t scale = 0;
    quantise_int4(row, t % 16, tile.data(), scale);
    dequantise_int4(tile.data(), t % 16, scale, row);
    double dot = 0.0;
    for (std::uint32_t i = 0; i < shape.head_dim; ++i) {
      dot += double{context.query(0, query_head, i)} * double{row[i]};
    }
    weights.push_back(std::exp(dot * double{shape.softmax.scale}));
  }
  double sum = 0.0;
  for (double weight : weights) sum += weight;
  for (double& weight : weights) weight /= sum;
  return weights;
}

// The mean is that of what is there in the small context, of the first 256 in the large one.
TEST(Int4Selector, ScoresAreWeightsOfTheCodedKeys) {
  for (const std::uint32_t tokens : {150u, 500u}) {
    const SelectorShape shape = int4_shape(tokens);
    const Context context(shape, tokens, 5);
    auto selector = make("int4", shape);
    selector->append(context.keys(0, tokens));
    const auto found = select(*selector, shape, context.request(tokens - 1, tokens));
    for (std::uint32_t group = 0; group < 2; ++group) {
      std::vector<double> votes(tokens);
      for (std::uint32_t h = 0; h < 3; ++h) {
        const std::vector<double> weights = coded_weights(shape, context, group * 3 + h);
        for (std::uint32_t t = 0; t < tokens; ++t) votes[t] += weights[t];
      }
      double mass = 0.0;
      for (const SelectedUnit& unit : found[group].ranked) {
        double expected = 0.0;
        const std::uint32_t begin = unit.block.value * 4 + unit.first_token;
        for (std::uint32_t t = begin; t < begin + unit.tokens; ++t) expected += votes[t];
        // A code may round the other way where our mean differs in its last bit: half a scale of
        // one element, a hundredth of a logit.
        EXPECT_NEAR(unit.score, expected, 0.03 * expected) << tokens << ", " << begin;
        mass += expected;
      }
      EXPECT_NEAR(found[group].mass, mass, 0.01 * mass);
    }
  }
}

TEST(Int4Selector, TheThresholdChoosesWhatPassesUpToTheBudget) {
  constexpr std::uint32_t kTokens = 400;
  const SelectorShape shape = int4_shape(kTokens);
  const Context context(shape, kTokens, 6);
  const FarRegion region = FarRegion::of(shape, kTokens - 1);
  std::uint32_t least = kTokens;
  std::uint32_t most = 0;
  for (const double threshold : {0.001, 0.02, 0.3, 1.0}) {
    auto selector = make(fmt::format("int4(threshold={})", threshold), shape);
    selector->append(context.keys(0, kTokens));
    const auto found = select(*selector, shape, context.request(kTokens - 1, kTokens));
    for (std::uint32_t group = 0; group < 2; ++group) {
      // Blocks that surely pass, and that surely do not: weights are known to a few per cent.
      std::vector<bool> sure(kTokens / 4 + 1);
      std::vector<bool> possible(kTokens / 4 + 1);
      for (std::uint32_t h = 0; h < 3; ++h) {
        const std::vector<double> weights = coded_weights(shape, context, group * 3 + h);
        double always = 0.0;
        for (std::uint32_t t = 0; t < kTokens; ++t) {
          if (t < region.begin || t >= region.end) always += weights[t];
        }
        for (std::uint32_t t = region.begin; t < region.end; ++t) {
          if (weights[t] >= 1.05 * threshold * always) sure[t / 4] = true;
          if (weights[t] >= 0.95 * threshold * always) possible[t / 4] = true;
        }
      }
      const std::span chosen(found[group].ranked.data(), found[group].chosen);
      for (const SelectedUnit& unit : chosen) EXPECT_TRUE(possible[unit.block.value]);
      const auto wanted = static_cast<std::uint32_t>(std::ranges::count(sure, true));
      EXPECT_GE(chosen.size(), wanted);
      least = std::min(least, found[group].chosen);
      most = std::max(most, found[group].chosen);
      // Capped by the budget, best first.
      const auto capped =
          select(*selector, shape, context.request(kTokens - 1, shape.sinks + shape.window + 8));
      EXPECT_LE(capped[group].chosen, 3u);
      EXPECT_TRUE(std::ranges::equal(std::span(capped[group].ranked).first(capped[group].chosen),
                                     chosen.first(capped[group].chosen)));
    }
  }
  // The thresholds were such that something was decided.
  EXPECT_LT(least, 20u);
  EXPECT_GT(most, 40u);
}

TEST(Int4Selector, MetadataIsHalfAByteAnElementAndAScaleAToken) {
  constexpr std::uint32_t kTokens = 1000;
  const SelectorShape shape = int4_shape(kTokens);
  const Context context(shape, kTokens, 7);
  auto selector = make("int4", shape);
  selector->append(context.keys(0, 600));
  const std::size_t before = selector->metadata_bytes();
  selector->append(context.keys(600, 400));
  EXPECT_EQ(selector->metadata_bytes() - before, 400u * 2 * (64 / 2 + 2));
  // The first 256 and the sinks as float16, a mean per head.
  EXPECT_EQ(before, 600u * 2 * 34 + 2 * (261 * 128 + 64 * 4));
}

}  // namespace
}  // namespace kvtier
