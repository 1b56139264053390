#include "selectors/rank_blocks.h"
#include "selectors/registry.h"
#include "tests/selectors/context.h"
#include "tests/selectors/reference_weights.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>
#include <vector>

namespace kvtier {
namespace {

using testing::Context;
using testing::make;
using testing::make_codes_exact;
using testing::ReferenceWeights;
using testing::select;

SelectorShape two_stage_shape(std::uint32_t tokens_per_block) {
  SelectorShape shape;
  shape.dtype = DType::kF32;
  shape.kv_heads = 2;
  shape.queries_per_kv_head = 2;
  shape.head_dim = 64;
  shape.value_dim = 16;
  shape.tokens_per_block = tokens_per_block;
  shape.sinks = 5;
  shape.window = 20;
  shape.softmax.scale = 0.01f;
  shape.tokens_max = 2000;
  return shape;
}

TEST(TwoStage, KeepingEverythingIsScan) {
  for (const char* coarse : {"mean", "mean,means=4", "mean,means=16", "minmax", "mean-minmax"}) {
    for (std::uint32_t tokens : {8u, 16u, 48u}) {
      const SelectorShape shape = two_stage_shape(4);
      const Context context(shape, 1300, 3);
      auto two_stage = make("two-stage(keep=100000,coarse=" + std::string(coarse) +
                                ",tokens=" + std::to_string(tokens) + ")",
                            shape);
      auto scan = make("scan", shape);
      two_stage->append(context.keys(0, 1300));
      scan->append(context.keys(0, 1300));
      const SelectRequest request = context.request(1298, 150, 2, 40);
      const auto found = select(*two_stage, shape, request);
      const auto expected = select(*scan, shape, request);
      for (std::uint32_t g = 0; g < 2; ++g) {
        EXPECT_EQ(found[g].ranked, expected[g].ranked) << coarse << ", " << tokens;
        EXPECT_EQ(found[g].chosen, expected[g].chosen);
        EXPECT_EQ(found[g].mass, expected[g].mass);
      }
      std::vector<float> out[2] = {std::vector<float>(8 * 16), std::vector<float>(8 * 16)};
      std::vector<float> lse[2] = {std::vector<float>(8), std::vector<float>(8)};
      WorkerPool pool(1);
      ASSERT_TRUE(
          two_stage->estimate_rest(request, found, {out[0].data(), lse[0].data()}, pool).ok());
      ASSERT_TRUE(
          scan->estimate_rest(request, expected, {out[1].data(), lse[1].data()}, pool).ok());
      EXPECT_EQ(out[0], out[1]);
      EXPECT_EQ(lse[0], lse[1]);
    }
  }
}

/// The first stage with obvious loops: which tiles of 16 tokens are scored by their codes, for one
/// head group of one KV head, and the logit of a group's mean key.
struct FirstStage {
  FirstStage(const Context& context, const SelectorShape& shape, const SelectRequest& request,
             std::uint32_t kv_head, std::uint32_t tokens, double keep)
      : tokens(tokens), fine(request.first_position + request.query_count, false) {
    const auto visible = static_cast<std::uint32_t>(fine.size());
    const std::uint32_t groups = (visible - 1) / tokens + 1;
    const FarRegion region = FarRegion::of(shape, request.first_position);
    std::vector<double> scores(groups, 0.0);
    const auto in = [&](std::uint32_t g, std::uint32_t begin, std::uint32_t end) {
      const std::uint32_t first = std::max(g * tokens, begin);
      return std::max(std::min((g + 1) * tokens, end), first) - first;
    };
    for (std::uint32_t h = 0; h < 2; ++h) {
      const std::uint32_t head = kv_head * 2 + h;
      mean_logits.emplace_back();
      double sum = 0.0;
      std::vector<double> weights(groups, 0.0);
      for (std::uint32_t g = 0; g < groups; ++g) {
        const std::uint32_t first = std::max(g * tokens, shape.sinks);
        const std::uint32_t count = in(g, shape.sinks, visible);
        double logit = 0.0;
        for (std::uint32_t i = 0; i < 64; ++i) {
          double mean = 0.0;
          for (std::uint32_t t = first; t < first + count; ++t) {
            mean += double{context.key(t, kv_head, i)} / count;
          }
          logit += 0.01 * double{context.query(0, head, i)} * mean;
        }
        mean_logits[h].push_back(logit);
        weights[g] = count * std::exp(logit);
        sum += weights[g];
      }
      for (std::uint32_t t = 0; t < shape.sinks; ++t) {
        double logit = 0.0;
        for (std::uint32_t i = 0; i < 64; ++i) {
          logit += 0.01 * double{context.query(0, head, i)} * double{context.key(t, kv_head, i)};
        }
        sum += std::exp(logit);
      }
      for (std::uint32_t g = 0; g < groups; ++g) scores[g] += weights[g] / sum;
    }
    std::vector<std::uint32_t> order;
    for (std::uint32_t g = 0; g < groups; ++g) {
      if (in(g, region.begin, region.end) > 0) order.push_back(g);
    }
    std::ranges::sort(order, [&](auto a, auto b) {
      return scores[a] != scores[b] ? scores[a] > scores[b] : a < b;
    });
    const double wanted = keep * request.budget_tokens;
    double kept = 0.0;
    for (std::uint32_t g : order) {
      if (kept >= wanted) break;
      kept += in(g, region.begin, region.end);
      const std::uint32_t first = std::max(g * tokens, region.begin) / 16 * 16;
      const std::uint32_t last = (std::min((g + 1) * tokens, region.end) + 15) / 16 * 16;
      for (std::uint32_t t = first; t < std::min(last, visible); ++t) fine[t] = true;
    }
    for (std::uint32_t t = 0; t < visible; ++t) {
      // The window's tiles, the open run and the sinks.
      fine[t] = fine[t] || t >= region.end / 16 * 16 || t < shape.sinks;
    }
  }
  std::uint32_t tokens;
  std::vector<bool> fine;
  std::vector<std::vector<double>> mean_logits;  ///< [query heads][groups]
};

TEST(TwoStage, IsTheFormula) {
  for (std::uint32_t tokens : {8u, 16u, 24u}) {
    for (std::uint32_t per_block : {1u, 4u, 64u}) {
      const SelectorShape shape = two_stage_shape(per_block);
      Context context(shape, 1270, 4);
      make_codes_exact(context, shape);
      // Means as they are: what rounds them is tested by itself.
      auto selector =
          make("two-stage(means=16,keep=2,values=16,tokens=" + std::to_string(tokens) + ")", shape);
      // All of it asked about at the end, so that the open run is the last 54 tokens.
      selector->append(context.keys(0, 1270));
      const SelectRequest request = context.request(1269, 150, 1, 3000);
      const auto selection = select(*selector, shape, request);
      std::vector<float> out(4 * 16);
      std::vector<float> lse(4);
      WorkerPool pool(1);
      ASSERT_TRUE(selector->estimate_rest(request, selection, {out.data(), lse.data()}, pool).ok());
      for (std::uint32_t g = 0; g < 2; ++g) {
        const FirstStage first(context, shape, request, g, tokens, 2.0);
        // Otherwise nothing is told apart here.
        ASSERT_GT(std::ranges::count(first.fine, false), 300);
        const ReferenceWeights exact(context, shape, request);
        const ReferenceWeights weights(
            context, shape, request, [&](std::uint32_t, std::uint32_t head, std::uint32_t t) {
              if (head / 2 != g) return 0.0;
              if (!first.fine[t] && t < 1270 / 64 * 64) {
                return first.mean_logits[head % 2][t / tokens];
              }
              return exact.lse(0, head) + std::log(exact.weight(0, head, t));
            });
        for (const SelectedUnit& unit : selection[g].ranked) {
          const double expected = weights.block_score(g, unit.block.value);
          ASSERT_NEAR(double{unit.score}, expected, 2e-5 * expected) << tokens;
        }
        for (std::uint32_t head = 2 * g; head < 2 * g + 2; ++head) {
          const auto rest = weights.rest(0, head, selection[g], 16);
          EXPECT_NEAR(double{lse[head]}, rest.lse, 2e-5);
          for (std::uint32_t i = 0; i < 16; ++i) {
            EXPECT_NEAR(double{out[head * 16 + i]}, rest.out[i], 2e-5);
          }
        }
      }
    }
  }
}

// One token that the query looks for, among fifteen that look the other way: their mean says no,
// the box around them says perhaps, and the codes then find the token.
TEST(TwoStage, ABoxFindsWhatAMeanHides) {
  SelectorShape shape = two_stage_shape(4);
  shape.softmax.scale = 1.0f;
  Context context(shape, 1000, 2);
  for (std::uint32_t t = 0; t < 1000; ++t) {
    for (std::uint32_t head = 0; head < 2; ++head) {
      for (std::uint32_t i = 0; i < 64; ++i) context.set_key(t, head, i, 0.0f);
      if (t / 16 == 20) context.set_key(t, head, 9, t == 333 ? 20.0f : -4.0f);
    }
  }
  std::ranges::fill(context.queries(), 0.0f);
  for (std::uint32_t head = 0; head < 4; ++head) context.queries()[head * 64 + 9] = 1.0f;
  const auto finds = [&](const char* name) {
    auto selector = make(name, shape);
    selector->append(context.keys(0, 1000));
    const auto selection = select(*selector, shape, context.request(999, 25 + 40));
    const auto chosen = std::span(selection[0].ranked).first(selection[0].chosen);
    return std::ranges::any_of(chosen, [](const SelectedUnit& u) { return u.block.value == 83; });
  };
  EXPECT_FALSE(finds("two-stage(means=16,tokens=16)"));
  EXPECT_FALSE(finds("two-stage(means=2,tokens=16)"));
  // Not among fifteen any more, but beside one.
  EXPECT_TRUE(finds("two-stage"));
  EXPECT_TRUE(finds("two-stage(coarse=minmax)"));
  EXPECT_TRUE(finds("two-stage(coarse=mean-minmax)"));
  EXPECT_TRUE(finds("scan"));
}

// Small coded means leave less to chance than large exact ones, in less room.
TEST(TwoStage, SmallMeansFindMoreThanLargeOnes) {
  SelectorShape shape = two_stage_shape(1);
  shape.dtype = DType::kF16;
  shape.softmax.scale = 0.3f;
  double found[2] = {};
  std::size_t bytes[2] = {};
  for (std::uint64_t seed = 0; seed < 4; ++seed) {
    const Context context(shape, 2000, seed);
    const char* names[] = {"two-stage(keep=2)", "two-stage(coarse=mean-minmax,keep=2)"};
    for (std::size_t i = 0; i < 2; ++i) {
      auto selector = make(names[i], shape);
      selector->append(context.keys(0, 2000));
      const SelectRequest request = context.request(1999, 60);
      const ReferenceWeights weights(context, shape, request);
      const auto selection = select(*selector, shape, request);
      for (std::uint32_t g = 0; g < 2; ++g) found[i] += weights.found(g, selection[g]);
      bytes[i] = selector->metadata_bytes();
    }
  }
  EXPECT_GT(found[0], found[1]);
  EXPECT_LT(bytes[0], bytes[1]);
}

TEST(TwoStage, BoxesAreNotCoded) {
  for (const char* coarse : {"minmax", "mean-minmax"}) {
    const auto refused =
        make_selector_factory("two-stage(means=4,coarse=" + std::string(coarse) + ")");
    ASSERT_FALSE(refused.ok());
    EXPECT_EQ(refused.status().code(), StatusCode::kInvalidArgument);
    EXPECT_NE(refused.status().message().find("means=16"), std::string::npos);
  }
}

TEST(TwoStage, KeepingMoreFindsMore) {
  SelectorShape shape = two_stage_shape(4);
  shape.softmax.scale = 0.3f;
  double found[3] = {};
  for (std::uint64_t seed = 0; seed < 4; ++seed) {
    const Context context(shape, 1500, seed);
    const char* names[] = {"two-stage(means=16,keep=1)", "two-stage(means=16,keep=4)", "scan"};
    for (std::size_t i = 0; i < 3; ++i) {
      auto selector = make(names[i], shape);
      selector->append(context.keys(0, 1500));
      const SelectRequest request = context.request(1499, 100);
      const ReferenceWeights weights(context, shape, request);
      const auto selection = select(*selector, shape, request);
      for (std::uint32_t g = 0; g < 2; ++g) found[i] += weights.found(g, selection[g]);
    }
  }
  EXPECT_LT(found[0], found[1]);
  EXPECT_LE(found[1], found[2] * 1.001);
}

}  // namespace
}  // namespace kvtier
