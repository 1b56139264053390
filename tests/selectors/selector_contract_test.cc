#include "selectors/rank_blocks.h"
#include "selectors/registry.h"
#include "tests/allocation_counter.h"
#include "tests/selectors/context.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cctype>
#include <limits>
#include <new>
#include <set>
#include <string>
#include <tuple>

// What every selector promises, whatever it thinks of blocks: one suite, over every family that the
// registry knows (a new one joins by itself), some of them with parameters, and unlike shapes.

namespace kvtier {
namespace {

using testing::Context;
using testing::cut;
using testing::make;
using testing::select;

constexpr std::uint32_t kTokens = 300;

struct Case {
  const char* label;
  SelectorShape shape;
};

SelectorShape shape_of(DType dtype, std::uint32_t kv_heads, std::uint32_t heads_per_group,
                       std::uint32_t queries_per_kv_head, std::uint32_t head_dim,
                       std::uint32_t tokens_per_block, std::uint32_t sinks, std::uint32_t window,
                       GroupReduction reduction) {
  SelectorShape shape;
  shape.dtype = dtype;
  shape.kv_heads = kv_heads;
  shape.heads_per_group = heads_per_group;
  shape.queries_per_kv_head = queries_per_kv_head;
  shape.head_dim = head_dim;
  shape.tokens_per_block = tokens_per_block;
  shape.sinks = sinks;
  shape.window = window;
  shape.softmax.scale = 0.2f;
  shape.reduction = reduction;
  shape.seed = 7;
  shape.tokens_max = kTokens;
  return shape;
}

const std::vector<Case>& cases() {
  static const std::vector<Case> kCases = {
      {"f16_sum", shape_of(DType::kF16, 2, 1, 3, 64, 8, 4, 64, GroupReduction::kSum)},
      {"bf16_max_grouped", shape_of(DType::kBF16, 4, 2, 2, 80, 4, 0, 16, GroupReduction::kMax)},
      {"f32_mean_tokens", shape_of(DType::kF32, 1, 1, 1, 64, 1, 5, 7, GroupReduction::kMean)},
      {"f16_large_blocks", shape_of(DType::kF16, 2, 2, 4, 96, 16, 20, 33, GroupReduction::kSum)},
      {"f16_no_window", shape_of(DType::kF16, 3, 1, 2, 64, 5, 3, 0, GroupReduction::kMax)},
      {"f16_mean_no_sinks", shape_of(DType::kF16, 2, 1, 2, 64, 8, 0, 3, GroupReduction::kMean)},
  };
  return kCases;
}

std::vector<std::string> names() {
  std::vector<std::string> names;
  for (const SelectorListing& listing : known_selectors()) names.push_back(listing.name);
  names.insert(names.end(), {"landmark(tokens=3,outliers=0)", "landmark(tokens=16,outliers=0.5)",
                             "landmark(tokens=8,outliers=1)"});
  return names;
}

class SelectorContract : public ::testing::TestWithParam<std::tuple<std::string, std::size_t>> {
 protected:
  const std::string& name() const { return std::get<0>(GetParam()); }
  const SelectorShape& shape() const { return cases()[std::get<1>(GetParam())].shape; }
  std::uint32_t always() const { return shape().sinks + shape().window; }
  std::unique_ptr<Selector> filled(std::uint32_t tokens = kTokens) const {
    auto selector = make(name(), shape());
    selector->append(context_.keys(0, tokens));
    return selector;
  }

  Context context_{shape(), kTokens, 11};
};

std::uint32_t tokens_of(std::span<const SelectedUnit> units) {
  std::uint32_t tokens = 0;
  for (const SelectedUnit& unit : units) tokens += unit.tokens;
  return tokens;
}

void expect_same(const std::vector<GroupSelection>& a, const std::vector<GroupSelection>& b) {
  ASSERT_EQ(a.size(), b.size());
  for (std::size_t i = 0; i < a.size(); ++i) {
    EXPECT_EQ(a[i].ranked, b[i].ranked) << "head group " << i;
    EXPECT_EQ(a[i].chosen, b[i].chosen) << "head group " << i;
    EXPECT_EQ(a[i].held, b[i].held) << "head group " << i;
  }
}

/// Each unit is one far block, cut by the region and nothing else, listed once, in order.
void expect_well_formed(const GroupSelection& group, const SelectorShape& shape, FarRegion region) {
  std::set<std::uint32_t> seen;
  for (const SelectedUnit& unit : group.ranked) {
    EXPECT_TRUE(seen.insert(unit.block.value).second) << "block " << unit.block.value << " twice";
    const std::uint32_t start = unit.block.value * shape.tokens_per_block;
    EXPECT_EQ(start + unit.first_token, std::max(start, region.begin));
    EXPECT_EQ(start + unit.first_token + unit.tokens,
              std::min(start + shape.tokens_per_block, region.end));
    EXPECT_GT(unit.tokens, 0u);
  }
  const auto falls = [](std::span<const SelectedUnit> units) {
    return std::ranges::is_sorted(units, [](const SelectedUnit& a, const SelectedUnit& b) {
      return a.score != b.score ? a.score > b.score : a.block < b.block;
    });
  };
  ASSERT_LE(group.held, group.chosen);
  ASSERT_LE(group.chosen, group.ranked.size());
  const std::span units(group.ranked);
  EXPECT_TRUE(falls(units.first(group.held)));
  EXPECT_TRUE(falls(units.subspan(group.held)));
}

TEST_P(SelectorContract, KeepsTheBudgetAndUsesItToWithinOneBlock) {
  auto selector = filled();
  for (std::uint32_t position : {kTokens - 1, 250u, 100u, 299u}) {
    for (std::uint32_t far : {0u, 1u, 7u, 40u, 111u, 1000u}) {
      SCOPED_TRACE(::testing::Message() << "position " << position << ", far budget " << far);
      const FarRegion region = FarRegion::of(shape(), position);
      for (const GroupSelection& group :
           select(*selector, shape(), context_.request(position, always() + far))) {
        expect_well_formed(group, shape(), region);
        const std::uint32_t taken = tokens_of(std::span(group.ranked).first(group.chosen));
        EXPECT_LE(taken, far);
        EXPECT_GT(taken + shape().tokens_per_block, std::min(far, region.tokens()));
      }
    }
  }
}

TEST_P(SelectorContract, TheWholeBudgetChoosesEverything) {
  auto selector = filled();
  for (std::uint32_t position : {kTokens - 1, 150u}) {
    const FarRegion region = FarRegion::of(shape(), position);
    for (const GroupSelection& group :
         select(*selector, shape(), context_.request(position, position + 1))) {
      expect_well_formed(group, shape(), region);
      EXPECT_EQ(tokens_of(std::span(group.ranked).first(group.chosen)), region.tokens());
      EXPECT_EQ(group.ranked.size(), block_count(region, shape().tokens_per_block));
    }
  }
}

TEST_P(SelectorContract, TheSameCallsGiveTheSameAnswer) {
  auto first = filled();
  auto second = filled();
  for (std::uint32_t position : {200u, 299u, 120u, 299u}) {
    const SelectRequest request = context_.request(position, always() + 50, 1, 30);
    const auto answer = select(*first, shape(), request);
    expect_same(answer, select(*first, shape(), request));
    expect_same(answer, select(*second, shape(), request));
    // Without the history of the other questions.
    expect_same(answer, select(*filled(), shape(), request));
  }
}

TEST_P(SelectorContract, AnyChunkingOfAppendIsTheSame) {
  auto whole = filled();
  for (std::uint32_t chunk : {1u, 7u, 8u, 64u, 129u}) {
    auto selector = make(name(), shape());
    for (std::uint32_t t = 0; t < kTokens; t += chunk) {
      selector->append(context_.keys(t, std::min(chunk, kTokens - t)));
      // Asking in between changes nothing.
      const std::uint32_t seen = std::min(t + chunk, kTokens);
      select(*selector, shape(), context_.request(seen - 1, seen + always()));
    }
    EXPECT_EQ(selector->metadata_bytes(), whole->metadata_bytes());
    const SelectRequest request = context_.request(kTokens - 1, always() + 60, 1, 40);
    expect_same(select(*whole, shape(), request), select(*selector, shape(), request));
  }
}

TEST_P(SelectorContract, ACutIsAsIfNeverAppended) {
  const Context other(shape(), kTokens, 999);
  auto whole = filled();
  const SelectRequest request = context_.request(kTokens - 1, always() + 60, 1, 40);
  const auto expected = select(*whole, shape(), request);
  for (std::uint32_t position : {299u, 295u, 280u, 256u, 201u, 64u, 9u, 1u, 0u}) {
    SCOPED_TRACE(::testing::Message() << "cut at " << position);
    // A draft that is rejected: other tokens stand behind `position`, asked about, then cut.
    auto selector = make(name(), shape());
    selector->append(context_.keys(0, position));
    selector->append(other.keys(position, kTokens - position));
    select(*selector, shape(), request);
    cut(*selector, context_, position);
    EXPECT_EQ(selector->metadata_bytes(), filled(position)->metadata_bytes());
    if (position > 0) {
      const SelectRequest at_cut = context_.request(position - 1, always() + 30);
      expect_same(select(*filled(position), shape(), at_cut), select(*selector, shape(), at_cut));
    }
    selector->append(context_.keys(position, kTokens - position));
    expect_same(expected, select(*selector, shape(), request));
    EXPECT_EQ(selector->metadata_bytes(), whole->metadata_bytes());
  }
}

TEST_P(SelectorContract, CutsWithinTheWindowNeedNoKeys) {
  auto selector = filled();
  for (std::uint32_t back = 0; back <= shape().window; ++back) {
    EXPECT_EQ(selector->truncate_floor(kTokens - back), kTokens - back);
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
    Context broken(shape(), kTokens, 11);
    const std::size_t stride = broken.request(0, 0).query_stride;
    broken.queries()[stride + 3] = bad;
    EXPECT_EQ(code(broken.request(280, 299, 1)), StatusCode::kOk) << "not in the question";
    EXPECT_EQ(code(broken.request(280, 299, 2)), StatusCode::kInvalidArgument);
  }
}

TEST_P(SelectorContract, TwoThreadsGiveTheAnswerOfOne) {
  auto selector = filled();
  const SelectRequest request = context_.request(292, always() + 77, 8, 20);
  expect_same(select(*selector, shape(), request, 1), select(*selector, shape(), request, 2));
}

TEST_P(SelectorContract, TheBandContinuesTheRanking) {
  auto selector = filled();
  const std::uint32_t budget = always() + 60;
  const auto plain = select(*selector, shape(), context_.request(299, budget));
  for (std::uint32_t band : {3u, 25u, 60u, 5000u}) {
    const auto longer = select(*selector, shape(), context_.request(299, budget, 1, band));
    const FarRegion region = FarRegion::of(shape(), 299);
    for (std::size_t i = 0; i < plain.size(); ++i) {
      EXPECT_EQ(plain[i].ranked.size(), plain[i].chosen);
      ASSERT_EQ(longer[i].chosen, plain[i].chosen);
      EXPECT_TRUE(
          std::ranges::equal(plain[i].ranked, std::span(longer[i].ranked).first(plain[i].chosen)));
      expect_well_formed(longer[i], shape(), region);
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
    const std::uint32_t position = kTokens - queries;
    for (const GroupSelection& group :
         select(*selector, shape(), context_.request(position, always() + 45, queries))) {
      expect_well_formed(group, shape(), FarRegion::of(shape(), position));
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
  for (std::uint32_t t = 200; t < kTokens; ++t) {
    selector->append(context_.keys(t, 1));
    // Budget and band grow, so that a capacity left to grow with them would show.
    const Status status =
        selector->select(context_.request(t, always() + t - 150, 1, t), selection, pool);
    if (!status.ok()) FAIL() << status.to_string();
  }
  EXPECT_EQ(testing::allocation_count(), before);
}

std::string label(const ::testing::TestParamInfo<SelectorContract::ParamType>& instance) {
  std::string name = std::get<0>(instance.param) + "_" + cases()[std::get<1>(instance.param)].label;
  std::ranges::replace_if(
      name, [](char c) { return std::isalnum(c) == 0; }, '_');
  return name;
}

INSTANTIATE_TEST_SUITE_P(All, SelectorContract,
                         ::testing::Combine(::testing::ValuesIn(names()),
                                            ::testing::Range(std::size_t{0}, cases().size())),
                         label);

TEST(AllocationCounter, Counts) {
  const std::uint64_t before = testing::allocation_count();
  // Called by name: a new-expression that nobody uses may be optimised away.
  ::operator delete(::operator new(8));
  EXPECT_EQ(testing::allocation_count(), before + 1);
}

}  // namespace
}  // namespace kvtier
