#include "selectors/rank_blocks.h"
#include "selectors/registry.h"
#include "tests/selectors/context.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <string>
#include <vector>

// What decorators promise: each leaves alone what is not its business.

namespace kvtier {
namespace {

using testing::Context;
using testing::make;
using testing::select;

constexpr std::uint32_t kDecoratedTokens = 240;

SelectorShape decorated_shape(std::uint32_t tokens_per_block = 8) {
  SelectorShape shape;
  shape.kv_heads = 4;
  shape.queries_per_kv_head = 2;
  shape.tokens_per_block = tokens_per_block;
  shape.sinks = 4;
  shape.window = 16;
  shape.softmax.scale = 0.2f;
  shape.tokens_max = kDecoratedTokens;
  return shape;
}

std::unique_ptr<Selector> filled(const std::string& name, const SelectorShape& shape,
                                 const Context& context, std::uint32_t tokens = kDecoratedTokens) {
  auto selector = make(name, shape);
  selector->append(context.keys(0, tokens));
  return selector;
}

void expect_same_answers(const std::vector<GroupSelection>& a,
                         const std::vector<GroupSelection>& b) {
  ASSERT_EQ(a.size(), b.size());
  for (std::size_t i = 0; i < a.size(); ++i) {
    EXPECT_EQ(a[i].ranked, b[i].ranked) << i;
    EXPECT_EQ(a[i].chosen, b[i].chosen) << i;
    EXPECT_EQ(a[i].held, b[i].held) << i;
    EXPECT_EQ(a[i].mass, b[i].mass) << i;
  }
}

std::vector<SelectedUnit> chosen_of(const GroupSelection& group) {
  return {group.ranked.begin(), group.ranked.begin() + group.chosen};
}

std::uint32_t chosen_tokens(const GroupSelection& group) {
  std::uint32_t tokens = 0;
  for (const SelectedUnit& unit : chosen_of(group)) tokens += unit.tokens;
  return tokens;
}

/// A step per token from `first`, each with another of the context's queries.
SelectRequest step_at(const Context& context, std::uint32_t position, std::uint32_t budget,
                      std::uint32_t band = 0) {
  SelectRequest request = context.request(position, budget, 1, band);
  request.queries += position % 8 * request.query_stride;
  return request;
}

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

/// Head classes of one layer from a pattern like "rs": retrieval, streaming.
SelectorResources classes(const std::string& pattern) {
  return {.head_classes = [pattern](const std::string& file) -> Result<HeadClasses> {
    if (file == "missing.json") return not_found("missing.json: no such file");
    HeadClasses classes;
    classes.retrieval.resize(1);
    for (char c : pattern) classes.retrieval[0].push_back(c == 'r');
    return classes;
  }};
}

TEST(HeadClass, RetrievalHeadsAreUntouchedAndStreamingOnesHoldNothing) {
  SelectorShape shape = decorated_shape();
  const Context context(shape, kDecoratedTokens, 9);
  auto plain = filled("mean", shape, context);
  auto factory = make_selector_factory("head-class(file=f.json)/mean", classes("rssr"));
  ASSERT_TRUE(factory.ok()) << factory.status().to_string();
  auto classed = factory.value()(shape, LayerIndex(0)).value();
  classed->append(context.keys(0, kDecoratedTokens));
  const SelectRequest request = context.request(239, 100, 1, 20);
  const auto expected = select(*plain, shape, request);
  const auto found = select(*classed, shape, request);
  for (std::size_t i : {0u, 3u}) {
    EXPECT_EQ(found[i].ranked, expected[i].ranked);
    EXPECT_EQ(found[i].chosen, expected[i].chosen);
    EXPECT_EQ(found[i].held, expected[i].held);
    EXPECT_EQ(found[i].mass, expected[i].mass);
  }
  for (std::size_t i : {1u, 2u}) {
    EXPECT_TRUE(found[i].ranked.empty());
    EXPECT_EQ(found[i].chosen, 0u);
    EXPECT_EQ(found[i].mass, 0.0f);
  }
}

TEST(HeadClass, AGroupRetrievesIfOneOfItsHeadsDoes) {
  SelectorShape shape = decorated_shape();
  shape.heads_per_group = 2;
  const Context context(shape, kDecoratedTokens, 9);
  auto factory = make_selector_factory("head-class(file=f.json)/mean", classes("sssr"));
  auto classed = factory.value()(shape, LayerIndex(0)).value();
  classed->append(context.keys(0, kDecoratedTokens));
  const auto found = select(*classed, shape, context.request(239, 100));
  ASSERT_EQ(found.size(), 2u);
  EXPECT_TRUE(found[0].ranked.empty());
  EXPECT_FALSE(found[1].ranked.empty());
}

TEST(HeadClass, RefusesFilesThatDoNotFit) {
  const SelectorShape shape = decorated_shape();
  EXPECT_EQ(
      make_selector_factory("head-class(file=missing.json)/mean", classes("r")).status().code(),
      StatusCode::kNotFound);
  EXPECT_FALSE(make_selector_factory("head-class(file=f.json)/mean").ok()) << "nobody reads files";
  const auto few = make_selector_factory("head-class(file=f.json)/mean", classes("rs"));
  ASSERT_TRUE(few.ok());
  EXPECT_EQ(few.value()(shape, LayerIndex(0)).status().code(), StatusCode::kInvalidArgument);
  const auto fits = make_selector_factory("head-class(file=f.json)/mean", classes("rsrs"));
  EXPECT_TRUE(fits.value()(shape, LayerIndex(0)).ok());
  EXPECT_EQ(fits.value()(shape, LayerIndex(1)).status().code(), StatusCode::kInvalidArgument);
}

double mass_of(const std::vector<SelectedUnit>& units) {
  double mass = 0;
  for (const SelectedUnit& unit : units) mass += double{unit.score};
  return mass;
}

TEST(AdaptiveBudget, TopPChoosesTheSmallestSetThatReachesP) {
  for (const char* inner : {"oracle", "oracle(granularity=token)", "mean(outliers=0)"}) {
    const SelectorShape shape = decorated_shape();
    const Context context(shape, kDecoratedTokens, 10);
    auto plain = filled(inner, shape, context);
    for (const double p : {0.3, 0.5, 0.9, 1.0}) {
      auto adaptive = filled(fmt::format("adaptive-budget(p={})/{}", p, inner), shape, context);
      const SelectRequest request = context.request(239, 20 + 120);
      const auto all = select(*plain, shape, request);
      const auto found = select(*adaptive, shape, request);
      for (std::size_t i = 0; i < all.size(); ++i) {
        const std::vector<SelectedUnit> units = chosen_of(found[i]);
        EXPECT_TRUE(std::equal(units.begin(), units.end(), all[i].ranked.begin()));
        const double wanted = p * double{all[i].mass};
        // Reached, or the budget ended before.
        EXPECT_TRUE(mass_of(units) >= wanted || units.size() == all[i].chosen);
        if (units.empty()) continue;
        // Not with one unit less: and the ranking is by score, so not with any other choice.
        EXPECT_LT(mass_of({units.begin(), units.end() - 1}), wanted);
      }
    }
  }
}

TEST(AdaptiveBudget, WithoutMassTheWholeBudgetIsUsed) {
  const SelectorShape shape = decorated_shape();
  const Context context(shape, kDecoratedTokens, 10);
  for (const char* rule : {"top-p", "zipvl", "entropy"}) {
    auto plain = filled("recency", shape, context);
    auto adaptive = filled(fmt::format("adaptive-budget(rule={})/recency", rule), shape, context);
    const SelectRequest request = context.request(239, 100, 1, 30);
    expect_same_answers(select(*plain, shape, request), select(*adaptive, shape, request));
  }
}

TEST(AdaptiveBudget, APoolOfALayerMovesTokensBetweenGroupsAndAddsNone) {
  SelectorShape shape = decorated_shape();
  Context context(shape, kDecoratedTokens, 12);
  // Head 0 looks hard at few tokens, the others at all alike.
  const std::size_t head_elements = std::size_t{2} * shape.head_dim;
  for (std::size_t i = 0; i < std::size_t{shape.query_heads()} * shape.head_dim; ++i) {
    context.queries()[i] *= i < head_elements ? 6.0f : 0.02f;
  }
  const SelectRequest request = context.request(239, 20 + 60);
  const auto tokens = [&](const char* name) {
    std::vector<std::uint32_t> tokens;
    for (const GroupSelection& group : select(*filled(name, shape, context), shape, request)) {
      tokens.push_back(chosen_tokens(group));
    }
    return tokens;
  };
  const auto head = tokens("adaptive-budget(p=0.9)/oracle(granularity=token)");
  const auto layer = tokens("adaptive-budget(p=0.9,pool=layer)/oracle(granularity=token)");
  EXPECT_LT(head[0], 40u);
  EXPECT_EQ(layer[0], head[0]);
  std::uint32_t total = 0;
  for (std::size_t i = 0; i < 4; ++i) {
    if (i > 0) {
      EXPECT_EQ(head[i], 60u);
      EXPECT_GT(layer[i], 60u);
    }
    total += layer[i];
  }
  EXPECT_LE(total, 4 * 60u);
  EXPECT_GT(total, 4 * 60u - 4);
}

TEST(AdaptiveBudget, ZipVlGivesAllGroupsTheFewestTokensThatReachTheMeanShare) {
  const SelectorShape shape = decorated_shape();
  const Context context(shape, kDecoratedTokens, 13);
  auto plain = filled("oracle(granularity=token)", shape, context);
  auto adaptive =
      filled("adaptive-budget(rule=zipvl,p=0.5)/oracle(granularity=token)", shape, context);
  const SelectRequest request = context.request(239, 20 + 150);
  const auto all = select(*plain, shape, request);
  const auto found = select(*adaptive, shape, request);
  const auto share = [&](std::uint32_t tokens) {
    double sum = 0;
    for (const GroupSelection& group : all) {
      sum += mass_of({group.ranked.begin(), group.ranked.begin() + tokens}) / double{group.mass};
    }
    return sum / 4;
  };
  const std::uint32_t tokens = found[0].chosen;
  for (const GroupSelection& group : found) EXPECT_EQ(group.chosen, tokens);
  ASSERT_GT(tokens, 1u);
  ASSERT_LT(tokens, 150u);
  EXPECT_GE(share(tokens), 0.5);
  EXPECT_LT(share(tokens - 1), 0.5);
}

TEST(AdaptiveBudget, EntropyDealsTheBudgetInProportionToTheDemands) {
  const SelectorShape shape = decorated_shape();
  const Context context(shape, kDecoratedTokens, 14);
  const auto tokens = [&](const char* pool, std::vector<float> demands, std::uint32_t layer) {
    auto selector =
        filled(fmt::format("adaptive-budget(rule=entropy,pool={})/oracle(granularity=token)", pool),
               shape, context);
    SelectRequest request = context.request(239, 20 + 46);
    request.layer_demands = demands;
    request.layer = layer;
    return chosen_tokens(select(*selector, shape, request)[0]);
  };
  EXPECT_EQ(tokens("layer", {0.2f, 0.3f}, 1), 55u);  // 46 * 2 * 0.6 = 55.2.
  EXPECT_EQ(tokens("layer", {0.2f, 0.3f}, 0), 37u);  // 46 * 2 * 0.4 = 36.8.
  EXPECT_EQ(tokens("head", {0.2f, 0.3f}, 1), 46u);   // Never above the budget.
  EXPECT_EQ(tokens("head", {0.2f, 0.3f}, 0), 37u);
  EXPECT_EQ(tokens("layer", {0.0f, 0.3f, 0.0f}, 1), 92u);  // At most twice as much.
  EXPECT_EQ(tokens("layer", {0.0f, 0.3f, 0.0f}, 2), 32u);  // At least 32 of 46.
  EXPECT_EQ(tokens("layer", {}, 0), 46u);
  EXPECT_EQ(tokens("layer", {std::nanf(""), 0.3f}, 1), 46u);
}

TEST(AdaptiveBudget, DemandsAreNormalisedEntropies) {
  const SelectorShape shape = decorated_shape();
  Context context(shape, kDecoratedTokens, 15);
  auto selector = filled("adaptive-budget(rule=entropy)/oracle(granularity=token)", shape, context);
  EXPECT_TRUE(std::isnan(selector->demand()));
  select(*selector, shape, context.request(239, 240));
  const float middle = selector->demand();
  for (float& query : context.queries()) query = 0.0f;
  select(*selector, shape, context.request(239, 240));
  EXPECT_NEAR(selector->demand(), 1.0f, 1e-4f) << "everything is alike";
  EXPECT_LT(middle, 0.99f);
  EXPECT_GT(middle, 0.0f);
  // A hint is nobody's demand.
  WorkerPool pool(1);
  std::vector<GroupSelection> guess(4);
  const Context other(shape, kDecoratedTokens, 16);
  ASSERT_TRUE(selector->hint(other.request(239, 240), guess, pool).ok());
  EXPECT_NEAR(selector->demand(), 1.0f, 1e-4f);
}

TEST(Compositions, AssociateAndCommuteWhereTheyDoNotTouchTheSame) {
  const SelectorShape shape = decorated_shape();
  const Context context(shape, kDecoratedTokens, 17);
  const auto answers = [&](const char* name) {
    auto selector = filled(name, shape, context, 150);
    std::vector<GroupSelection> all;
    for (std::uint32_t t = 150; t < 170; ++t) {
      selector->append(context.keys(t, 1));
      for (GroupSelection& group : select(*selector, shape, step_at(context, t, 90))) {
        all.push_back(std::move(group));
      }
    }
    return all;
  };
  expect_same_answers(answers("refresh/head-class/mean"), answers("head-class/refresh/mean"));
  expect_same_answers(answers("adaptive-budget/head-class/mean"),
                      answers("head-class/adaptive-budget/mean"));
  expect_same_answers(answers("refresh(interval=4)/refresh(interval=1)/mean"),
                      answers("refresh(interval=1)/refresh(interval=4)/mean"));
  // Less than the budget is the inner selector's will, and no reason to ask it again.
  const auto reused = answers("refresh(interval=4)/adaptive-budget(p=0.3)/oracle");
  const auto fresh = answers("adaptive-budget(p=0.3)/oracle");
  std::size_t different = 0;
  for (std::size_t i = 0; i < reused.size(); ++i) {
    if (i / 4 % 4 == 0) {
      EXPECT_EQ(chosen_of(reused[i]), chosen_of(fresh[i]));
    } else {
      different += chosen_of(reused[i]) != chosen_of(fresh[i]) ? 1u : 0u;
    }
  }
  EXPECT_GT(different, 40u);
}

TEST(Compositions, TellWhatTheInnerSelectorNeedsAndIs) {
  const auto resources = testing::resources();
  const auto token = make_selector_factory("head-class/external", resources);
  ASSERT_TRUE(token.ok());
  EXPECT_TRUE(token->needs.external_scores);
  EXPECT_TRUE(token->partial_blocks);
  EXPECT_FALSE(token->remembers);
  EXPECT_TRUE(make_selector_factory("head-class/refresh/mean", resources)->remembers);
  EXPECT_FALSE(make_selector_factory("refresh(interval=1)/mean", resources)->remembers);
  for (const char* bad :
       {"refresh(interval=0)/mean", "refresh(similarity=2)/mean", "adaptive-budget(p=1.5)/mean",
        "adaptive-budget(rule=best)/mean", "adaptive-budget(rule=zipvl,pool=layer)/mean",
        "adaptive-budget", "refresh(reduction=max)/mean"}) {
    EXPECT_EQ(make_selector_factory(bad, resources).status().code(), StatusCode::kInvalidArgument)
        << bad;
  }
}

}  // namespace
}  // namespace kvtier
