#include "tests/selectors/selector_contract.h"

#include <algorithm>
#include <set>

namespace kvtier::testing {
namespace {

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
  shape.tokens_max = kContractTokens;
  return shape;
}

}  // namespace

const std::vector<ContractCase>& contract_cases() {
  static const std::vector<ContractCase> kCases = {
      {"f16_sum", shape_of(DType::kF16, 2, 1, 3, 64, 8, 4, 64, GroupReduction::kSum)},
      {"bf16_max_grouped", shape_of(DType::kBF16, 4, 2, 2, 80, 4, 0, 16, GroupReduction::kMax)},
      {"f32_mean_tokens", shape_of(DType::kF32, 1, 1, 1, 64, 1, 5, 7, GroupReduction::kMean)},
      {"f16_large_blocks", shape_of(DType::kF16, 2, 2, 4, 96, 16, 20, 33, GroupReduction::kSum)},
      {"f16_no_window", shape_of(DType::kF16, 3, 1, 2, 64, 5, 3, 0, GroupReduction::kMax)},
      {"f16_mean_no_sinks", shape_of(DType::kF16, 2, 1, 2, 64, 8, 0, 3, GroupReduction::kMean)},
  };
  return kCases;
}

std::vector<std::string> contract_names() {
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
                             "scan(fetch=values)",
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

}  // namespace kvtier::testing
