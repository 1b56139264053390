#include "kernels/top_k.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <random>
#include <vector>

namespace kvtier {
namespace {

void expect_same(const std::vector<float>& scores, std::size_t k) {
  std::vector<std::uint32_t> order(scores.size() + 3, 77);
  std::vector<std::uint32_t> reference(scores.size());
  const auto actual = top_k(scores, k, order);
  const auto expected = top_k_reference(scores, k, reference);
  ASSERT_EQ(actual.data(), order.data());
  ASSERT_EQ(std::vector<std::uint32_t>(actual.begin(), actual.end()),
            std::vector<std::uint32_t>(expected.begin(), expected.end()))
      << "k " << k << " of " << scores.size();
  // Without the order it is the same set.
  std::vector<std::uint32_t> places(scores.size());
  const std::span<std::uint32_t> best = best_places(scores, k, places);
  std::vector<std::uint32_t> expected_set(expected.begin(), expected.end());
  std::ranges::sort(expected_set);
  std::ranges::sort(best);
  EXPECT_TRUE(std::ranges::equal(best, expected_set));
}

TEST(TopK, AgreesWithAFullSort) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal(0.0f, 5.0f);
  for (const std::size_t count : {1u, 2u, 17u, 1000u, 20000u}) {
    std::vector<float> scores(count);
    for (float& score : scores) score = normal(random);
    for (const std::size_t k :
         {std::size_t{0}, std::size_t{1}, count / 50, count / 2, count - 1, count, count + 5}) {
      expect_same(scores, k);
    }
  }
}

TEST(TopK, EqualScoresComeInIndexOrder) {
  std::mt19937 random(2);
  for (const unsigned distinct : {1u, 2u, 5u, 40u}) {
    std::vector<float> scores(777);
    for (float& score : scores) score = float(random() % distinct) - 2.0f;
    for (std::size_t k = 0; k <= scores.size(); k += 37) expect_same(scores, k);
  }
}

TEST(TopK, InfinitiesZerosAndTinyDifferences) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const std::vector<float> scores = {0.0f,       -0.0f,      kInfinity, -kInfinity, 1.0f,
                                     1.0000001f, -kInfinity, 0.0f,      -1e-45f,    1e-45f,
                                     -3e38f,     3e38f,      -0.0f,     kInfinity,  0.99999994f};
  for (std::size_t k = 0; k <= scores.size(); ++k) expect_same(scores, k);
}

TEST(TopK, NothingFromNothing) { EXPECT_TRUE(top_k({}, 5, {}).empty()); }

TEST(TopKDeathTest, NotANumberIsABug) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const std::vector<float> scores = {1.0f, std::numeric_limits<float>::quiet_NaN()};
  std::vector<std::uint32_t> order(2);
  EXPECT_DEATH(top_k(scores, 1, order), "not a number");
}

}  // namespace
}  // namespace kvtier
