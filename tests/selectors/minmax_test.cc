#include "selectors/rank_blocks.h"
#include "tests/selectors/context.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <string>
#include <vector>

// `minmax` and `mean-minmax`: their scores are those of the definition, and page bounds bound.

namespace kvtier {
namespace {

using testing::Context;
using testing::make;
using testing::select;

constexpr std::uint32_t kPagedTokens = 203;

SelectorShape paged_shape(DType dtype, std::uint32_t tokens_per_block, GroupReduction reduction) {
  SelectorShape shape;
  shape.dtype = dtype;
  shape.kv_heads = 2;
  shape.queries_per_kv_head = 3;
  shape.head_dim = 64;
  shape.tokens_per_block = tokens_per_block;
  shape.sinks = 5;
  shape.window = 9;
  shape.softmax.scale = 0.15f;
  shape.reduction = reduction;
  shape.tokens_max = kPagedTokens;
  return shape;
}

/// The definition in obvious float64 loops; pages leave the sinks out.
struct PlainPages {
  const SelectorShape& shape;
  const Context& context;
  std::uint32_t page_tokens;
  bool with_mean;
  FarRegion region;

  double score(std::uint32_t page, std::uint32_t head, std::uint32_t query_head) const {
    const std::uint32_t begin = std::max(page * page_tokens, shape.sinks);
    const std::uint32_t end = std::min((page + 1) * page_tokens, context.tokens());
    double bound = 0, mean = 0;
    for (std::uint32_t e = 0; e < shape.head_dim; ++e) {
      const double q = double{context.query(0, head * shape.queries_per_kv_head + query_head, e)};
      double most = -std::numeric_limits<double>::infinity();
      for (std::uint32_t t = begin; t < end; ++t) {
        most = std::max(most, q * double{context.key(t, head, e)});
        mean += q * double{context.key(t, head, e)} / (end - begin);
      }
      bound += most;
    }
    return double{shape.softmax.scale} * (with_mean ? 0.5 * (bound + mean) : bound);
  }

  std::map<std::uint32_t, double> page_scores(std::uint32_t head) const {
    std::map<std::uint32_t, double> scores;
    const std::uint32_t first = region.begin / page_tokens;
    const std::uint32_t end = (region.end - 1) / page_tokens + 1;
    for (std::uint32_t h = 0; h < shape.queries_per_kv_head; ++h) {
      double total = 0;
      for (std::uint32_t p = first; p < end; ++p) total += std::exp(score(p, head, h));
      for (std::uint32_t p = first; p < end; ++p) {
        const double logit = score(p, head, h);
        const double weight = std::exp(logit) / total;
        switch (shape.reduction) {
          case GroupReduction::kMax: scores[p] = std::max(scores[p], weight); break;
          case GroupReduction::kSum: scores[p] += weight; break;
          case GroupReduction::kMean: scores[p] += logit / shape.queries_per_kv_head; break;
        }
      }
    }
    return scores;
  }
};

std::uint32_t first_of(const SelectedUnit& unit, const SelectorShape& shape) {
  return unit.block.value * shape.tokens_per_block + unit.first_token;
}

TEST(MinMax, ScoresAreThoseOfTheDefinition) {
  for (const bool with_mean : {false, true}) {
    for (const std::uint32_t block : {1u, 4u, 16u, 24u}) {
      for (const GroupReduction reduction :
           {GroupReduction::kMax, GroupReduction::kSum, GroupReduction::kMean}) {
        const SelectorShape shape = paged_shape(DType::kF32, block, reduction);
        const Context context(shape, kPagedTokens, 5);
        const auto selector = make(with_mean ? "mean-minmax(tokens=8)" : "minmax(tokens=8)", shape);
        selector->append(context.keys(0, kPagedTokens));
        const auto answer =
            select(*selector, shape, context.request(kPagedTokens - 1, kPagedTokens));
        const FarRegion region = FarRegion::of(shape, kPagedTokens - 1);
        const PlainPages plain{shape, context, 8, with_mean, region};
        for (std::uint32_t head = 0; head < shape.kv_heads; ++head) {
          const auto pages = plain.page_scores(head);
          ASSERT_EQ(answer[head].ranked.size(), block_count(region, block));
          for (const SelectedUnit& unit : answer[head].ranked) {
            const std::uint32_t begin = first_of(unit, shape);
            double best = -std::numeric_limits<double>::infinity();
            for (std::uint32_t t = begin; t < begin + unit.tokens; ++t) {
              best = std::max(best, pages.at(t / 8));
            }
            // 192 float32 roundings of sums up to about 100, times the scale.
            EXPECT_NEAR(double{unit.score}, best, 4e-4 * std::max(1.0, std::abs(best)));
          }
        }
      }
    }
  }
}

// The promise, for keys as they are stored: under `mean` with one query head the score is the
// bound.
TEST(MinMax, NoLogitIsAboveItsBlocksScore) {
  for (const DType dtype : {DType::kF16, DType::kBF16, DType::kF32}) {
    for (const std::uint32_t block : {1u, 8u, 16u, 40u}) {
      SelectorShape shape = paged_shape(dtype, block, GroupReduction::kMean);
      shape.queries_per_kv_head = 1;
      const Context context(shape, kPagedTokens, 77);
      const auto selector = make("minmax", shape);
      selector->append(context.keys(0, kPagedTokens));
      const auto answer = select(*selector, shape, context.request(kPagedTokens - 1, kPagedTokens));
      std::uint32_t tight = 0;
      for (std::uint32_t head = 0; head < shape.kv_heads; ++head) {
        for (const SelectedUnit& unit : answer[head].ranked) {
          for (std::uint32_t t = 0; t < unit.tokens; ++t) {
            double logit = 0;
            for (std::uint32_t e = 0; e < shape.head_dim; ++e) {
              logit += double{context.query(0, head, e)} *
                       double{context.key(first_of(unit, shape) + t, head, e)};
            }
            logit *= double{shape.softmax.scale};
            // 128 roundings of sums below 300, times the scale.
            ASSERT_LE(logit, double{unit.score} + 128 * 300 * 0x1p-24 * 0.15);
            tight += logit > 0.3 * double{unit.score} ? 1 : 0;
          }
        }
      }
      EXPECT_GT(tight, 0u) << "bounds so loose that the test proves nothing";
    }
  }
}

TEST(MinMax, APartialLastPageIsBoundedByWhatItHas) {
  SelectorShape shape = paged_shape(DType::kF32, 1, GroupReduction::kMean);
  shape.kv_heads = 1;
  shape.queries_per_kv_head = 1;
  shape.window = 1;
  shape.sinks = 0;
  Context context(shape, 19, 3);
  for (std::uint32_t t = 0; t < 19; ++t) {
    for (std::uint32_t e = 0; e < shape.head_dim; ++e)
      context.set_key(t, 0, e, e == 0 ? 1.0f : 0.0f);
  }
  context.set_key(17, 0, 0, 3.0f);
  context.queries()[0] = 2.0f;
  const auto selector = make("minmax", shape);
  selector->append(context.keys(0, 19));
  const auto answer = select(*selector, shape, context.request(18, 19));
  // Two tokens of the second page are far; its best key has 3 where the first page has 1.
  ASSERT_EQ(answer[0].ranked.size(), 18u);
  EXPECT_EQ(answer[0].ranked[0].block, BlockIndex(16));
  EXPECT_FLOAT_EQ(answer[0].ranked[0].score, 0.15f * 6.0f);
  EXPECT_EQ(answer[0].ranked[1].block, BlockIndex(17));
  EXPECT_FLOAT_EQ(answer[0].ranked[2].score, 0.15f * 2.0f);
}

// One token that stands out of its group is what a mean key misses and a bound finds.
TEST(MinMax, FindsASingleTokenThatItsMeanHides) {
  SelectorShape shape = paged_shape(DType::kF16, 16, GroupReduction::kSum);
  shape.kv_heads = 1;
  shape.queries_per_kv_head = 1;
  shape.sinks = 0;
  Context context(shape, kPagedTokens, 3);
  for (std::uint32_t t = 0; t < kPagedTokens; ++t) {
    for (std::uint32_t e = 0; e < shape.head_dim; ++e) context.set_key(t, 0, e, 0.0f);
    context.set_key(t, 0, 0, t / 16 == 3 ? -1.0f : 0.5f);
  }
  context.set_key(57, 0, 0, 4.0f);
  for (std::uint32_t e = 0; e < shape.head_dim; ++e) context.queries()[e] = e == 0 ? 3.0f : 0.0f;
  const auto best_block = [&](const std::string& name) {
    const auto selector = make(name, shape);
    selector->append(context.keys(0, kPagedTokens));
    return select(*selector, shape, context.request(kPagedTokens - 1, 60))[0].ranked.at(0).block;
  };
  EXPECT_EQ(best_block("minmax"), BlockIndex(3));
  EXPECT_EQ(best_block("mean-minmax"), BlockIndex(3));
  EXPECT_NE(best_block("mean(tokens=16,outliers=0)"), BlockIndex(3));
}

TEST(MinMax, RefusesScoresThatOverflow) {
  const SelectorShape shape = paged_shape(DType::kF32, 8, GroupReduction::kSum);
  Context context(shape, kPagedTokens, 3);
  context.set_key(60, 1, 7, 3e38f);
  context.queries()[4 * 64 + 7] = 1e20f;
  for (const char* name : {"minmax", "mean-minmax"}) {
    const auto selector = make(name, shape);
    selector->append(context.keys(0, kPagedTokens));
    WorkerPool pool(1);
    std::vector<GroupSelection> selection(shape.head_groups());
    const Status status = selector->select(context.request(kPagedTokens - 1, 80), selection, pool);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument) << name;
  }
}

}  // namespace
}  // namespace kvtier
