#include "selectors/registry.h"

#include "selectors/eviction_policy.h"
#include "tests/selectors/context.h"

#include <gtest/gtest.h>

namespace kvtier {
namespace {

TEST(SelectorName, TakesNamesAsUsersTypeThem) {
  auto plain = SelectorName::parse("landmark");
  ASSERT_TRUE(plain.ok());
  EXPECT_EQ(plain->family, "landmark");
  EXPECT_TRUE(plain->parameters.empty());
  auto full = SelectorName::parse(" a-b( x = 1 ,file=f(1).json)");
  ASSERT_TRUE(full.ok()) << full.status().to_string();
  EXPECT_EQ(full->family, "a-b");
  const std::vector<std::pair<std::string, std::string>> expected = {{"x", "1"},
                                                                     {"file", "f(1).json"}};
  EXPECT_EQ(full->parameters, expected);
  EXPECT_TRUE(SelectorName::parse("oracle()").ok());
}

struct BadName {
  const char* text;
  const char* says;  ///< Must be in the message.
};

TEST(Registry, RefusesBadNamesAndSaysWhatItKnows) {
  for (const BadName& bad : std::initializer_list<BadName>{
           {"", "no valid name"},
           {"  ", "no valid name"},
           {"Landmark", "no valid name"},
           {"landmark(", "parenthes"},
           {"landmark(tokens=8", "parenthes"},
           {"landmark)tokens=8(", "parenthes"},
           {"landmark(tokens=8)x", "parenthesis"},
           {"landmark(tokens)", "'tokens' has no '='"},
           {"landmark(tokens=)", "incomplete"},
           {"landmark(=8)", "incomplete"},
           {"landmark(tokens=8,)", "has no '='"},
           {"landmark(tokens=(8)", "parenthes"},
           {"quest", ", mean, minmax, "},
           {"landmark(size=8)", "known: tokens, outliers"},
           {"oracle(tokens=8)", "known: granularity, reduction"},
           {"recency(x=1)", "known: reduction"},
           {"random(seed=1)", "known: reduction"},
           {"landmark(tokens=8,tokens=4)", "given twice"},
           {"landmark(tokens=0)", "from 1 to 1024"},
           {"landmark(tokens=1025)", "from 1 to 1024"},
           {"landmark(tokens=-8)", "from 1 to 1024"},
           {"landmark(tokens=8.5)", "from 1 to 1024"},
           {"landmark(tokens=99999999999)", "from 1 to 1024"},
           {"landmark(outliers=1.1)", "from 0 to 1"},
           {"landmark(outliers=-0.1)", "from 0 to 1"},
           {"landmark(outliers=nan)", "from 0 to 1"},
           {"landmark(outliers=0.1x)", "from 0 to 1"},
           {"mean(reduction=most)", "expected one of max, sum, mean"},
           {"mean(reduction=max,reduction=max)", "given twice"},
           {"mean/oracle", "not a decorator"},
           {"/mean", "no valid name"},
           {"mean/", "no valid name"},
       }) {
    const auto factory = make_selector_factory(bad.text);
    ASSERT_FALSE(factory.ok()) << bad.text;
    EXPECT_EQ(factory.status().code(), StatusCode::kInvalidArgument);
    EXPECT_NE(factory.status().message().find(bad.says), std::string::npos)
        << bad.text << ": " << factory.status().message();
  }
}

TEST(Registry, RefusesShapesThatCannotBe) {
  SelectorShape good;
  good.tokens_max = 64;
  const auto factory = make_selector_factory("landmark");
  ASSERT_TRUE(factory.ok());
  const auto code = [&](void (*change)(SelectorShape&)) {
    SelectorShape shape = good;
    change(shape);
    return factory.value()(shape, LayerIndex(0)).status().code();
  };
  EXPECT_EQ(code([](SelectorShape&) {}), StatusCode::kOk);
  constexpr StatusCode kRefused = StatusCode::kInvalidArgument;
  EXPECT_EQ(code([](SelectorShape& s) { s.tokens_max = 0; }), kRefused);
  EXPECT_EQ(code([](SelectorShape& s) { s.head_dim = 0; }), kRefused);
  EXPECT_EQ(code([](SelectorShape& s) { s.tokens_per_block = 0; }), kRefused);
  EXPECT_EQ(code([](SelectorShape& s) { s.queries_per_kv_head = 0; }), kRefused);
  EXPECT_EQ(code([](SelectorShape& s) { s.heads_per_group = 2; }), kRefused);
  EXPECT_EQ(code([](SelectorShape& s) { s.heads_per_group = 0; }), kRefused);
}

TEST(Registry, ListsEveryFamilyWithALine) {
  ASSERT_GE(known_selectors().size(), 4u);
  for (const SelectorListing& listing : known_selectors()) {
    const std::string name = listing.decorates ? listing.name + "/mean" : listing.name;
    EXPECT_TRUE(make_selector_factory(name, testing::resources()).ok()) << name;
    EXPECT_FALSE(listing.summary.empty()) << listing.name;
    EXPECT_FALSE(listing.metadata.empty()) << listing.name;
    EXPECT_FALSE(listing.build_cost.empty()) << listing.name;
    EXPECT_FALSE(listing.step_cost.empty()) << listing.name;
    EXPECT_TRUE(listing.alias.empty() || make_selector_factory(listing.alias).ok());
    EXPECT_TRUE(!listing.decorates || !make_selector_factory(listing.name).ok());
  }
}

TEST(Registry, TheReductionOfANameReplacesTheShapes) {
  SelectorShape shape;
  shape.queries_per_kv_head = 3;
  shape.tokens_max = 300;
  const testing::Context context(shape, 300, 5);
  const auto scores = [&](const char* name) {
    auto selector = testing::make(name, shape);
    selector->append(context.keys(0, 300));
    std::vector<float> scores;
    const auto answer = testing::select(*selector, shape, context.request(299, 120));
    for (const SelectedUnit& unit : answer[0].ranked) scores.push_back(unit.score);
    return scores;
  };
  EXPECT_EQ(scores("mean"), scores("mean(reduction=sum)"));
  EXPECT_NE(scores("mean"), scores("mean(reduction=max)"));
  EXPECT_NE(scores("mean"), scores("mean(reduction=mean)"));
  EXPECT_NE(scores("mean(reduction=max)"), scores("mean(reduction=mean)"));
}

TEST(Registry, SaysWhatIsMissing) {
  const SelectorNeeds needed{.values = true, .prompt_queries = true, .rope = true};
  EXPECT_EQ(missing_needs(needed, {.values = true}),
            "prompt queries, the base of the rotary embedding (rope theta)");
  EXPECT_EQ(missing_needs(needed, needed), "");
}

TEST(Reorder, BeamsGoOnWhereTheirParentsStood) {
  SelectorShape shape;
  shape.tokens_max = 300;
  const testing::Context context(shape, 300, 5);
  std::vector<std::unique_ptr<Selector>> beams;
  for (std::uint32_t i = 0; i < 3; ++i) {
    beams.push_back(testing::make("oracle", shape));
    beams.back()->append(context.keys(0, 200 + i));
  }
  const std::size_t bytes[] = {beams[0]->metadata_bytes(), beams[1]->metadata_bytes(),
                               beams[2]->metadata_bytes()};
  const Selector* moved = beams[0].get();
  reorder_selectors(beams, std::vector<std::uint32_t>{2, 2, 0, 2});
  ASSERT_EQ(beams.size(), 4u);
  EXPECT_EQ(beams[0]->metadata_bytes(), bytes[2]);
  EXPECT_EQ(beams[1]->metadata_bytes(), bytes[2]);
  EXPECT_EQ(beams[2]->metadata_bytes(), bytes[0]);
  EXPECT_EQ(beams[2].get(), moved);
  // Apart from now on.
  beams[0]->append(context.keys(202, 5));
  EXPECT_EQ(beams[1]->metadata_bytes(), bytes[2]);
  EXPECT_EQ(beams[3]->metadata_bytes(), bytes[2]);
}

TEST(SplitNames, RespectsParentheses) {
  const auto names = split_names("a, b(c=1,d=f(2,3)),e");
  ASSERT_TRUE(names.ok());
  EXPECT_EQ(*names, (std::vector<std::string>{"a", "b(c=1,d=f(2,3))", "e"}));
  for (const char* bad : {"", "a,", ",a", "a,,b", "a(b", "a)b(", "a(b))"}) {
    EXPECT_EQ(split_names(bad).status().code(), StatusCode::kInvalidArgument) << bad;
  }
}

TEST(EvictionNames, UnknownListsTheKnown) {
  const auto policy = make_eviction_policy("fifo", 4);
  ASSERT_FALSE(policy.ok());
  for (std::string_view known : known_eviction_policies()) {
    EXPECT_NE(policy.status().message().find(known), std::string::npos);
    EXPECT_TRUE(make_eviction_policy(known, 4).ok()) << known;
  }
}

// Baselines: what they choose is known in full.

SelectorShape small_shape() {
  SelectorShape shape;
  shape.kv_heads = 2;
  shape.head_dim = 8;
  shape.sinks = 4;
  shape.window = 8;
  shape.tokens_max = 200;
  return shape;
}

TEST(Recency, TakesTheNewestFirst) {
  const SelectorShape shape = small_shape();
  const testing::Context context(shape, 200, 1);
  auto selector = testing::make("recency", shape);
  selector->append(context.keys(0, 200));
  // The far region ends at 91: block 11 gives tokens 88 to 90.
  for (const GroupSelection& group : testing::select(*selector, shape, context.request(98, 31))) {
    ASSERT_EQ(group.chosen, 3u);
    EXPECT_EQ(group.ranked[0].block, BlockIndex(11));
    EXPECT_EQ(group.ranked[0].tokens, 3u);
    EXPECT_EQ(group.ranked[1].block, BlockIndex(10));
    EXPECT_EQ(group.ranked[2].block, BlockIndex(9));
  }
}

TEST(Random, DependsOnSeedLayerPositionAndHeadGroupOnly) {
  SelectorShape shape = small_shape();
  const testing::Context context(shape, 200, 1);
  const auto answer = [&](std::uint64_t seed, std::uint32_t layer, std::uint32_t position) {
    shape.seed = seed;
    auto selector = testing::make("random", shape, LayerIndex(layer));
    selector->append(context.keys(0, 200));
    return testing::select(*selector, shape, context.request(position, 60));
  };
  const auto base = answer(1, 2, 150);
  EXPECT_EQ(base[0].ranked, answer(1, 2, 150)[0].ranked);
  EXPECT_NE(base[0].ranked, answer(2, 2, 150)[0].ranked);
  EXPECT_NE(base[0].ranked, answer(1, 3, 150)[0].ranked);
  EXPECT_NE(base[0].ranked, answer(1, 2, 151)[0].ranked);
  EXPECT_NE(base[0].ranked, base[1].ranked);
}

TEST(Random, SpreadsItsChoiceEvenly) {
  const SelectorShape shape = small_shape();
  const testing::Context context(shape, 200, 1);
  auto selector = testing::make("random", shape);
  selector->append(context.keys(0, 200));
  // Blocks 1 to 22 lie whole in the region at every one of these steps; about half are chosen.
  std::vector<int> chosen(26);
  int steps = 0;
  for (std::uint32_t position = 191; position < 200; ++position) {
    for (const GroupSelection& group :
         testing::select(*selector, shape, context.request(position, 12 + 92))) {
      ++steps;
      for (std::uint32_t i = 0; i < group.chosen; ++i) ++chosen[group.ranked[i].block.value];
    }
  }
  for (std::size_t b = 1; b <= 22; ++b) {
    // 18 draws at 1/2: beyond 1 and 17 lie 4e-5 of the cases.
    EXPECT_GT(chosen[b], 1) << b;
    EXPECT_LT(chosen[b], steps - 1) << b;
  }
}

}  // namespace
}  // namespace kvtier
