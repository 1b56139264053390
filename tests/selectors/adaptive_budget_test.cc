#include "selectors/rank_blocks.h"
#include "selectors/registry.h"
#include "tests/selectors/decorated_context.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <vector>

// What `adaptive-budget` promises: less where less will do, and never more than the budget.

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

}  // namespace
}  // namespace kvtier
