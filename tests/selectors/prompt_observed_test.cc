#include "selectors/rank_blocks.h"
#include "selectors/registry.h"
#include "tests/selectors/context.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

namespace kvtier {
namespace {

using testing::Context;
using testing::make;
using testing::select;

constexpr std::uint32_t kPrompt = 200;
constexpr std::uint32_t kWithAnswer = 240;

SelectorShape observing_shape(GroupReduction reduction = GroupReduction::kSum) {
  SelectorShape shape;
  shape.kv_heads = 2;
  shape.queries_per_kv_head = 2;
  shape.tokens_per_block = 8;
  shape.sinks = 4;
  shape.window = 16;
  shape.softmax.scale = 0.2f;
  shape.reduction = reduction;
  shape.tokens_max = kWithAnswer;
  return shape;
}

/// After a prompt whose tokens [150, 200) were observed.
std::unique_ptr<Selector> observed(const std::string& name, const SelectorShape& shape,
                                   const Context& context) {
  auto selector = make(name, shape);
  selector->append(context.keys(0, kPrompt));
  context.observe(*selector, 150, 50);
  return selector;
}

/// Attention of the observed query of token `position` over the tokens up to it.
std::vector<double> weights_of(const SelectorShape& shape, const Context& context,
                               std::uint32_t query_head, std::uint32_t position) {
  std::vector<double> weights(kPrompt);
  double total = 0;
  for (std::uint32_t t = 0; t <= position; ++t) {
    double dot = 0;
    for (std::uint32_t e = 0; e < shape.head_dim; ++e) {
      dot += double{context.key(t, query_head / shape.queries_per_kv_head, e)} *
             double{context.query(position % 8, query_head, e)};
    }
    weights[t] = std::exp(dot * double{shape.softmax.scale});
    total += weights[t];
  }
  for (double& weight : weights) weight /= total;
  return weights;
}

/// Added over the observed queries of tokens [first, 200).
std::vector<double> accumulated(const SelectorShape& shape, const Context& context,
                                std::uint32_t query_head, std::uint32_t first) {
  std::vector<double> sum(kPrompt);
  for (std::uint32_t p = first; p < kPrompt; ++p) {
    const std::vector<double> weights = weights_of(shape, context, query_head, p);
    for (std::uint32_t t = 0; t < kPrompt; ++t) sum[t] += weights[t];
  }
  return sum;
}

std::vector<double> block_sums(const SelectorShape& shape, const std::vector<double>& tokens,
                               std::uint32_t blocks) {
  std::vector<double> sums(blocks);
  for (std::uint32_t t = shape.sinks; t < blocks * shape.tokens_per_block; ++t) {
    sums[t / shape.tokens_per_block] += tokens[t];
  }
  return sums;
}

std::vector<double> pooled(const std::vector<double>& tokens, std::uint32_t reach) {
  std::vector<double> result(tokens.size());
  for (std::size_t t = 0; t < tokens.size(); ++t) {
    for (std::size_t i = t - std::min<std::size_t>(t, reach);
         i <= std::min<std::size_t>(tokens.size() - 1, t + reach); ++i) {
      result[t] = std::max(result[t], tokens[i]);
    }
  }
  return result;
}

/// The ranking of a group's scored blocks, with scores in proportion to `expected`.
void expect_scores(const GroupSelection& group, const std::vector<double>& expected) {
  const double best = *std::ranges::max_element(expected);
  std::size_t scored = 0;
  for (const SelectedUnit& unit : group.ranked) {
    if (unit.block.value >= expected.size()) {
      EXPECT_GT(unit.score, 1.0f);
      continue;
    }
    ++scored;
    EXPECT_NEAR(double{unit.score}, expected[unit.block.value] / best, 1e-4);
  }
  EXPECT_EQ(scored, expected.size());
}

TEST(PromptObserved, SnapKvPoolsTheAttentionOfTheLastQueries) {
  for (const GroupReduction reduction : {GroupReduction::kSum, GroupReduction::kMax}) {
    const SelectorShape shape = observing_shape(reduction);
    const Context context(shape, kWithAnswer, 3);
    auto selector = observed("prompt-observed(queries=16,kernel=5)", shape, context);
    const auto answer = select(*selector, shape, context.request(kPrompt - 1, kPrompt));
    for (std::uint32_t head = 0; head < 2; ++head) {
      // Tokens before the last 16: 23 blocks.
      std::vector<double> expected(23);
      for (std::uint32_t h = 0; h < 2; ++h) {
        const std::vector<double> sums =
            block_sums(shape, pooled(accumulated(shape, context, 2 * head + h, 184), 2), 23);
        for (std::size_t b = 0; b < 23; ++b) {
          expected[b] = reduction == GroupReduction::kMax ? std::max(expected[b], sums[b])
                                                          : expected[b] + sums[b];
        }
      }
      expect_scores(answer[head], expected);
    }
  }
}

TEST(PromptObserved, EmsAddsWhatWasAccumulatedToWhatIsRecent) {
  const SelectorShape shape = observing_shape();
  const Context context(shape, kWithAnswer, 4);
  // The last 8 queries, and the last 32: both within the 50 observed.
  auto selector = observed("prompt-observed(score=ems,queries=8)", shape, context);
  const auto answer = select(*selector, shape, context.request(kPrompt - 1, kPrompt));
  for (std::uint32_t head = 0; head < 2; ++head) {
    std::vector<double> expected(24);
    for (std::uint32_t h = 2 * head; h < 2 * head + 2; ++h) {
      std::vector<double> tokens = accumulated(shape, context, h, 168);
      const std::vector<double> recent = accumulated(shape, context, h, 192);
      for (std::size_t t = 0; t < tokens.size(); ++t) tokens[t] = tokens[t] / 32 + recent[t] / 8;
      const std::vector<double> sums = block_sums(shape, tokens, 24);
      for (std::size_t b = 0; b < 24; ++b) expected[b] += sums[b];
    }
    // The last of the 24 blocks lies in the window, where nothing is ranked.
    const double best = *std::ranges::max_element(expected);
    ASSERT_EQ(answer[head].ranked.size(), 23u);
    for (const SelectedUnit& unit : answer[head].ranked) {
      EXPECT_NEAR(double{unit.score}, expected[unit.block.value] / best, 1e-4);
    }
  }
}

TEST(PromptObserved, EveryFourthPlaceIsARepresentatives) {
  const SelectorShape shape = observing_shape();
  const Context context(shape, kWithAnswer, 5);
  auto plain = observed("prompt-observed(queries=16)", shape, context);
  auto crushed = observed("prompt-observed(queries=16,score=kvcrush)", shape, context);
  const SelectRequest request = context.request(kPrompt - 1, kPrompt);
  const auto winners = select(*plain, shape, request);
  const auto found = select(*crushed, shape, request);
  // Signatures of the 23 blocks over the four query heads.
  std::vector<std::uint32_t> distance(23);
  for (std::uint32_t h = 0; h < 4; ++h) {
    const std::vector<double> sums =
        block_sums(shape, pooled(accumulated(shape, context, h, 184), 3), 23);
    const double mean = std::accumulate(sums.begin(), sums.end(), 0.0) / 23;
    const auto ones = std::ranges::count_if(sums, [&](double s) { return s > mean; });
    const bool majority = 2 * ones > 23;
    for (std::size_t b = 0; b < 23; ++b) distance[b] += (sums[b] > mean) != majority ? 1u : 0u;
  }
  for (std::size_t group = 0; group < 2; ++group) {
    std::vector<std::uint32_t> left;
    for (const SelectedUnit& unit : winners[group].ranked) {
      if (unit.block.value < 23) left.push_back(unit.block.value);
    }
    ASSERT_EQ(left.size(), 23u);
    std::uint32_t bucket = 0;
    std::uint32_t place = 0;
    for (const SelectedUnit& unit : found[group].ranked) {
      if (unit.block.value >= 23) continue;
      auto expected = left.begin();
      if (place % 4 == 3) {
        const auto next = [&] {
          return std::ranges::find_if(left, [&](std::uint32_t b) { return distance[b] == bucket; });
        };
        while (next() == left.end()) bucket = (bucket + 1) % 5;
        expected = next();
        bucket = (bucket + 1) % 5;
      }
      EXPECT_EQ(unit.block.value, *expected) << "place " << place;
      left.erase(expected);
      ++place;
    }
    EXPECT_EQ(place, 23u);
  }
}

TEST(PromptObserved, WhatIsNewerComesFirstNewestFirst) {
  const SelectorShape shape = observing_shape();
  const Context context(shape, kWithAnswer, 6);
  auto selector = observed("prompt-observed(queries=16)", shape, context);
  selector->append(context.keys(kPrompt, 40));
  const auto answer = select(*selector, shape, context.request(239, 240));
  // Far tokens end at 224; blocks from 23 on are the window of the prompt, and the answer.
  for (const GroupSelection& group : answer) {
    for (std::uint32_t i = 0; i < 5; ++i) EXPECT_EQ(group.ranked[i].block.value, 27 - i);
    EXPECT_LT(group.ranked[5].block.value, 23u);
  }
}

TEST(PromptObserved, TheFirstStepClosesThePrompt) {
  const SelectorShape shape = observing_shape();
  const Context context(shape, kWithAnswer, 7);
  const SelectRequest request = context.request(kPrompt - 1, kPrompt);
  auto early = make("prompt-observed(queries=16)", shape);
  early->append(context.keys(0, kPrompt));
  context.observe(*early, 150, 30);
  auto guessed = early->fork();
  const auto before = select(*early, shape, request);
  context.observe(*early, 180, 20);
  EXPECT_EQ(select(*early, shape, request)[0].ranked, before[0].ranked);
  // A hint is no step: what is observed after it still counts.
  WorkerPool pool(1);
  std::vector<GroupSelection> guess(2);
  ASSERT_TRUE(guessed->hint(request, guess, pool).ok());
  EXPECT_EQ(guess[0].ranked, before[0].ranked);
  context.observe(*guessed, 180, 20);
  auto whole = observed("prompt-observed(queries=16)", shape, context);
  EXPECT_EQ(select(*guessed, shape, request)[0].ranked, select(*whole, shape, request)[0].ranked);
}

TEST(PromptObserved, AQueryThatWasCutSaysNothing) {
  const SelectorShape shape = observing_shape();
  const Context context(shape, kWithAnswer, 8);
  const SelectRequest request = context.request(184, 185);
  // Sixteen wanted, fifteen cut: the sixteen before them are still there.
  auto cut = observed("prompt-observed(queries=16)", shape, context);
  cut->truncate(185);
  auto plain = make("prompt-observed(queries=16)", shape);
  plain->append(context.keys(0, 185));
  context.observe(*plain, 150, 35);
  EXPECT_EQ(select(*cut, shape, request)[0].ranked, select(*plain, shape, request)[0].ranked);
}

TEST(PromptObserved, WithoutAPromptItIsRecency) {
  const SelectorShape shape = observing_shape();
  const Context context(shape, kWithAnswer, 9);
  auto selector = make("prompt-observed", shape);
  auto recency = make("recency", shape);
  selector->append(context.keys(0, kPrompt));
  recency->append(context.keys(0, kPrompt));
  const SelectRequest request = context.request(kPrompt - 1, 100);
  const auto found = select(*selector, shape, request);
  const auto expected = select(*recency, shape, request);
  ASSERT_EQ(found[0].ranked.size(), expected[0].ranked.size());
  for (std::size_t i = 0; i < found[0].ranked.size(); ++i) {
    EXPECT_EQ(found[0].ranked[i].block, expected[0].ranked[i].block);
  }
  EXPECT_EQ(missing_needs(make_selector_factory("prompt-observed")->needs, {}), "prompt queries");
}

TEST(PromptObserved, QueriesThatAreNoNumbersAreRefusedByTheStep) {
  const SelectorShape shape = observing_shape();
  Context context(shape, kWithAnswer, 10);
  const std::vector<float> good = context.queries();
  context.queries()[context.request(0, 0).query_stride] = std::nanf("");
  auto selector = observed("prompt-observed(queries=16)", shape, context);
  context.queries() = good;
  WorkerPool pool(1);
  std::vector<GroupSelection> selection(2);
  EXPECT_EQ(selector->select(context.request(kPrompt - 1, kPrompt), selection, pool).code(),
            StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace kvtier
