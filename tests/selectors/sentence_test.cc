#include "selectors/rank_blocks.h"
#include "selectors/sentence_rows.h"
#include "tests/selectors/context.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <vector>

namespace kvtier {
namespace {

using testing::Context;
using testing::make;
using testing::select;

constexpr std::uint32_t kSentenceTokens = 400;

SelectorShape sentence_shape() {
  SelectorShape shape;
  shape.kv_heads = 1;
  shape.queries_per_kv_head = 1;
  shape.head_dim = 64;
  shape.tokens_per_block = 8;
  shape.sinks = 4;
  shape.window = 24;
  shape.softmax.scale = 0.1f;
  shape.tokens_max = kSentenceTokens;
  return shape;
}

void expect_tiled(const SentenceRows& rows, const Context& context, std::uint32_t cap) {
  std::uint32_t next = 0;
  for (std::uint32_t unit = 0; unit <= rows.closed(); ++unit) {
    EXPECT_EQ(rows.begin(unit), next);
    for (std::uint32_t t = rows.begin(unit); t < rows.end(unit); ++t) {
      ASSERT_EQ(rows.unit_of(t), unit);
      const bool ends = (context.mark(t) & kEndsSentence) != 0 || t + 1 - rows.begin(unit) == cap;
      EXPECT_EQ(ends, unit < rows.closed() && t + 1 == rows.end(unit)) << t;
    }
    next = rows.end(unit);
  }
  EXPECT_EQ(next, rows.tokens());
}

TEST(SentenceRows, UnitsTileTheContextWhateverIsAppendedAndCut) {
  const SelectorShape shape = sentence_shape();
  const Context context(shape, kSentenceTokens, 8);
  for (const std::uint32_t cap : {1u, 7u, 20u, 128u}) {
    SentenceRows rows(shape, cap);
    std::mt19937 random(cap);
    for (int i = 0; i < 200; ++i) {
      if (random() % 3 == 0) {
        const std::uint32_t position = rows.truncate_floor(
            rows.tokens() - std::min<std::uint32_t>(rows.tokens(), random() % 60));
        rows.truncate(position);
      } else {
        const std::uint32_t count =
            std::min<std::uint32_t>(kSentenceTokens - rows.tokens(), random() % 40);
        rows.append(context.keys(rows.tokens(), count));
      }
      expect_tiled(rows, context, cap);
    }
  }
}

TEST(SentenceRows, VectorsAreMeansWithoutTheSinks) {
  const SelectorShape shape = sentence_shape();
  const Context context(shape, kSentenceTokens, 9);
  SentenceRows rows(shape, 128);
  rows.append(context.keys(0, kSentenceTokens));
  rows.average_open();
  for (std::uint32_t unit = 0; unit <= rows.closed(); ++unit) {
    const std::uint32_t begin = std::max(rows.begin(unit), shape.sinks);
    const std::byte* row = rows.rows(0, unit, 1).data;
    if (begin >= rows.end(unit)) continue;
    for (std::uint32_t i = 0; i < 64; ++i) {
      double sum = 0.0;
      for (std::uint32_t t = begin; t < rows.end(unit); ++t) sum += double{context.key(t, 0, i)};
      // Rounded to float16, below 2 in magnitude.
      EXPECT_NEAR(load_element(row, shape.dtype, i), sum / (rows.end(unit) - begin), 0x1p-10);
    }
  }
}

TEST(Sentence, SentencesComeWholeInTheOrderOfTheirProducts) {
  const SelectorShape shape = sentence_shape();
  const Context context(shape, kSentenceTokens, 10);
  SentenceRows rows(shape, 128);
  rows.append(context.keys(0, kSentenceTokens));
  rows.average_open();
  const FarRegion region = FarRegion::of(shape, kSentenceTokens - 1);
  std::vector<std::uint32_t> units;
  std::vector<double> products(rows.closed() + 1);
  for (std::uint32_t u = rows.unit_of(region.begin); u <= rows.unit_of(region.end - 1); ++u) {
    units.push_back(u);
    for (std::uint32_t i = 0; i < 64; ++i) {
      products[u] += double{context.query(0, 0, i)} *
                     double{load_element(rows.rows(0, u, 1).data, shape.dtype, i)};
    }
  }
  std::ranges::sort(units, std::greater(), [&](std::uint32_t u) { return products[u]; });
  std::vector<std::uint32_t> expected;
  for (std::uint32_t u : units) {
    for (std::uint32_t t = std::max(rows.begin(u), region.begin);
         t < std::min(rows.end(u), region.end); ++t) {
      expected.push_back(t);
    }
  }
  for (const std::uint32_t far : {1u, 50u, 111u, 1000u}) {
    auto selector = make("sentence", shape);
    selector->append(context.keys(0, kSentenceTokens));
    const auto found = select(*selector, shape, context.request(kSentenceTokens - 1, 28 + far));
    std::vector<std::uint32_t> tokens;
    for (const SelectedUnit& unit : found[0].ranked) {
      for (std::uint32_t t = 0; t < unit.tokens; ++t) {
        tokens.push_back(unit.block.value * 8 + unit.first_token + t);
      }
    }
    EXPECT_EQ(tokens.size(), std::min<std::size_t>(far, expected.size()));
    EXPECT_TRUE(std::ranges::equal(tokens, std::span(expected).first(tokens.size())));
  }
}

TEST(Sentence, TheQueryIsTheMeanOverTheSentenceBeingGenerated) {
  const SelectorShape shape = sentence_shape();
  Context context(shape, kSentenceTokens, 11);
  // From 300 on: an end at 309 and no other.
  std::vector<std::uint8_t> marks(kSentenceTokens);
  for (std::uint32_t t = 0; t < kSentenceTokens; ++t) marks[t] = t < 300 ? context.mark(t) : 0;
  marks[299] = marks[309] = kEndsSentence;
  const auto append = [&](Selector& selector, std::uint32_t first, std::uint32_t count) {
    NewTokens tokens = context.keys(first, count);
    tokens.marks = marks.data() + first;
    selector.append(tokens);
  };
  auto selector = make("sentence", shape);
  append(*selector, 0, 300);
  const std::vector<float> queries = context.queries();
  const std::size_t stride = context.request(0, 0).query_stride;
  std::vector<float> sum(64);
  std::uint32_t count = 0;
  for (std::uint32_t t = 300; t < 320; ++t) {
    if (t == 310) {
      std::ranges::fill(sum, 0.0f);
      count = 0;
    }
    append(*selector, t, 1);
    ++count;
    for (std::size_t i = 0; i < 64; ++i) sum[i] += queries[t % 8 * stride + i];
    std::copy_n(queries.data() + t % 8 * stride, 64, context.queries().data());
    const auto found = select(*selector, shape, context.request(t, 150));
    // One who was never asked before, asked for the mean.
    auto other = make("sentence", shape);
    append(*other, 0, t + 1);
    for (std::size_t i = 0; i < 64; ++i) {
      context.queries()[i] = sum[i] / static_cast<float>(count);
    }
    EXPECT_EQ(found[0].ranked, select(*other, shape, context.request(t, 150))[0].ranked) << t;
  }
}

}  // namespace
}  // namespace kvtier
