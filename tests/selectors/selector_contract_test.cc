#include "tests/selectors/selector_contract.h"

#include "selectors/rank_blocks.h"
#include "tests/allocation_counter.h"

#include <algorithm>
#include <cctype>
#include <cmath>
#include <limits>
#include <new>
#include <string>
#include <vector>

// What a selector answers: the budget, the ranking, the requests that it refuses.

namespace kvtier {
namespace {

using testing::contract_cases;
using testing::contract_names;
using testing::expect_same;
using testing::expect_well_formed;
using testing::kContractTokens;
using testing::select;
using testing::SelectorContract;
using testing::tokens_of;

TEST_P(SelectorContract, KeepsTheBudgetAndUsesItToWithinOneBlock) {
  auto selector = filled();
  for (std::uint32_t position : {kContractTokens - 1, 250u, 100u, 299u}) {
    for (std::uint32_t far : {0u, 1u, 7u, 40u, 111u, 1000u}) {
      SCOPED_TRACE(::testing::Message() << "position " << position << ", far budget " << far);
      const FarRegion region = FarRegion::of(shape(), position);
      for (const GroupSelection& group :
           select(*selector, shape(), context_.request(position, always() + far))) {
        expect_well_formed(group, shape(), region, factory().partial_blocks);
        const std::uint32_t taken = tokens_of(std::span(group.ranked).first(group.chosen));
        EXPECT_LE(taken, far);
        if (uses_the_budget()) {
          EXPECT_GT(taken + shape().tokens_per_block, std::min(far, region.tokens()));
        }
      }
    }
  }
}

TEST_P(SelectorContract, TheWholeBudgetChoosesEverything) {
  if (!uses_the_budget()) GTEST_SKIP() << "may leave some of the budget unused";
  auto selector = filled();
  for (std::uint32_t position : {kContractTokens - 1, 150u}) {
    const FarRegion region = FarRegion::of(shape(), position);
    for (const GroupSelection& group :
         select(*selector, shape(), context_.request(position, position + 1))) {
      expect_well_formed(group, shape(), region, factory().partial_blocks);
      EXPECT_EQ(tokens_of(std::span(group.ranked).first(group.chosen)), region.tokens());
      if (!factory().partial_blocks) {
        EXPECT_EQ(group.ranked.size(), block_count(region, shape().tokens_per_block));
      }
    }
  }
}

TEST_P(SelectorContract, TheSameCallsGiveTheSameAnswer) {
  auto first = filled();
  auto second = filled();
  for (std::uint32_t position : {200u, 299u, 120u, 299u}) {
    const SelectRequest request = context_.request(position, always() + 50, 1, 30);
    const auto answer = select(*first, shape(), request);
    expect_same(answer, select(*second, shape(), request));
    if (factory().remembers) continue;
    expect_same(answer, select(*first, shape(), request));
    // Without the history of the other questions.
    expect_same(answer, select(*filled(), shape(), request));
  }
}

TEST_P(SelectorContract, AnEmptyFarRegionAndASingleBlock) {
  auto selector = filled();
  if (always() > 0) {
    for (const GroupSelection& group :
         select(*selector, shape(), context_.request(always() - 1, always() + 10))) {
      EXPECT_TRUE(group.ranked.empty());
      EXPECT_EQ(group.chosen, 0u);
      EXPECT_EQ(group.held, 0u);
    }
  }
  if (!uses_the_budget()) return;
  for (const GroupSelection& group :
       select(*selector, shape(), context_.request(always(), always() + 1))) {
    ASSERT_EQ(group.ranked.size(), 1u);
    EXPECT_EQ(group.chosen, 1u);
    EXPECT_EQ(group.ranked[0].tokens, 1u);
  }
}

TEST_P(SelectorContract, RefusesWhatItCannotAnswer) {
  auto selector = filled();
  WorkerPool pool(1);
  std::vector<GroupSelection> selection(shape().head_groups());
  const auto code = [&](const SelectRequest& request) {
    return selector->select(request, selection, pool).code();
  };
  EXPECT_EQ(code(context_.request(299, always())), StatusCode::kOk);
  if (always() > 0) {
    EXPECT_EQ(code(context_.request(299, always() - 1)), StatusCode::kInvalidArgument);
  }
  EXPECT_EQ(code(context_.request(280, 299, 0)), StatusCode::kInvalidArgument);
  EXPECT_EQ(code(context_.request(280, 299, 9)), StatusCode::kInvalidArgument);
  for (float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    Context broken(shape(), kContractTokens, 11);
    const std::size_t stride = broken.request(0, 0).query_stride;
    broken.queries()[stride + 3] = bad;
    EXPECT_EQ(code(broken.request(280, 299, 1)), StatusCode::kOk) << "not in the question";
    EXPECT_EQ(code(broken.request(280, 299, 2)), StatusCode::kInvalidArgument);
  }
}

TEST_P(SelectorContract, TwoThreadsGiveTheAnswerOfOne) {
  auto one = filled();
  auto two = filled();
  const SelectRequest request = context_.request(292, always() + 77, 8, 20);
  expect_same(select(*one, shape(), request, 1), select(*two, shape(), request, 2));
}

/// Goes on with a step per token; the answers along the way.
std::vector<std::vector<GroupSelection>> go_on(Selector& selector, const SelectorShape& shape,
                                               const Context& context, std::uint32_t first) {
  std::vector<std::vector<GroupSelection>> answers;
  for (std::uint32_t t = first; t < kContractTokens; ++t) {
    selector.append(context.keys(t, 1));
    const std::uint32_t budget = shape.sinks + shape.window + 40;
    if (t + 1 >= budget) answers.push_back(select(selector, shape, context.request(t, budget)));
  }
  return answers;
}

// What is not chosen is estimated; whatever the quality, it is about those tokens alone.
TEST_P(SelectorContract, TheRestIsEstimatedOrItSaysThatItIsNot) {
  auto selector = filled();
  WorkerPool pool(1);
  std::vector<GroupSelection> selection(shape().head_groups());
  const std::size_t rows = 2 * shape().query_heads();
  std::vector<float> out(rows * shape().value_dim, 77.0f);
  std::vector<float> lse(rows, 77.0f);
  const SelectRequest request = context_.request(kContractTokens - 2, always() + 40 + 1, 2);
  ASSERT_TRUE(selector->select(request, selection, pool).ok());
  const Status status = selector->estimate_rest(request, selection, {out.data(), lse.data()}, pool);
  EXPECT_EQ(status.ok(), selector->estimates_rest()) << status.to_string();
  if (!selector->estimates_rest()) return;
  for (std::size_t row = 0; row < rows; ++row) {
    EXPECT_TRUE(std::isfinite(lse[row])) << row;
    // Values lie in [-1, 1], and so do their means.
    for (std::size_t i = 0; i < shape().value_dim; ++i) {
      EXPECT_LE(std::abs(out[row * shape().value_dim + i]), 1.001f) << row << ", " << i;
    }
  }
  // Nothing is left over when everything is chosen.
  const SelectRequest all = context_.request(kContractTokens - 2, kContractTokens, 2);
  ASSERT_TRUE(selector->select(all, selection, pool).ok());
  ASSERT_TRUE(selector->estimate_rest(all, selection, {out.data(), lse.data()}, pool).ok());
  for (std::size_t row = 0; row < rows; ++row) EXPECT_EQ(lse[row], kEmptyLse) << row;
}

TEST_P(SelectorContract, TheBandContinuesTheRanking) {
  if (!uses_the_budget()) GTEST_SKIP() << "has no cut at the budget";
  const std::uint32_t budget = always() + 60;
  const auto plain = select(*filled(), shape(), context_.request(299, budget));
  for (std::uint32_t band : {3u, 25u, 60u, 5000u}) {
    const auto longer = select(*filled(), shape(), context_.request(299, budget, 1, band));
    const FarRegion region = FarRegion::of(shape(), 299);
    for (std::size_t i = 0; i < plain.size(); ++i) {
      EXPECT_EQ(plain[i].ranked.size(), plain[i].chosen);
      ASSERT_EQ(longer[i].chosen, plain[i].chosen);
      EXPECT_TRUE(
          std::ranges::equal(plain[i].ranked, std::span(longer[i].ranked).first(plain[i].chosen)));
      expect_well_formed(longer[i], shape(), region, factory().partial_blocks);
      const std::uint32_t all = tokens_of(longer[i].ranked);
      const std::uint32_t limit = std::min(60 + band, region.tokens());
      EXPECT_LE(all, limit);
      EXPECT_GT(all + shape().tokens_per_block, limit);
    }
  }
}

TEST_P(SelectorContract, SeveralQueriesShareOneAnswer) {
  auto selector = filled();
  for (std::uint32_t queries : {2u, 5u, 8u}) {
    const std::uint32_t position = kContractTokens - queries;
    for (const GroupSelection& group :
         select(*selector, shape(), context_.request(position, always() + 45, queries))) {
      expect_well_formed(group, shape(), FarRegion::of(shape(), position),
                         factory().partial_blocks);
      EXPECT_LE(tokens_of(std::span(group.ranked).first(group.chosen)), 45u);
    }
  }
}

TEST_P(SelectorContract, AStepAllocatesNothingAfterTheFirst) {
  auto selector = make(name(), shape());
  selector->append(context_.keys(0, 200));
  WorkerPool pool(1);
  std::vector<GroupSelection> selection(shape().head_groups());
  ASSERT_TRUE(selector->select(context_.request(192, always() + 8, 8), selection, pool).ok());
  const std::uint64_t before = testing::allocation_count();
  for (std::uint32_t t = 200; t < kContractTokens; ++t) {
    selector->append(context_.keys(t, 1));
    // Budget and band grow, so that a capacity left to grow with them would show.
    const Status status =
        selector->select(context_.request(t, always() + t - 150, 1, t), selection, pool);
    if (!status.ok()) FAIL() << status.to_string();
  }
  EXPECT_EQ(testing::allocation_count(), before);
}

std::string label(const ::testing::TestParamInfo<SelectorContract::ParamType>& instance) {
  std::string name =
      std::get<0>(instance.param) + "_" + contract_cases()[std::get<1>(instance.param)].label;
  std::ranges::replace_if(
      name, [](char c) { return std::isalnum(c) == 0; }, '_');
  return name;
}

INSTANTIATE_TEST_SUITE_P(All, SelectorContract,
                         ::testing::Combine(::testing::ValuesIn(contract_names()),
                                            ::testing::Range(std::size_t{0},
                                                             contract_cases().size())),
                         label);

TEST(AllocationCounter, Counts) {
  const std::uint64_t before = testing::allocation_count();
  // Called by name: a new-expression that nobody uses may be optimised away.
  ::operator delete(::operator new(8));
  EXPECT_EQ(testing::allocation_count(), before + 1);
}

}  // namespace
}  // namespace kvtier
