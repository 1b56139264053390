#include "selectors/rank_blocks.h"
#include "selectors/registry.h"
#include "tests/selectors/decorated_context.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

// What decorators promise: each leaves alone what is not its business.

namespace kvtier {
namespace {

using testing::chosen_of;
using testing::Context;
using testing::decorated_shape;
using testing::expect_same_answers;
using testing::filled;
using testing::kDecoratedTokens;
using testing::select;
using testing::step_at;

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
