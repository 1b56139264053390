#include "selectors/rank_blocks.h"
#include "tests/selectors/context.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <string>
#include <vector>

namespace kvtier {
namespace {

using testing::Context;
using testing::make;
using testing::select;

constexpr std::uint32_t kStagedTokens = 411;

SelectorShape staged_shape(GroupReduction reduction) {
  SelectorShape shape;
  shape.dtype = DType::kF32;
  shape.kv_heads = 2;
  shape.heads_per_group = 2;
  shape.queries_per_kv_head = 2;
  shape.head_dim = 64;
  shape.tokens_per_block = 4;
  shape.sinks = 5;
  shape.window = 10;
  shape.softmax.scale = 0.15f;
  shape.reduction = reduction;
  shape.tokens_max = kStagedTokens;
  return shape;
}

/// Chunks of one size over the whole far region, scored in obvious float64 loops.
struct PlainChunks {
  const SelectorShape& shape;
  const Context& context;
  FarRegion region;
  std::uint32_t size;

  double logit(std::uint32_t token, std::uint32_t head, std::uint32_t h) const {
    double dot = 0;
    for (std::uint32_t e = 0; e < shape.head_dim; ++e) {
      dot += double{context.key(token, head, e)} *
             double{context.query(0, head * shape.queries_per_kv_head + h, e)};
    }
    return double{shape.softmax.scale} * dot;
  }
  double largest(std::uint32_t token, std::uint32_t head) const {
    return std::max(logit(token, head, 0), logit(token, head, 1));
  }
  /// The key that stands for [begin, end) by binary descent.
  std::uint32_t descend(std::uint32_t begin, std::uint32_t end, std::uint32_t head) const {
    if (end - begin == 1) return begin;
    const std::uint32_t middle = begin + (end - begin + 1) / 2;
    return largest(middle, head) > largest(begin, head) ? descend(middle, end, head)
                                                        : descend(begin, middle, head);
  }
  std::map<std::uint32_t, double> scores() const {
    std::map<std::uint32_t, double> scores;
    const std::uint32_t first = region.begin / size;
    const std::uint32_t end = (region.end - 1) / size + 1;
    for (std::uint32_t head = 0; head < shape.kv_heads; ++head) {
      for (std::uint32_t h = 0; h < shape.queries_per_kv_head; ++h) {
        std::map<std::uint32_t, double> logits;
        double total = 0;
        for (std::uint32_t chunk = first; chunk < end; ++chunk) {
          const std::uint32_t key = descend(std::max(chunk * size, region.begin),
                                            std::min((chunk + 1) * size, region.end), head);
          logits[chunk] = logit(key, head, h);
          total += std::exp(logits[chunk]);
        }
        for (const auto& [chunk, value] : logits) {
          const double weight = std::exp(value) / total;
          switch (shape.reduction) {
            case GroupReduction::kMax: scores[chunk] = std::max(scores[chunk], weight); break;
            case GroupReduction::kSum: scores[chunk] += weight; break;
            case GroupReduction::kMean: scores[chunk] += value / 4; break;
          }
        }
      }
    }
    return scores;
  }
};

std::vector<GroupSelection> ask(const std::string& name, const SelectorShape& shape,
                                const Context& context, std::uint32_t budget) {
  const auto selector = make(name, shape);
  selector->append(context.keys(0, kStagedTokens));
  return select(*selector, shape, context.request(kStagedTokens - 1, budget));
}

// One stage is a flat choice: of single tokens by their true weights, of chunks by descent.
TEST(Hierarchical, OneStageIsItsFlatCounterpart) {
  for (const std::uint32_t size : {1u, 8u, 13u}) {
    for (const GroupReduction reduction :
         {GroupReduction::kMax, GroupReduction::kSum, GroupReduction::kMean}) {
      const SelectorShape shape = staged_shape(reduction);
      const Context context(shape, kStagedTokens, 41);
      const FarRegion region = FarRegion::of(shape, kStagedTokens - 1);
      const auto expected = PlainChunks{shape, context, region, size}.scores();
      const auto answer =
          ask("hierarchical(chunks=" + std::to_string(size) + ")", shape, context, kStagedTokens);
      ASSERT_EQ(answer[0].ranked.size(), block_count(region, 4));
      for (const SelectedUnit& unit : answer[0].ranked) {
        const std::uint32_t begin = unit.block.value * 4 + unit.first_token;
        double best = -std::numeric_limits<double>::infinity();
        for (std::uint32_t t = begin; t < begin + unit.tokens; ++t) {
          best = std::max(best, expected.at(t / size));
        }
        EXPECT_NEAR(double{unit.score}, best, 1e-4 * std::max(1.0, std::abs(best)));
      }
    }
  }
}

TEST(Hierarchical, StagesThatKeepEverythingChangeNothing) {
  const SelectorShape shape = staged_shape(GroupReduction::kSum);
  const Context context(shape, kStagedTokens, 42);
  const auto flat = ask("hierarchical(chunks=4)", shape, context, 100);
  const auto staged = ask("hierarchical(chunks=64:16:4,keep=1000)", shape, context, 100);
  const auto narrow = ask("hierarchical(chunks=64:16:4,keep=1)", shape, context, 100);
  EXPECT_EQ(staged[0].ranked, flat[0].ranked);
  EXPECT_NE(narrow[0].ranked, flat[0].ranked) << "stages that keep little change nothing either";
  std::uint32_t taken = 0;
  for (const SelectedUnit& unit : narrow[0].ranked) {
    taken += unit.tokens;
    EXPECT_GT(unit.score, 0.0f) << "filled from what did not survive";
  }
  EXPECT_GT(taken + 4, 85u) << "a stage keeps what the budget needs";
}

TEST(Hierarchical, AStageIsUsedAgainUntilItsAge) {
  const SelectorShape shape = staged_shape(GroupReduction::kSum);
  const Context context(shape, kStagedTokens, 43);
  const Context others(shape, kStagedTokens, 44);
  const auto selector = make("hierarchical(chunks=16:4,refresh=8:4)", shape);
  selector->append(context.keys(0, kStagedTokens));
  const auto first = select(*selector, shape, context.request(300, 15 + 60));
  // Another question, but the stages are young.
  EXPECT_EQ(select(*selector, shape, others.request(303, 15 + 60))[0].ranked, first[0].ranked);
  // The last stage is run again on what the first has found for the first question.
  const auto again = select(*selector, shape, others.request(304, 15 + 60));
  EXPECT_NE(again[0].ranked, first[0].ranked);
  // A fresh selector agrees once the first stage is run again, too.
  const auto fresh = make("hierarchical(chunks=16:4,refresh=8:4)", shape);
  fresh->append(context.keys(0, kStagedTokens));
  EXPECT_EQ(select(*selector, shape, others.request(308, 15 + 60))[0].ranked,
            select(*fresh, shape, others.request(308, 15 + 60))[0].ranked);
  // A larger budget than the results are enough for does not wait.
  const auto larger = select(*selector, shape, others.request(309, 15 + 200));
  std::uint32_t taken = 0;
  for (const SelectedUnit& unit : larger[0].ranked) {
    taken += unit.tokens;
    EXPECT_GT(unit.score, 0.0f);
  }
  EXPECT_GT(taken + 4, 200u);
}

TEST(Hierarchical, WhatComesIntoTheRegionJoinsAtTheNextStage) {
  const SelectorShape shape = staged_shape(GroupReduction::kSum);
  Context context(shape, kStagedTokens, 45);
  // Token 292 is what every head looks for; it is still in the window at position 300.
  for (std::uint32_t head = 0; head < shape.kv_heads; ++head) {
    for (std::uint32_t e = 0; e < shape.head_dim; ++e) {
      context.set_key(292, head, e, 3.0f * context.query(0, head * 2, e));
    }
  }
  const auto selector = make("hierarchical(chunks=16:4,refresh=32:4)", shape);
  selector->append(context.keys(0, kStagedTokens));
  select(*selector, shape, context.request(300, 15 + 40));
  const auto answer = select(*selector, shape, context.request(304, 15 + 40));
  EXPECT_EQ(answer[0].ranked[0].block, BlockIndex(292 / 4));
}

TEST(Hierarchical, GoingBackRestoresWhatWasFound) {
  const SelectorShape shape = staged_shape(GroupReduction::kSum);
  const Context context(shape, kStagedTokens, 46);
  const Context draft(shape, kStagedTokens, 47);
  const std::string name = "hierarchical(chunks=16:4,refresh=8:2)";
  const auto disturbed = make(name, shape);
  const auto undisturbed = make(name, shape);
  for (const auto& selector : {disturbed.get(), undisturbed.get()}) {
    selector->append(context.keys(0, 350));
    select(*selector, shape, context.request(349, 15 + 60));
  }
  disturbed->append(draft.keys(350, 8));
  for (std::uint32_t t = 350; t < 358; ++t) {
    select(*disturbed, shape, draft.request(t, 15 + 60 + t - 350));
  }
  disturbed->truncate(350);
  StateWriter expected, found;
  undisturbed->save(expected);
  disturbed->save(found);
  EXPECT_TRUE(std::ranges::equal(expected.bytes(), found.bytes()));
}

TEST(Hierarchical, RefusesStagesThatDoNotNest) {
  for (const char* name :
       {"hierarchical(chunks=8:32)", "hierarchical(chunks=32:5)", "hierarchical(chunks=8:)",
        "hierarchical(chunks=0)", "hierarchical(keep=x)", "hierarchical(refresh=8:-1)"}) {
    EXPECT_EQ(make_selector_factory(name).status().code(), StatusCode::kInvalidArgument) << name;
  }
  EXPECT_TRUE(make_selector_factory("hierarchical(chunks=64:8,keep=4096,refresh=4)").ok());
}

TEST(Hierarchical, RefusesScoresThatOverflow) {
  const SelectorShape shape = staged_shape(GroupReduction::kSum);
  Context context(shape, kStagedTokens, 3);
  for (std::uint32_t t = 0; t < kStagedTokens; ++t) context.set_key(t, 1, 7, 3e38f);
  context.queries()[2 * 64 + 7] = 1e20f;
  const auto selector = make("hierarchical", shape);
  selector->append(context.keys(0, kStagedTokens));
  WorkerPool pool(1);
  std::vector<GroupSelection> selection(1);
  EXPECT_EQ(selector->select(context.request(kStagedTokens - 1, 80), selection, pool).code(),
            StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace kvtier
