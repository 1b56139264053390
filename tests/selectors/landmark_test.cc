#include "selectors/rank_blocks.h"
#include "tests/selectors/context.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <numeric>
#include <string>
#include <vector>

namespace kvtier {
namespace {

using testing::Context;
using testing::make;
using testing::select;

constexpr std::uint32_t kContextTokens = 203;

/// The definition in obvious float64 loops, for one KV head per head group.
struct PlainLandmarks {
  const SelectorShape& shape;
  const Context& context;
  std::uint32_t group_tokens;
  FarRegion region;

  std::uint32_t first(std::uint32_t group) const {
    return std::max(group * group_tokens, shape.sinks);
  }
  std::uint32_t last(std::uint32_t group) const {
    return std::min((group + 1) * group_tokens, context.tokens());
  }
  std::uint32_t group_begin() const { return region.begin / group_tokens; }
  std::uint32_t group_end() const { return (region.end + group_tokens - 1) / group_tokens; }

  std::vector<double> mean(std::uint32_t head, std::uint32_t group) const {
    std::vector<double> sum(shape.head_dim);
    for (std::uint32_t t = first(group); t < last(group); ++t) {
      for (std::uint32_t e = 0; e < shape.head_dim; ++e) sum[e] += double{context.key(t, head, e)};
    }
    for (double& value : sum) value /= last(group) - first(group);
    return sum;
  }

  double worst_cosine(std::uint32_t head, std::uint32_t group) const {
    const std::vector<double> center = mean(head, group);
    double worst = 1.0;
    for (std::uint32_t t = first(group); t < last(group); ++t) {
      double dot = 0, key = 0, norm = 0;
      for (std::uint32_t e = 0; e < shape.head_dim; ++e) {
        const double k = double{context.key(t, head, e)};
        dot += k * center[e];
        key += k * k;
        norm += center[e] * center[e];
      }
      worst = std::min(worst, dot / std::sqrt(key * norm));
    }
    return worst;
  }

  /// Complete groups wholly in the region, worst first.
  std::vector<std::uint32_t> outliers(std::uint32_t head, std::size_t count) const {
    std::vector<std::uint32_t> groups;
    for (std::uint32_t g = group_begin(); (g + 1) * group_tokens <= region.end; ++g) {
      groups.push_back(g);
    }
    std::ranges::sort(groups, {}, [&](std::uint32_t g) { return worst_cosine(head, g); });
    groups.resize(std::min(count, groups.size()));
    return groups;
  }

  /// Score of each landmark; 0 for outliers, which are no landmarks.
  std::map<std::uint32_t, double> scores(std::uint32_t head, std::uint32_t queries,
                                         const std::vector<std::uint32_t>& outliers) const {
    std::map<std::uint32_t, double> result;
    const std::uint32_t heads = shape.queries_per_kv_head;
    for (std::uint32_t h = 0; h < heads; ++h) {
      std::map<std::uint32_t, double> of_head;
      for (std::uint32_t q = 0; q < queries; ++q) {
        std::map<std::uint32_t, double> logits;
        double total = 0;
        for (std::uint32_t g = group_begin(); g < group_end(); ++g) {
          const std::vector<double> center = mean(head, g);
          double dot = 0;
          for (std::uint32_t e = 0; e < shape.head_dim; ++e) {
            dot += center[e] * double{context.query(q, head * heads + h, e)};
          }
          logits[g] = dot * double{shape.softmax.scale};
          if (std::ranges::count(outliers, g) == 0) total += std::exp(logits[g]);
        }
        const bool mean_logits = shape.reduction == GroupReduction::kMean;
        for (const auto& [g, logit] : logits) {
          if (mean_logits) {
            of_head[g] += logit / (queries * heads);
          } else if (std::ranges::count(outliers, g) == 0) {
            of_head[g] += std::exp(logit) / total;
          }
        }
      }
      for (const auto& [g, score] : of_head) {
        result[g] = shape.reduction == GroupReduction::kMax ? std::max(result[g], score)
                                                            : result[g] + score;
      }
    }
    return result;
  }

  double block_score(const SelectedUnit& unit,
                     const std::map<std::uint32_t, double>& scores) const {
    double score = 0;
    const std::uint32_t start = unit.block.value * shape.tokens_per_block + unit.first_token;
    for (std::uint32_t t = start; t < start + unit.tokens; ++t) {
      const std::uint32_t g = t / group_tokens;
      const auto found = scores.find(g);
      if (found == scores.end()) continue;
      score += shape.reduction == GroupReduction::kMean ? found->second / unit.tokens
                                                        : found->second / (last(g) - first(g));
    }
    return score;
  }
};

struct LandmarkCase {
  std::uint32_t tokens_per_block;
  std::uint32_t group_tokens;
  std::uint32_t sinks;
  std::uint32_t window;
  std::uint32_t queries;
  GroupReduction reduction;
};

TEST(Landmark, ScoresEqualAPlainFloat64Computation) {
  for (const LandmarkCase& c : std::initializer_list<LandmarkCase>{
           {8, 8, 4, 40, 1, GroupReduction::kSum},
           {8, 8, 4, 40, 1, GroupReduction::kMax},
           {8, 8, 4, 40, 1, GroupReduction::kMean},
           {8, 8, 0, 40, 3, GroupReduction::kMax},
           {8, 8, 0, 40, 3, GroupReduction::kMean},
           {2, 8, 4, 40, 1, GroupReduction::kSum},   // Blocks smaller than groups.
           {16, 4, 4, 40, 2, GroupReduction::kSum},  // Larger.
           {5, 8, 6, 17, 1, GroupReduction::kMax},   // Neither divides the other.
           {8, 8, 4, 1, 1, GroupReduction::kSum},    // Part of the open group is ranked.
           {8, 8, 11, 40, 1, GroupReduction::kSum},  // A group of sinks only, and one of both.
       }) {
    SelectorShape shape;
    shape.dtype = DType::kF32;
    shape.kv_heads = 2;
    shape.queries_per_kv_head = 3;
    shape.head_dim = 32;
    shape.tokens_per_block = c.tokens_per_block;
    shape.sinks = c.sinks;
    shape.window = c.window;
    shape.softmax.scale = 0.3f;
    shape.reduction = c.reduction;
    shape.tokens_max = kContextTokens;
    SCOPED_TRACE(::testing::Message() << "block " << c.tokens_per_block << ", group "
                                      << c.group_tokens << ", window " << c.window);
    const Context context(shape, kContextTokens, 5);
    auto selector =
        make("landmark(outliers=0,tokens=" + std::to_string(c.group_tokens) + ")", shape);
    selector->append(context.keys(0, kContextTokens));
    const std::uint32_t position = kContextTokens - c.queries;
    const auto selection =
        select(*selector, shape, context.request(position, kContextTokens, c.queries));
    const PlainLandmarks plain{shape, context, c.group_tokens, FarRegion::of(shape, position)};
    for (std::uint32_t head = 0; head < 2; ++head) {
      const auto scores = plain.scores(head, c.queries, {});
      EXPECT_EQ(selection[head].held, 0u);
      for (const SelectedUnit& unit : selection[head].ranked) {
        // 32 products and a softmax in float32: some tens of roundings of 6e-8 each.
        const double expected = plain.block_score(unit, scores);
        EXPECT_NEAR(double{unit.score}, expected, 1e-5 * std::max(1.0, std::abs(expected)))
            << "head " << head << ", block " << unit.block.value;
      }
    }
  }
}

TEST(Landmark, OutliersAreTheWorstGroupsHeldAndOutOfTheSoftmax) {
  SelectorShape shape;
  shape.dtype = DType::kF32;
  shape.kv_heads = 2;
  shape.queries_per_kv_head = 2;
  shape.head_dim = 32;
  shape.sinks = 4;
  shape.window = 16;
  shape.softmax.scale = 0.3f;
  shape.tokens_max = kContextTokens;
  const Context context(shape, kContextTokens, 6);
  auto selector = make("landmark", shape);
  selector->append(context.keys(0, kContextTokens));
  // 0.1875 of 130 tokens are 24: three groups of 8, or more when the first, short one is among
  // them.
  const auto selection =
      select(*selector, shape, context.request(kContextTokens - 1, 20 + 130, 1, 40));
  const PlainLandmarks plain{shape, context, 8, FarRegion::of(shape, kContextTokens - 1)};
  for (std::uint32_t head = 0; head < 2; ++head) {
    ASSERT_GE(selection[head].held, 3u);
    const auto outliers = plain.outliers(head, selection[head].held);
    std::vector<std::uint32_t> held;
    for (std::uint32_t i = 0; i < selection[head].held; ++i) {
      held.push_back(selection[head].ranked[i].block.value);
      EXPECT_EQ(selection[head].ranked[i].score, 0.0f);
    }
    EXPECT_TRUE(std::ranges::is_permutation(held, outliers));
    const auto scores = plain.scores(head, 1, outliers);
    for (const SelectedUnit& unit : selection[head].ranked) {
      EXPECT_NEAR(double{unit.score}, plain.block_score(unit, scores), 1e-5);
    }
  }
}

TEST(Landmark, OutliersTakeNoMoreThanTheirPartInWholeBlocks) {
  for (std::uint32_t tokens_per_block : {1u, 4u, 8u, 32u, 5u}) {
    SelectorShape shape;
    shape.head_dim = 32;
    shape.tokens_per_block = tokens_per_block;
    shape.window = 16;
    shape.tokens_max = kContextTokens;
    const Context context(shape, kContextTokens, 6);
    auto selector = make("landmark(outliers=0.5)", shape);
    selector->append(context.keys(0, kContextTokens));
    for (std::uint32_t far : {10u, 64u, 100u}) {
      const auto selection =
          select(*selector, shape, context.request(kContextTokens - 1, 20 + far));
      std::uint32_t held = 0;
      for (std::uint32_t i = 0; i < selection[0].held; ++i) held += selection[0].ranked[i].tokens;
      EXPECT_LE(held, far / 2);
      EXPECT_TRUE(held > 0 || far < 100) << "block of " << tokens_per_block;
    }
  }
}

TEST(Landmark, AStrangerMakesItsGroupAnOutlier) {
  SelectorShape shape;
  shape.head_dim = 32;
  shape.window = 16;
  shape.tokens_max = kContextTokens;
  Context context(shape, kContextTokens, 6);
  for (std::uint32_t t = 0; t < kContextTokens; ++t) {
    for (std::uint32_t e = 0; e < 32; ++e) {
      context.set_key(t, 0, e, t == 83 && e < 16 ? -1.0f : 1.0f);
    }
  }
  auto selector = make("landmark", shape);
  selector->append(context.keys(0, kContextTokens));
  // Room for one outlier group.
  const auto selection = select(*selector, shape, context.request(kContextTokens - 1, 20 + 48));
  ASSERT_EQ(selection[0].held, 1u);
  EXPECT_EQ(selection[0].ranked[0].block, BlockIndex(83 / 8));
}

/// Keys whose logits are given: query head h is the unit vector e_h, so the key's element h is it.
TEST(Landmark, GroupReductionsDifferWhereTheyShould) {
  SelectorShape shape;
  shape.dtype = DType::kF32;
  shape.queries_per_kv_head = 3;
  shape.head_dim = 8;
  shape.tokens_per_block = 2;
  shape.sinks = 0;
  shape.window = 0;
  shape.tokens_max = 8;
  Context context(shape, 8, 1);
  for (std::uint32_t h = 0; h < 3; ++h) {
    for (std::uint32_t e = 0; e < 8; ++e) context.queries()[h * 8 + e] = h == e ? 1.0f : 0.0f;
  }
  // Weights of three heads on four groups. Group 0: one head's favourite (largest weight). Group 1:
  // two heads like it (largest sum). Group 2: nobody minds it (largest mean logit).
  const float weights[3][4] = {{0.90f, 1e-6f, 0.0999f, 1e-4f},
                               {0.02f, 0.60f, 0.3799f, 1e-4f},
                               {0.02f, 0.60f, 0.3799f, 1e-4f}};
  for (std::uint32_t t = 0; t < 8; ++t) {
    for (std::uint32_t e = 0; e < 8; ++e) {
      context.set_key(t, 0, e, e < 3 ? std::log(weights[e][t / 2]) : 0.0f);
    }
  }
  const std::pair<GroupReduction, std::uint32_t> kBest[] = {
      {GroupReduction::kMax, 0}, {GroupReduction::kSum, 1}, {GroupReduction::kMean, 2}};
  for (const auto& [reduction, best] : kBest) {
    shape.reduction = reduction;
    auto selector = make("landmark(tokens=2,outliers=0)", shape);
    selector->append(context.keys(0, 8));
    const auto selection = select(*selector, shape, context.request(7, 2));
    ASSERT_EQ(selection[0].chosen, 1u);
    EXPECT_EQ(selection[0].ranked[0].block, BlockIndex(best));
  }
}

TEST(Landmark, ReportsItsBytes) {
  SelectorShape shape;
  shape.kv_heads = 4;
  shape.heads_per_group = 2;
  shape.head_dim = 64;
  shape.window = 60;
  shape.tokens_max = 1000;
  const Context context(shape, 1000, 1);
  auto selector = make("landmark", shape);
  // Room for the recent keys: the window in whole groups and two more, for each KV head.
  const std::size_t fixed = 4u * (64 + 16) * 64 * 2;
  EXPECT_EQ(selector->metadata_bytes(), fixed);
  selector->append(context.keys(0, 1000));
  EXPECT_EQ(selector->metadata_bytes(), fixed + 125u * (4 * 64 * 2 + 2 * 4));
  selector->truncate(999);
  EXPECT_EQ(selector->metadata_bytes(), fixed + 124u * (4 * 64 * 2 + 2 * 4));
}

TEST(Landmark, RefusesLogitsThatOverflow) {
  for (GroupReduction reduction :
       {GroupReduction::kSum, GroupReduction::kMax, GroupReduction::kMean}) {
    SelectorShape shape;
    shape.dtype = DType::kF32;
    shape.head_dim = 8;
    shape.window = 8;
    shape.reduction = reduction;
    shape.tokens_max = 64;
    Context context(shape, 64, 1);
    for (std::uint32_t e = 0; e < 8; ++e) {
      for (std::uint32_t t = 24; t < 32; ++t) context.set_key(t, 0, e, 1e30f);
      context.queries()[e] = 1e30f;
    }
    auto selector = make("landmark", shape);
    selector->append(context.keys(0, 64));
    WorkerPool pool(1);
    std::vector<GroupSelection> selection(1);
    const Status status = selector->select(context.request(63, 30), selection, pool);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    EXPECT_NE(status.message().find("overflow"), std::string::npos) << status.message();
  }
}

TEST(LandmarkDeathTest, ACutThatNeedsKeysIsNeverGuessed) {
  SelectorShape shape;
  shape.head_dim = 8;
  shape.window = 8;
  shape.tokens_max = 400;
  const Context context(shape, 400, 1);
  auto selector = make("landmark", shape);
  selector->append(context.keys(0, 400));
  EXPECT_EQ(selector->truncate_floor(101), 96u);
  EXPECT_EQ(selector->truncate_floor(96), 96u);
  EXPECT_DEATH(selector->truncate(101), "cut at 96");
}

}  // namespace
}  // namespace kvtier
