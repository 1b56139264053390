#include "kernels/merge_states.h"

#include "kernels/kv_view.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

namespace kvtier {
namespace {

constexpr std::uint32_t kDim = 24;

struct States {
  std::vector<float> out;
  std::vector<float> lse;
  StatesView view() { return {out.data(), lse.data()}; }
};

/// Rows whose lse lie apart by anything from nothing to more than float32's exponent range.
States random_states(std::size_t rows, std::uint32_t seed) {
  std::mt19937 random(seed);
  std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
  States states;
  for (std::size_t row = 0; row < rows; ++row) {
    const float spread = row % 3 == 0 ? 1.0f : row % 3 == 1 ? 20.0f : 400.0f;
    states.lse.push_back(spread * uniform(random));
    for (std::uint32_t i = 0; i < kDim; ++i) states.out.push_back(uniform(random));
  }
  return states;
}

// Shares are computed in float64 and rounded to float32 once; out is two products and a sum of
// numbers within [-1, 1]: at most 4 u = 2^-22. An lse up to 512 has neighbours 2^-15 away; each
// side is rounded once.
constexpr float kOutTolerance = 0x1p-22f;
constexpr float kLseTolerance = 0x1p-15f;

void expect_near(const States& actual, const States& expected) {
  for (std::size_t i = 0; i < actual.out.size(); ++i) {
    EXPECT_NEAR(actual.out[i], expected.out[i], kOutTolerance) << i;
  }
  for (std::size_t i = 0; i < actual.lse.size(); ++i) {
    if (actual.lse[i] == expected.lse[i]) continue;
    EXPECT_NEAR(actual.lse[i], expected.lse[i], kLseTolerance) << i;
  }
}

TEST(MergeStates, AgreesWithTheReference) {
  States target = random_states(60, 1);
  States source = random_states(60, 2);
  States expected = target;
  merge_states_reference(expected.view(), source.view(), 60, kDim);
  merge_states(target.view(), source.view(), 60, kDim);
  expect_near(target, expected);
}

TEST(MergeStates, AnEmptySideLeavesTheOtherBitForBit) {
  States full = random_states(6, 3);
  States empty = random_states(6, 4);
  for (float& lse : empty.lse) lse = kEmptyLse;
  States target = full;
  merge_states(target.view(), empty.view(), 6, kDim);
  EXPECT_EQ(target.out, full.out);
  EXPECT_EQ(target.lse, full.lse);
  target = empty;
  merge_states(target.view(), full.view(), 6, kDim);
  EXPECT_EQ(target.out, full.out);
  EXPECT_EQ(target.lse, full.lse);
  States both = empty;
  merge_states(both.view(), empty.view(), 6, kDim);
  EXPECT_EQ(both.out, empty.out);
  EXPECT_EQ(both.lse, empty.lse);
}

TEST(MergeStates, ASetMergedWithItselfWeighsTwice) {
  States target = random_states(6, 5);
  States same = target;
  merge_states(target.view(), same.view(), 6, kDim);
  for (std::size_t i = 0; i < target.out.size(); ++i) EXPECT_FLOAT_EQ(target.out[i], same.out[i]);
  for (std::size_t i = 0; i < target.lse.size(); ++i) {
    EXPECT_NEAR(target.lse[i], same.lse[i] + std::log(2.0f), kLseTolerance);
  }
}

TEST(SinkLogits, AgreeWithTheReference) {
  States target = random_states(30, 6);
  std::vector<float> sinks;
  for (std::size_t i = 0; i < 30; ++i) sinks.push_back(float(i) * 3.0f - 40.0f);
  target.lse[4] = kEmptyLse;
  std::fill_n(target.out.begin() + 4 * kDim, kDim, 0.0f);
  sinks[5] = kEmptyLse;
  States expected = target;
  apply_sink_logits_reference(expected.view(), sinks, kDim);
  apply_sink_logits(target.view(), sinks, kDim);
  expect_near(target, expected);
}

TEST(SinkLogits, TakeWeightAndGiveNoValue) {
  States target{{1.0f, -2.0f}, {0.0f}};
  const float sink = 0.0f;
  apply_sink_logits(target.view(), std::span(&sink, 1), 2);
  EXPECT_FLOAT_EQ(target.out[0], 0.5f);
  EXPECT_FLOAT_EQ(target.out[1], -1.0f);
  EXPECT_FLOAT_EQ(target.lse[0], std::log(2.0f));
}

}  // namespace
}  // namespace kvtier
