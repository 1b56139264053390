#include "selectors/rank_blocks.h"
#include "selectors/registry.h"
#include "tests/allocation_counter.h"
#include "tests/selectors/context.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cctype>
#include <cmath>
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
  shape.rope = {.theta = 10000.0};
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

// Every family at its defaults (decorators around a plain one), then some with parameters.
std::vector<std::string> names() {
  std::vector<std::string> names;
  for (const SelectorListing& listing : known_selectors()) {
    names.push_back(listing.decorates ? listing.name + "/mean" : listing.name);
  }
  names.insert(names.end(), {"landmark",
                             "mean(tokens=3,outliers=0)",
                             "mean(tokens=16,outliers=0.5,reduction=max)",
                             "mean(tokens=8,outliers=1)",
                             "scan(bits=2,values=16)",
                             "scan(tail=off)",
                             "two-stage(coarse=minmax,keep=2,tokens=8,bits=2,values=16)",
                             "two-stage(coarse=mean,tokens=24,tail=off)",
                             "chunk-tree(tokens=3,effort=0,merge=1)",
                             "hierarchical(chunks=16:4,keep=40)",
                             "sentence(cap=9)",
                             "probe(frame=unrotated,share=layer,tokens=8)",
                             "soft-vote(frame=unrotated,share=layer,pool=3)",
                             "vq(parts=4,windowed=on)",
                             "oracle(granularity=token)",
                             "external(granularity=block,pool=sum)",
                             "cluster(segment=32,tokens=8,estimate=on)",
                             "prompt-observed(score=ems,queries=4)",
                             "prompt-observed(score=kvcrush,queries=9,kernel=3)",
                             "cluster(segment=50,tokens=5,estimate=on,zone=0.25)",
                             "refresh(interval=9,similarity=0.5)/oracle(granularity=token)",
                             "head-class/adaptive-budget(rule=zipvl)/refresh/mean",
                             "adaptive-budget(rule=entropy)/mean"});
  return names;
}

class SelectorContract : public ::testing::TestWithParam<std::tuple<std::string, std::size_t>> {
 protected:
  const std::string& name() const { return std::get<0>(GetParam()); }
  const SelectorShape& shape() const { return cases()[std::get<1>(GetParam())].shape; }
  std::uint32_t always() const { return shape().sinks + shape().window; }
  SelectorFactory factory() const {
    return make_selector_factory(name(), testing::resources()).value();
  }
  /// After a prompt of so many tokens, of which the last half was observed.
  std::unique_ptr<Selector> filled(std::uint32_t tokens = kTokens) const {
    auto selector = make(name(), shape());
    selector->append(context_.keys(0, tokens));
    context_.observe(*selector, tokens / 2, tokens - tokens / 2);
    return selector;
  }
  /// Some head groups may be told to hold less than the budget allows.
  bool uses_the_budget() const {
    return !name().starts_with("head-class") && !name().starts_with("adaptive-budget");
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

/// Each unit is one far block, cut by the region and nothing else (or a part of one, where
/// `partial` says so), each token listed once, in order.
void expect_well_formed(const GroupSelection& group, const SelectorShape& shape, FarRegion region,
                        bool partial) {
  std::set<std::uint32_t> seen;
  for (const SelectedUnit& unit : group.ranked) {
    const std::uint32_t start = unit.block.value * shape.tokens_per_block;
    const std::uint32_t begin = start + unit.first_token;
    ASSERT_GT(unit.tokens, 0u);
    ASSERT_LE(unit.first_token + unit.tokens, shape.tokens_per_block);
    ASSERT_GE(begin, region.begin);
    ASSERT_LE(begin + unit.tokens, region.end);
    for (std::uint32_t t = begin; t < begin + unit.tokens; ++t) {
      EXPECT_TRUE(seen.insert(t).second) << "token " << t << " twice";
    }
    if (partial) continue;
    EXPECT_EQ(begin, std::max(start, region.begin));
    EXPECT_EQ(begin + unit.tokens, std::min(start + shape.tokens_per_block, region.end));
  }
  const auto falls = [partial](std::span<const SelectedUnit> units) {
    return std::ranges::is_sorted(units, [partial](const SelectedUnit& a, const SelectedUnit& b) {
      return a.score != b.score ? a.score > b.score : !partial && a.block < b.block;
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
  for (std::uint32_t position : {kTokens - 1, 150u}) {
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

TEST_P(SelectorContract, AnyChunkingOfAppendIsTheSame) {
  auto whole = filled();
  for (std::uint32_t chunk : {1u, 7u, 8u, 64u, 129u}) {
    auto selector = make(name(), shape());
    for (std::uint32_t t = 0; t < kTokens; t += chunk) {
      selector->append(context_.keys(t, std::min(chunk, kTokens - t)));
      // Asking in between changes nothing, except for those who learn from it.
      if (factory().remembers) continue;
      const std::uint32_t seen = std::min(t + chunk, kTokens);
      select(*selector, shape(), context_.request(seen - 1, seen + always()));
    }
    context_.observe(*selector, kTokens / 2, kTokens - kTokens / 2);
    EXPECT_EQ(selector->metadata_bytes(), whole->metadata_bytes());
    const SelectRequest request = context_.request(kTokens - 1, always() + 60, 1, 40);
    expect_same(select(*whole, shape(), request), select(*selector, shape(), request));
  }
}

TEST_P(SelectorContract, ACutIsAsIfNeverAppended) {
  const Context other(shape(), kTokens, 999);
  const SelectRequest request = context_.request(kTokens - 1, always() + 60, 1, 40);
  for (std::uint32_t position : {299u, 295u, 280u, 256u, 201u, 64u, 9u, 1u, 0u}) {
    SCOPED_TRACE(::testing::Message() << "cut at " << position);
    // A draft that is rejected: other tokens stand behind `position`, asked about, then cut.
    auto selector = filled(position);
    auto undisturbed = filled(position);
    selector->append(other.keys(position, kTokens - position));
    select(*selector, shape(), request);
    cut(*selector, context_, position);
    EXPECT_EQ(selector->metadata_bytes(), undisturbed->metadata_bytes());
    if (position > 0) {
      const SelectRequest at_cut = context_.request(position - 1, always() + 30);
      expect_same(select(*undisturbed, shape(), at_cut), select(*selector, shape(), at_cut));
    }
    selector->append(context_.keys(position, kTokens - position));
    undisturbed->append(context_.keys(position, kTokens - position));
    expect_same(select(*undisturbed, shape(), request), select(*selector, shape(), request));
    EXPECT_EQ(selector->metadata_bytes(), undisturbed->metadata_bytes());
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
    Context broken(shape(), kTokens, 11);
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
  for (std::uint32_t t = first; t < kTokens; ++t) {
    selector.append(context.keys(t, 1));
    const std::uint32_t budget = shape.sinks + shape.window + 40;
    if (t + 1 >= budget) answers.push_back(select(selector, shape, context.request(t, budget)));
  }
  return answers;
}

TEST_P(SelectorContract, AForkGoesOnAsACopyWould) {
  auto selector = filled(220);
  select(*selector, shape(), context_.request(219, always() + 40));
  auto fork = selector->fork();
  const auto expected = go_on(*selector, shape(), context_, 220);
  const auto found = go_on(*fork, shape(), context_, 220);
  ASSERT_EQ(found.size(), expected.size());
  for (std::size_t i = 0; i < found.size(); ++i) expect_same(expected[i], found[i]);
  EXPECT_EQ(fork->metadata_bytes(), selector->metadata_bytes());
}

TEST_P(SelectorContract, SavedAndRestoredItNeverStopped) {
  auto selector = filled(220);
  select(*selector, shape(), context_.request(219, always() + 40));
  const std::vector<std::byte> bytes = save_selector(*selector, name(), shape());
  auto restored = restore_selector(bytes, factory(), shape(), LayerIndex(0));
  ASSERT_TRUE(restored.ok()) << restored.status().to_string();
  EXPECT_EQ((*restored)->metadata_bytes(), selector->metadata_bytes());
  EXPECT_EQ(save_selector(**restored, name(), shape()), bytes);
  const auto expected = go_on(*selector, shape(), context_, 220);
  const auto found = go_on(**restored, shape(), context_, 220);
  ASSERT_EQ(found.size(), expected.size());
  for (std::size_t i = 0; i < found.size(); ++i) expect_same(expected[i], found[i]);
}

TEST_P(SelectorContract, DamagedStateIsRefused) {
  auto selector = filled(100);
  const std::vector<std::byte> bytes = save_selector(*selector, name(), shape());
  for (std::size_t i = 0; i < bytes.size(); i += 1 + bytes.size() / 37) {
    std::vector<std::byte> damaged = bytes;
    damaged[i] ^= std::byte{4};
    EXPECT_FALSE(restore_selector(damaged, factory(), shape(), LayerIndex(0)).ok()) << i;
    const std::span cut(bytes.data(), i);
    EXPECT_FALSE(restore_selector(cut, factory(), shape(), LayerIndex(0)).ok()) << i;
  }
  SelectorShape other = shape();
  other.window += 1;
  EXPECT_EQ(restore_selector(bytes, factory(), other, LayerIndex(0)).status().code(),
            StatusCode::kInvalidArgument);
}

TEST_P(SelectorContract, AHintLeavesNoTrace) {
  auto selector = filled(250);
  auto undisturbed = filled(250);
  WorkerPool pool(1);
  std::vector<GroupSelection> guess(shape().head_groups());
  for (std::uint32_t t = 250; t < 270; ++t) {
    selector->append(context_.keys(t, 1));
    undisturbed->append(context_.keys(t, 1));
    // Several queries, so that the guess is another question than the step's.
    ASSERT_TRUE(selector->hint(context_.request(t - 3, always() + 20 + 4, 4), guess, pool).ok());
    const SelectRequest request = context_.request(t, always() + 40);
    expect_same(select(*undisturbed, shape(), request), select(*selector, shape(), request));
  }
}

// What is not chosen is estimated; whatever the quality, it is about those tokens alone.
TEST_P(SelectorContract, TheRestIsEstimatedOrItSaysThatItIsNot) {
  auto selector = filled();
  WorkerPool pool(1);
  std::vector<GroupSelection> selection(shape().head_groups());
  const std::size_t rows = 2 * shape().query_heads();
  std::vector<float> out(rows * shape().value_dim, 77.0f);
  std::vector<float> lse(rows, 77.0f);
  const SelectRequest request = context_.request(kTokens - 2, always() + 40 + 1, 2);
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
  const SelectRequest all = context_.request(kTokens - 2, kTokens, 2);
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
    const std::uint32_t position = kTokens - queries;
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
