#include "selectors/activation_stats.h"
#include "selectors/entropy_budget.h"
#include "selectors/probe_query.h"
#include "selectors/rank_blocks.h"
#include "tests/selectors/context.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

namespace kvtier {
namespace {

using testing::Context;
using testing::make;
using testing::select;

constexpr std::uint32_t kProbeTokens = 500;

SelectorShape probe_shape() {
  SelectorShape shape;
  shape.kv_heads = 2;
  shape.heads_per_group = 2;
  shape.queries_per_kv_head = 2;
  shape.head_dim = 64;
  shape.tokens_per_block = 8;
  shape.sinks = 4;
  shape.window = 20;
  shape.tokens_max = kProbeTokens;
  return shape;
}

/// Cosine over all heads of `probe` and the mean key of tokens [begin, end), in float64.
double plain_cosine(const Context& context, const std::vector<double>& probe, std::uint32_t begin,
                    std::uint32_t end) {
  double dot = 0.0, keys = 0.0, probes = 0.0;
  for (std::uint32_t h = 0; h < 4; ++h) {
    for (std::uint32_t i = 0; i < 64; ++i) {
      double mean = 0.0;
      for (std::uint32_t t = begin; t < end; ++t) mean += double{context.key(t, h / 2, i)};
      mean /= end - begin;
      const double q = probe[h * 64 + i];
      dot += q * mean;
      keys += mean * mean;
      probes += q * q;
    }
  }
  return dot / std::sqrt(keys * probes);
}

void expect_scores(const GroupSelection& group, const Context& context,
                   const std::vector<double>& probe) {
  ASSERT_FALSE(group.ranked.empty());
  for (const SelectedUnit& unit : group.ranked) {
    const std::uint32_t first = unit.block.value * 8 / 32 * 32;
    const double expected =
        plain_cosine(context, probe, std::max(first, 4u), std::min(first + 32, kProbeTokens));
    EXPECT_NEAR(unit.score, expected, 2e-3) << unit.block.value;  // Means are float16.
  }
}

TEST(Probe, OfOneTokenIsThatTokensQuery) {
  const SelectorShape shape = probe_shape();
  const Context context(shape, kProbeTokens, 3);
  std::vector<double> query(4 * 64);
  for (std::size_t i = 0; i < query.size(); ++i)
    query[i] = double{context.request(0, 0).queries[i]};
  auto selector = make("probe", shape);
  selector->append(context.keys(0, kProbeTokens));
  expect_scores(select(*selector, shape, context.request(kProbeTokens - 1, kProbeTokens))[0],
                context, query);
  // Whatever it has learnt of prompts and steps.
  context.observe(*selector, 100, 300);
  select(*selector, shape, context.request(490, kProbeTokens, 4));
  expect_scores(select(*selector, shape, context.request(kProbeTokens - 1, kProbeTokens))[0],
                context, query);
}

TEST(Probe, OfSeveralWeighsEachByHowUnusualItIs) {
  const SelectorShape shape = probe_shape();
  const Context context(shape, kProbeTokens, 4);
  constexpr std::size_t kChannels = 4 * 64;
  const SelectRequest request = context.request(kProbeTokens - 3, kProbeTokens, 3);
  const auto query = [&](std::size_t q, std::size_t i) {
    return double{request.queries[q * request.query_stride + i]};
  };
  auto selector = make("probe", shape);
  selector->append(context.keys(0, kProbeTokens));
  // Nothing is known: a plain mean.
  std::vector<double> mean(kChannels);
  for (std::size_t i = 0; i < kChannels; ++i) {
    mean[i] = (query(0, i) + query(1, i) + query(2, i)) / 3;
  }
  {
    auto unknowing = selector->fork();
    expect_scores(select(*unknowing, shape, request)[0], context, mean);
  }
  // One window of four positions: queries 0 to 3 of the context.
  context.observe(*selector, 0, 4);
  std::vector<double> center(kChannels), spread(kChannels);
  double floor = 0.0;
  for (std::size_t i = 0; i < kChannels; ++i) {
    for (std::size_t q = 0; q < 4; ++q) center[i] += query(q, i) / 4;
    for (std::size_t q = 0; q < 4; ++q) spread[i] += std::pow(query(q, i) - center[i], 2) / 4;
    floor += spread[i] / kChannels / 100;
  }
  double weights[3] = {};
  for (std::size_t q = 0; q < 3; ++q) {
    for (std::size_t i = 0; i < kChannels; ++i) {
      weights[q] += std::pow(query(q, i) - center[i], 2) / (spread[i] + floor);
    }
  }
  const double all = weights[0] + weights[1] + weights[2];
  std::vector<double> probe(kChannels);
  for (std::size_t i = 0; i < kChannels; ++i) {
    for (std::size_t q = 0; q < 3; ++q) probe[i] += weights[q] / all * query(q, i);
  }
  expect_scores(select(*selector, shape, request)[0], context, probe);
}

// Nothing is lost between turns: what steps have taught counts as if it came from the prompt.
TEST(ProbeQuery, AnotherTurnStartsFromWhatTheStepsHaveTaught) {
  const SelectorShape shape = probe_shape();
  const Context context(shape, kProbeTokens, 8);
  KeyFrame frame(shape, false, 0);
  ProbeQuery one(4 * 64);
  ProbeQuery two(4 * 64);
  const auto observe = [&](ProbeQuery& probe, std::uint32_t position) {
    probe.observe({.queries = context.request(0, 0).queries +
                              position % 8 * context.request(0, 0).query_stride,
                   .query_stride = context.request(0, 0).query_stride,
                   .positions = std::span(&position, 1)},
                  frame);
  };
  // A step of one query teaches what a window of that one query does.
  one.make(context.request(100, 0), frame, true);
  observe(one, 300);
  observe(two, 0);
  observe(two, 300);
  const auto found = one.make(context.request(400, 0, 3), frame, false);
  const auto expected = two.make(context.request(400, 0, 3), frame, false);
  for (std::size_t i = 0; i < found.size(); ++i) EXPECT_NEAR(found[i], expected[i], 1e-6);
  ProbeQuery unknowing(4 * 64);
  const auto plain = unknowing.make(context.request(400, 0, 3), frame, false);
  double gap = 0.0;
  for (std::size_t i = 0; i < found.size(); ++i) gap += std::abs(found[i] - plain[i]);
  EXPECT_GT(gap, 1.0);
}

TEST(ActivationStats, FollowTheWindowsByHand) {
  ActivationStats stats(1);
  EXPECT_EQ(stats.deviation(std::vector<float>{5.0f}), 1.0);
  stats.add_window(std::vector<float>{2.0f}, std::vector<float>{1.0f}, 4);
  EXPECT_EQ(stats.mean[0], 2.0f);
  EXPECT_EQ(stats.variance[0], 1.0f);
  // (5 - 2)^2 / (1 + 1/100)
  EXPECT_NEAR(stats.deviation(std::vector<float>{5.0f}), 9.0 / 1.01, 1e-6);
  // mean (2*1 + 4) / 2; variance (1 * (1 - 1/4) + 3 + 4 / 2) / (2 - 1/4)
  stats.add_window(std::vector<float>{4.0f}, std::vector<float>{3.0f}, 4);
  EXPECT_NEAR(stats.mean[0], 3.0, 1e-6);
  EXPECT_NEAR(stats.variance[0], 5.75 / 1.75, 1e-6);
}

TEST(EntropyBudget, SumsWithinTheBoundWhateverTheDemands) {
  std::mt19937 random(5);
  for (int round = 0; round < 300; ++round) {
    std::vector<float> demands(1 + random() % 40);
    for (float& demand : demands) demand = static_cast<float>(random() % 1000) * 1e-3f;
    if (round % 5 == 0) demands[random() % demands.size()] = std::nanf("");
    const std::uint32_t far = random() % 3000;
    std::uint64_t sum = 0;
    for (std::uint32_t l = 0; l < demands.size(); ++l) {
      const std::uint32_t share = entropy_budget(demands, l, far, {});
      EXPECT_LE(share, std::lround(2.0 * far));
      sum += share;
    }
    EXPECT_LE(sum, std::uint64_t{far} * demands.size());
    // Not for want of asking: bounds and roundings leave little.
    if (round % 5 == 0 && far > 100) {
      EXPECT_GE(sum + demands.size(), far * demands.size());
    }
  }
}

TEST(EntropyBudget, SharesByHand) {
  const std::vector<float> demands = {1.0f, 3.0f, 2.0f};
  // 300 tokens: 50 is below the least of 70; 3/5 of 230 is 138; the rest.
  EXPECT_EQ(entropy_budget(demands, 0, 100, {.least = 0.7, .most = 2.0}), 70u);
  EXPECT_EQ(entropy_budget(demands, 1, 100, {.least = 0.7, .most = 2.0}), 138u);
  EXPECT_EQ(entropy_budget(demands, 2, 100, {.least = 0.7, .most = 2.0}), 92u);
  const std::vector<float> unknown = {1.0f, std::nanf(""), 2.0f};
  for (std::uint32_t l = 0; l < 3; ++l) EXPECT_EQ(entropy_budget(unknown, l, 100, {}), 100u);
}

TEST(Probe, FlatterScoresDemandMore) {
  const SelectorShape shape = probe_shape();
  Context flat(shape, kProbeTokens, 6);
  Context peaked(shape, kProbeTokens, 6);
  for (std::uint32_t t = 0; t < kProbeTokens; ++t) {
    for (std::uint32_t head = 0; head < 2; ++head) {
      for (std::uint32_t i = 0; i < 64; ++i) {
        flat.set_key(t, head, i, 0.5f);
        const float query = peaked.query(0, head * 2, i);
        peaked.set_key(t, head, i, t >= 96 && t < 128 ? query : -query);
      }
    }
  }
  auto one = make("probe", shape);
  auto two = make("probe", shape);
  EXPECT_TRUE(std::isnan(one->demand()));
  one->append(flat.keys(0, kProbeTokens));
  two->append(peaked.keys(0, kProbeTokens));
  select(*one, shape, flat.request(kProbeTokens - 1, 100));
  select(*two, shape, peaked.request(kProbeTokens - 1, 100));
  EXPECT_NEAR(one->demand(), 1.0, 1e-4);  // All representatives alike: all there is.
  EXPECT_LT(two->demand(), 0.1);
}

TEST(Probe, DemandsOfAllLayersMoveTheBudget) {
  const SelectorShape shape = probe_shape();
  const Context context(shape, kProbeTokens, 7);
  auto selector = make("probe", shape);
  selector->append(context.keys(0, kProbeTokens));
  const std::vector<float> demands = {0.2f, 0.8f};
  SelectRequest request = context.request(kProbeTokens - 1, 24 + 80);
  const auto chosen = [&] {
    const auto found = select(*selector, shape, request);
    std::uint32_t tokens = 0;
    for (std::uint32_t i = 0; i < found[0].chosen; ++i) tokens += found[0].ranked[i].tokens;
    return tokens;
  };
  EXPECT_NEAR(chosen(), 80, 8);
  request.layer_demands = demands;
  EXPECT_NEAR(chosen(), 80 * 32.0 / 46, 8);
  request.layer = 1;
  EXPECT_NEAR(chosen(), 160 - 80 * 32.0 / 46, 8);
}

}  // namespace
}  // namespace kvtier
