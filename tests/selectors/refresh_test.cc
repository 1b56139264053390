#include "selectors/rank_blocks.h"
#include "selectors/registry.h"
#include "tests/selectors/decorated_context.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

// What `refresh` promises: it asks when it must, and answers the same in between.

namespace kvtier {
namespace {

using testing::chosen_of;
using testing::chosen_tokens;
using testing::Context;
using testing::decorated_shape;
using testing::expect_same_answers;
using testing::filled;
using testing::kDecoratedTokens;
using testing::select;
using testing::step_at;

TEST(Refresh, EveryStepIsTheInnerSelectorItself) {
  const SelectorShape shape = decorated_shape();
  const Context context(shape, kDecoratedTokens, 5);
  for (const char* inner : {"mean", "oracle(granularity=token)", "random"}) {
    auto refreshed = filled(std::string("refresh(interval=1)/") + inner, shape, context, 150);
    auto plain = filled(inner, shape, context, 150);
    for (std::uint32_t t = 150; t < 180; ++t) {
      refreshed->append(context.keys(t, 1));
      plain->append(context.keys(t, 1));
      const SelectRequest request = step_at(context, t, 60, 20);
      expect_same_answers(select(*plain, shape, request), select(*refreshed, shape, request));
    }
  }
}

TEST(Refresh, AsksEveryIntervalAndAnswersTheSameInBetween) {
  for (const std::uint32_t per_block : {1u, 8u}) {
    const SelectorShape shape = decorated_shape(per_block);
    const Context context(shape, kDecoratedTokens, 6);
    auto refreshed = filled("refresh(interval=4)/oracle", shape, context, 150);
    auto plain = filled("oracle", shape, context, 150);
    std::vector<GroupSelection> last;
    for (std::uint32_t t = 150; t < 190; ++t) {
      refreshed->append(context.keys(t, 1));
      plain->append(context.keys(t, 1));
      const SelectRequest request = step_at(context, t, 80);
      const auto found = select(*refreshed, shape, request);
      const auto fresh = select(*plain, shape, request);
      if ((t - 150) % 4 == 0) {
        expect_same_answers(fresh, found);
        last = found;
        continue;
      }
      bool differs = false;
      for (std::size_t i = 0; i < found.size(); ++i) {
        // The same blocks with the same scores, but for the one that the region's end cuts: it has
        // grown, and may push the last one out.
        std::size_t common = 0;
        for (const SelectedUnit& unit : chosen_of(found[i])) {
          common += static_cast<std::size_t>(
              std::ranges::count_if(last[i].ranked, [&](const SelectedUnit& other) {
                return other.block == unit.block && other.score == unit.score;
              }));
        }
        EXPECT_GE(common + 1, found[i].chosen);
        EXPECT_LE(chosen_tokens(found[i]), 60u);
        EXPECT_GT(chosen_tokens(found[i]) + per_block, 60u);
        differs |= chosen_of(found[i]) != chosen_of(fresh[i]);
      }
      EXPECT_TRUE(differs) << "another question, and yet no selection was reused at " << t;
    }
  }
}

TEST(Refresh, ARaisedBudgetIsARefresh) {
  const SelectorShape shape = decorated_shape();
  const Context context(shape, kDecoratedTokens, 6);
  auto refreshed = filled("refresh(interval=100)/oracle", shape, context);
  auto plain = filled("oracle", shape, context);
  select(*refreshed, shape, step_at(context, 230, 60));
  // Half the budget: the beginning of the same ranking. Twice: the inner selector is asked.
  const auto half = select(*refreshed, shape, step_at(context, 231, 40));
  const auto expected = select(*plain, shape, step_at(context, 230, 40));
  for (std::size_t i = 0; i < half.size(); ++i) {
    for (std::size_t u = 0; u < half[i].ranked.size(); ++u) {
      EXPECT_EQ(half[i].ranked[u].block, expected[i].ranked[u].block);
    }
  }
  expect_same_answers(select(*plain, shape, step_at(context, 232, 120)),
                      select(*refreshed, shape, step_at(context, 232, 120)));
}

TEST(Refresh, QueriesThatTurnAwayAreARefresh) {
  const SelectorShape shape = decorated_shape();
  Context context(shape, kDecoratedTokens, 7);
  // Query 1 is query 0 but for a little noise, query 2 its opposite.
  const std::size_t stride = context.request(0, 0).query_stride;
  std::vector<float>& queries = context.queries();
  for (std::size_t i = 0; i < stride; ++i) {
    queries[stride + i] = queries[i] + (i % 2 == 0 ? 0.02f : -0.02f);
    queries[2 * stride + i] = -queries[i];
  }
  auto refreshed = filled("refresh(interval=1000,similarity=0.9)/oracle", shape, context);
  auto plain = filled("oracle", shape, context);
  const auto ask = [&](Selector& selector, std::uint32_t position, std::size_t query) {
    SelectRequest request = context.request(position, 80);
    request.queries += query * stride;
    return select(selector, shape, request);
  };
  const auto first = ask(*refreshed, 231, 0);
  expect_same_answers(first, ask(*refreshed, 231, 1));
  EXPECT_NE(ask(*plain, 231, 1)[0].ranked, first[0].ranked) << "the scores differ a little";
  expect_same_answers(ask(*plain, 231, 2), ask(*refreshed, 231, 2));
}

TEST(Refresh, ARejectedDraftGoesBackToTheRefreshBefore) {
  const SelectorShape shape = decorated_shape();
  const Context context(shape, kDecoratedTokens, 8);
  const auto drafted = [&](bool draft) {
    auto selector = filled("refresh(interval=4)/oracle", shape, context, 200);
    select(*selector, shape, step_at(context, 199, 80));
    if (draft) {
      // Eight tokens are tried, with refreshes at 203 and 207; none is taken.
      for (std::uint32_t t = 200; t < 208; ++t) {
        selector->append(context.keys(t, 1));
        select(*selector, shape, step_at(context, t, 80));
      }
      selector->truncate(200);
    }
    selector->append(context.keys(200, 1));
    return select(*selector, shape, step_at(context, 200, 80));
  };
  expect_same_answers(drafted(false), drafted(true));
}

TEST(Refresh, DoesNotEstimateWithQueriesThatNobodyAskedAbout) {
  const SelectorShape shape = decorated_shape();
  const Context context(shape, kDecoratedTokens, 8);
  const char* inner = "cluster(segment=32,estimate=on)";
  EXPECT_TRUE(filled(inner, shape, context)->estimates_rest());
  EXPECT_TRUE(
      filled(std::string("refresh(interval=1)/") + inner, shape, context)->estimates_rest());
  EXPECT_FALSE(filled(std::string("refresh/") + inner, shape, context)->estimates_rest());
  EXPECT_TRUE(filled(std::string("head-class/") + inner, shape, context)->estimates_rest());
}

}  // namespace
}  // namespace kvtier
