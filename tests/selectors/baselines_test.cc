#include "selectors/rank_blocks.h"
#include "selectors/rank_tokens.h"
#include "selectors/registry.h"
#include "tests/selectors/context.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

// `full`, `external` and the oracle of single tokens: what each promises beyond the contract.

namespace kvtier {
namespace {

using testing::Context;
using testing::make;
using testing::select;

SelectorShape plain_shape() {
  SelectorShape shape;
  shape.kv_heads = 2;
  shape.queries_per_kv_head = 2;
  shape.tokens_per_block = 8;
  shape.sinks = 4;
  shape.window = 16;
  shape.softmax.scale = 0.2f;
  shape.tokens_max = 200;
  return shape;
}

std::uint32_t token_of(const SelectedUnit& unit, const SelectorShape& shape) {
  return unit.block.value * shape.tokens_per_block + unit.first_token;
}

TEST(RankTokens, BestFirstEarlierOfEqualsUntilTheBudgetAndTheBandEnd) {
  const std::vector<float> scores = {1, 5, 3, 5, 2};
  std::vector<std::uint32_t> order(5);
  GroupSelection result;
  rank_tokens({.scores = scores,
               .region = {6, 11},
               .tokens_per_block = 4,
               .far_budget_tokens = 2,
               .band_tokens = 2},
              order, result);
  EXPECT_EQ(result.chosen, 2u);
  const std::vector<SelectedUnit> expected = {{BlockIndex(1), 3, 1, 5},
                                              {BlockIndex(2), 1, 1, 5},
                                              {BlockIndex(2), 0, 1, 3},
                                              {BlockIndex(2), 2, 1, 2}};
  EXPECT_EQ(result.ranked, expected);
}

TEST(Full, GoesFromTheStartAsFarAsTheBudgetGoes) {
  const SelectorShape shape = plain_shape();
  const Context context(shape, 200, 3);
  auto selector = make("full", shape);
  selector->append(context.keys(0, 200));
  // Sinks 0-3, window 184-199; 4 + 8 + 8 tokens of the first three blocks fit into 24.
  const auto answer = select(*selector, shape, context.request(199, 20 + 24));
  for (const GroupSelection& group : answer) {
    ASSERT_EQ(group.ranked.size(), 3u);
    for (std::uint32_t i = 0; i < 3; ++i) EXPECT_EQ(group.ranked[i].block.value, i);
    EXPECT_EQ(group.ranked[0].first_token, 4u);
    EXPECT_EQ(group.mass, 0.0f);
  }
}

// The definition: no other choice of as many tokens has more mass.
TEST(OracleOfTokens, RanksTokensByTheirTrueMass) {
  for (const GroupReduction reduction : {GroupReduction::kSum, GroupReduction::kMax}) {
    SelectorShape shape = plain_shape();
    shape.reduction = reduction;
    const Context context(shape, 200, 3);
    auto selector = make("oracle(granularity=token)", shape);
    selector->append(context.keys(0, 200));
    const auto answer = select(*selector, shape, context.request(199, 20 + 30));
    for (std::uint32_t head = 0; head < shape.kv_heads; ++head) {
      std::vector<double> mass(200);
      for (std::uint32_t h = 0; h < 2; ++h) {
        std::vector<double> weights(200);
        double total = 0;
        for (std::uint32_t t = 0; t < 200; ++t) {
          double dot = 0;
          for (std::uint32_t e = 0; e < shape.head_dim; ++e) {
            dot += double{context.key(t, head, e)} * double{context.query(0, 2 * head + h, e)};
          }
          weights[t] = std::exp(0.2 * dot);
          total += weights[t];
        }
        for (std::uint32_t t = 0; t < 200; ++t) {
          const double weight = weights[t] / total;
          mass[t] =
              reduction == GroupReduction::kMax ? std::max(mass[t], weight) : mass[t] + weight;
        }
      }
      std::vector<double> far(mass.begin() + 4, mass.begin() + 184);
      std::ranges::sort(far, std::greater());
      const GroupSelection& group = answer[head];
      ASSERT_EQ(group.chosen, 30u);
      double all = 0;
      for (double m : far) all += m;
      EXPECT_NEAR(double{group.mass}, all, 1e-4 * all);
      for (std::size_t i = 0; i < 30; ++i) {
        EXPECT_NEAR(double{group.ranked[i].score}, far[i], 1e-4 * far[i]);
        EXPECT_NEAR(mass[token_of(group.ranked[i], shape)], far[i], 1e-4 * far[i]);
      }
    }
  }
}

TEST(OracleOfTokens, FindsAtLeastWhatTheOracleOfBlocksFinds) {
  const SelectorShape shape = plain_shape();
  const Context context(shape, 200, 4);
  auto tokens = make("oracle(granularity=token)", shape);
  auto blocks = make("oracle", shape);
  tokens->append(context.keys(0, 200));
  blocks->append(context.keys(0, 200));
  const SelectRequest request = context.request(199, 20 + 40);
  const auto fine = select(*tokens, shape, request);
  const auto coarse = select(*blocks, shape, request);
  const auto found = [](const GroupSelection& group) {
    float sum = 0;
    for (std::uint32_t i = 0; i < group.chosen; ++i) sum += group.ranked[i].score;
    return sum;
  };
  for (std::size_t i = 0; i < fine.size(); ++i) {
    EXPECT_GT(found(fine[i]), found(coarse[i]));
    EXPECT_NEAR(fine[i].mass, coarse[i].mass, 1e-4f * fine[i].mass);
  }
}

TEST(External, RanksTokensExactlyByTheScoresGiven) {
  const SelectorShape shape = plain_shape();
  const Context context(shape, 200, 3);
  auto selector = make("external", shape);
  selector->append(context.keys(0, 200));
  SelectRequest request = context.request(199, 20 + 50);
  const auto answer = select(*selector, shape, request);
  for (std::uint32_t group = 0; group < 2; ++group) {
    const float* scores = request.external.scores + group * request.external.group_stride;
    std::vector<std::uint32_t> order;
    for (std::uint32_t t = 4; t < 184; ++t) order.push_back(t);
    std::ranges::sort(order, [&](std::uint32_t a, std::uint32_t b) {
      return scores[a] != scores[b] ? scores[a] > scores[b] : a < b;
    });
    ASSERT_EQ(answer[group].ranked.size(), 50u);
    for (std::size_t i = 0; i < 50; ++i) {
      EXPECT_EQ(token_of(answer[group].ranked[i], shape), order[i]);
      EXPECT_EQ(answer[group].ranked[i].score, scores[order[i]]);
    }
  }
}

TEST(External, BlocksTakeTheBestOrTheSumOfTheirTokens) {
  SelectorShape shape = plain_shape();
  shape.sinks = 2;
  shape.window = 2;
  shape.tokens_per_block = 4;
  const Context context(shape, 14, 3);
  // Blocks [2,4) [4,8) [8,12): best 0.5, 3, 2; sums 0.75, 3, 8.
  const std::vector<float> scores = {9, 9, 0.25f, 0.5f, 3, 0, 0, 0, 2, 2, 2, 2, 9, 9};
  SelectRequest request = context.request(13, 14);
  request.external = {.scores = scores.data(), .group_stride = 0, .tokens = 14};
  const auto ranked = [&](const char* name) {
    auto selector = make(name, shape);
    selector->append(context.keys(0, 14));
    const auto answer = select(*selector, shape, request);
    // One row of scores for all groups.
    EXPECT_EQ(answer[0].ranked, answer[1].ranked);
    return answer[0].ranked;
  };
  const std::vector<SelectedUnit> best = {
      {BlockIndex(1), 0, 4, 3}, {BlockIndex(2), 0, 4, 2}, {BlockIndex(0), 2, 2, 0.5f}};
  EXPECT_EQ(ranked("external(granularity=block)"), best);
  const std::vector<SelectedUnit> sums = {
      {BlockIndex(2), 0, 4, 8}, {BlockIndex(1), 0, 4, 3}, {BlockIndex(0), 2, 2, 0.75f}};
  EXPECT_EQ(ranked("external(granularity=block,pool=sum)"), sums);
}

TEST(External, TokensWithoutAScoreAndMaskedOnesComeLast) {
  const SelectorShape shape = plain_shape();
  const Context context(shape, 200, 3);
  auto selector = make("external", shape);
  selector->append(context.keys(0, 200));
  std::vector<float> scores(100, -1e30f);
  scores[50] = -std::numeric_limits<float>::infinity();
  SelectRequest request = context.request(199, 200);
  request.external = {.scores = scores.data(), .group_stride = 0, .tokens = 100};
  const auto answer = select(*selector, shape, request);
  ASSERT_EQ(answer[0].chosen, 180u);
  for (std::size_t i = 0; i < 95; ++i) {
    EXPECT_LT(token_of(answer[0].ranked[i], shape), 100u);
    EXPECT_NE(token_of(answer[0].ranked[i], shape), 50u);
  }
  EXPECT_EQ(token_of(answer[0].ranked[95], shape), 50u);
}

TEST(External, SaysWhatIsMissingOrWrong) {
  const SelectorShape shape = plain_shape();
  const Context context(shape, 200, 3);
  auto selector = make("external", shape);
  selector->append(context.keys(0, 200));
  WorkerPool pool(1);
  std::vector<GroupSelection> selection(2);
  SelectRequest request = context.request(199, 100);
  const ExternalScores given = request.external;
  request.external = {};
  const Status missing = selector->select(request, selection, pool);
  EXPECT_EQ(missing.code(), StatusCode::kInvalidArgument);
  EXPECT_NE(missing.message().find("SelectRequest::external"), std::string::npos);
  for (float bad : {std::nanf(""), std::numeric_limits<float>::infinity()}) {
    std::vector<float> scores(200, 1.0f);
    scores[77] = bad;
    request.external = {.scores = scores.data(), .group_stride = 0, .tokens = 200};
    EXPECT_EQ(selector->select(request, selection, pool).code(), StatusCode::kInvalidArgument);
    // Among the sinks nobody looks at it.
    scores[77] = 1.0f;
    scores[1] = bad;
    EXPECT_TRUE(selector->select(request, selection, pool).ok());
  }
  request.external = given;
  EXPECT_TRUE(selector->select(request, selection, pool).ok());
  EXPECT_EQ(missing_needs(make_selector_factory("external").value().needs, {}), "external scores");
}

}  // namespace
}  // namespace kvtier
