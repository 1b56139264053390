#include "selectors/coded_means.h"

#include "tests/selectors/context.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace kvtier {
namespace {

using testing::Context;

SelectorShape means_shape() {
  SelectorShape shape;
  shape.dtype = DType::kF32;
  shape.kv_heads = 2;
  shape.queries_per_kv_head = 3;
  shape.head_dim = 64;
  shape.sinks = 5;
  shape.window = 20;
  shape.softmax.scale = 0.1f;
  shape.tokens_max = 3000;
  return shape;
}

/// Mean of a group's tokens before `end` that are not sinks, and the widest range of means, per
/// channel, that a code of the group's run must cover.
struct Reference {
  std::vector<double> mean;
  std::vector<double> range;
};

std::vector<double> mean_of(const Context& context, const SelectorShape& shape, std::uint32_t head,
                            std::uint32_t begin, std::uint32_t end) {
  std::vector<double> mean(shape.head_dim, 0.0);
  begin = std::max(begin, shape.sinks);
  for (std::uint32_t t = begin; t < end; ++t) {
    for (std::uint32_t i = 0; i < shape.head_dim; ++i) {
      mean[i] += double{context.key(t, head, i)} / (end - begin);
    }
  }
  return mean;
}

Reference reference(const Context& context, const SelectorShape& shape, std::uint32_t head,
                    std::uint32_t group, std::uint32_t tokens, std::uint32_t visible) {
  Reference found{
      mean_of(context, shape, head, group * tokens, std::min((group + 1) * tokens, visible)),
      std::vector<double>(shape.head_dim, 0.0)};
  const std::uint32_t run = group / 64 * 64;
  if ((run + 64) * tokens > visible) return found;  // The open run is exact.
  std::vector<double> least(shape.head_dim, std::numeric_limits<double>::max());
  std::vector<double> most(shape.head_dim, std::numeric_limits<double>::lowest());
  for (std::uint32_t g = std::max(run, shape.sinks / tokens); g < run + 64; ++g) {
    const auto mean = mean_of(context, shape, head, g * tokens, (g + 1) * tokens);
    for (std::uint32_t i = 0; i < shape.head_dim; ++i) {
      least[i] = std::min(least[i], mean[i]);
      most[i] = std::max(most[i], mean[i]);
    }
  }
  for (std::uint32_t i = 0; i < shape.head_dim; ++i) found.range[i] = most[i] - least[i];
  return found;
}

// Half a step of each channel, as quantised_keys.h promises, and what folding the query adds.
TEST(CodedMeans, LogitsAreWithinTheErrorOfTheCodes) {
  const SelectorShape shape = means_shape();
  const Context context(shape, 2900, 3);
  WorkerPool pool(2);
  for (const std::uint32_t bits : {2u, 4u}) {
    for (const std::uint32_t tokens : {1u, 2u, 4u, 24u}) {
      CodedMeans means(shape, tokens, bits);
      means.append(context.keys(0, 1000));
      means.append(context.keys(1000, 1900));
      const std::uint32_t groups = 2899 / tokens + 1;
      StepLogits logits(shape, shape.kv_heads, shape.tokens_max / tokens + 1);
      const SelectRequest request = context.request(2898, 200, 2);
      ASSERT_TRUE(means.score(request, 2900, logits, pool).ok());
      const double steps = (1u << bits) - 1;
      double largest = 0.0;
      for (std::uint32_t head = 0; head < 2; ++head) {
        for (std::uint32_t g = shape.sinks / tokens; g < groups; ++g) {
          const Reference expected = reference(context, shape, head, g, tokens, 2900);
          for (std::uint32_t row = 0; row < 6; ++row) {
            double logit = 0.0;
            double bound = 1e-4;
            double fold = 0.0;
            for (std::uint32_t i = 0; i < shape.head_dim; ++i) {
              const double q = 0.1 * double{context.query(row / 3, head * 3 + row % 3, i)};
              logit += q * expected.mean[i];
              bound += std::abs(q) * expected.range[i] / steps / 2;
              fold = std::max(fold, std::abs(q) * expected.range[i] / steps);
            }
            bound += shape.head_dim * steps * fold / 16384;
            const double error = std::abs(double{logits.row(head, row, groups)[g]} - logit);
            ASSERT_LE(error, 1.001 * bound) << bits << " bits, group " << g << " of " << tokens;
            largest = std::max(largest, error / bound);
          }
        }
      }
      // A bound that is never near says nothing.
      EXPECT_GT(largest, 0.2) << bits << " bits, groups of " << tokens;
    }
  }
}

// What was cut and appended again is what was never cut, wherever the cut falls.
TEST(CodedMeans, ACutIsForgotten) {
  const SelectorShape shape = means_shape();
  const Context context(shape, 2000, 5);
  WorkerPool pool(1);
  for (const std::uint32_t tokens : {2u, 7u}) {
    CodedMeans whole(shape, tokens, 2);
    whole.append(context.keys(0, 1700));
    const std::uint32_t groups = 1699 / tokens + 1;
    StepLogits expected(shape, shape.kv_heads, shape.tokens_max / tokens + 1);
    const SelectRequest request = context.request(1699, 200);
    ASSERT_TRUE(whole.score(request, 1700, expected, pool).ok());
    for (const std::uint32_t position : {0u, 3u, 129u, 896u, 1690u, 1699u, 1700u, 1833u}) {
      CodedMeans means(shape, tokens, 2);
      means.append(context.keys(0, 1900));
      // As callers do: where it can, with the keys before it given again; once, or twice.
      for (const std::uint32_t cut : {position, std::min(position, 1700u)}) {
        const std::uint32_t floor = means.truncate_floor(cut);
        ASSERT_LE(floor, cut);
        ASSERT_EQ(means.truncate_floor(floor), floor);
        means.truncate(floor);
        means.append(context.keys(floor, cut - floor));
      }
      if (position < 1700) means.append(context.keys(position, 1700 - position));
      StepLogits found(shape, shape.kv_heads, shape.tokens_max / tokens + 1);
      ASSERT_TRUE(means.score(request, 1700, found, pool).ok());
      for (std::uint32_t row = 0; row < 3; ++row) {
        EXPECT_TRUE(std::ranges::equal(found.row(1, row, groups), expected.row(1, row, groups)))
            << "cut at " << position << ", groups of " << tokens;
      }
    }
  }
}

}  // namespace
}  // namespace kvtier
