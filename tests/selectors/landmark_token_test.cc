#include "selectors/rank_blocks.h"
#include "tests/selectors/context.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <vector>

namespace kvtier {
namespace {

using testing::Context;
using testing::make;
using testing::select;

SelectorShape marked_shape(GroupReduction reduction) {
  SelectorShape shape;
  shape.dtype = DType::kF32;
  shape.kv_heads = 2;
  shape.queries_per_kv_head = 3;
  shape.head_dim = 64;
  shape.tokens_per_block = 8;
  shape.sinks = 5;
  shape.window = 12;
  shape.softmax.scale = 0.1f;
  shape.reduction = reduction;
  shape.tokens_max = 400;
  return shape;
}

/// [begin, end) of the blocks that landmarks before `visible` close.
std::vector<std::pair<std::uint32_t, std::uint32_t>> marked_blocks(const Context& context,
                                                                   std::uint32_t visible) {
  std::vector<std::pair<std::uint32_t, std::uint32_t>> blocks;
  std::uint32_t begin = 0;
  for (std::uint32_t t = 0; t < visible; ++t) {
    if ((context.mark(t) & kIsLandmark) == 0) continue;
    blocks.emplace_back(begin, t + 1);
    begin = t + 1;
  }
  return blocks;
}

// The whole budget: every far token once, with the score of the landmark that closes its block.
TEST(LandmarkToken, ScoresAreTheLandmarksSoftmax) {
  for (const GroupReduction reduction :
       {GroupReduction::kMax, GroupReduction::kSum, GroupReduction::kMean}) {
    const SelectorShape shape = marked_shape(reduction);
    const Context context(shape, 300, 31);
    const auto selector = make("landmark-token", shape);
    selector->append(context.keys(0, 300));
    for (std::uint32_t position : {299u, 251u, 60u}) {
      const FarRegion region = FarRegion::of(shape, position);
      auto blocks = marked_blocks(context, position + 1);
      std::erase_if(blocks, [region](const auto& block) {
        return block.second <= region.begin || block.first >= region.end;
      });
      ASSERT_GT(blocks.size(), 1u);
      const auto answer = select(*selector, shape, context.request(position, position + 1));
      for (std::uint32_t head = 0; head < shape.kv_heads; ++head) {
        std::vector<double> expected(blocks.size());
        for (std::uint32_t h = 0; h < shape.queries_per_kv_head; ++h) {
          std::vector<double> logits;
          double total = 0;
          for (const auto& block : blocks) {
            double dot = 0;
            for (std::uint32_t e = 0; e < shape.head_dim; ++e) {
              dot += double{context.key(block.second - 1, head, e)} *
                     double{context.query(0, head * 3 + h, e)};
            }
            logits.push_back(double{shape.softmax.scale} * dot);
            total += std::exp(logits.back());
          }
          for (std::size_t b = 0; b < blocks.size(); ++b) {
            const double weight = std::exp(logits[b]) / total;
            switch (reduction) {
              case GroupReduction::kMax: expected[b] = std::max(expected[b], weight); break;
              case GroupReduction::kSum: expected[b] += weight; break;
              case GroupReduction::kMean: expected[b] += logits[b] / 3; break;
            }
          }
        }
        const double best = *std::ranges::max_element(expected);
        std::vector<int> seen(region.end);
        for (const SelectedUnit& unit : answer[head].ranked) {
          const std::uint32_t begin = unit.block.value * 8 + unit.first_token;
          const auto block = std::ranges::find_if(
              blocks, [begin](const auto& each) { return begin < each.second; });
          // Behind the last landmark lies the query's own block.
          const double score = block == blocks.end()
                                   ? best
                                   : expected[static_cast<std::size_t>(block - blocks.begin())];
          EXPECT_NEAR(double{unit.score}, score, 1e-5);
          for (std::uint32_t t = begin; t < begin + unit.tokens; ++t) ++seen[t];
        }
        EXPECT_EQ(std::count(seen.begin() + region.begin, seen.end(), 1),
                  static_cast<std::ptrdiff_t>(region.tokens()));
      }
    }
  }
}

TEST(LandmarkToken, TheOwnBlockComesFirstNewestFirst) {
  const SelectorShape shape = marked_shape(GroupReduction::kSum);
  const Context context(shape, 300, 31);
  std::vector<std::uint8_t> marks(300);
  marks[49] = marks[99] = kIsLandmark;
  const auto selector = make("landmark-token", shape);
  NewTokens tokens = context.keys(0, 300);
  tokens.marks = marks.data();
  selector->append(tokens);
  // Far are [5, 128); the last landmark is token 99.
  const auto answer = select(*selector, shape, context.request(139, 17 + 40));
  std::uint32_t end = 128;
  std::uint32_t taken = 0;
  for (const SelectedUnit& unit : answer[0].ranked) {
    const std::uint32_t begin = unit.block.value * 8 + unit.first_token;
    if (taken < 28) {
      EXPECT_EQ(begin + unit.tokens, end);
      end = begin;
    } else {
      EXPECT_LT(begin, 100u);
    }
    taken += unit.tokens;
  }
  EXPECT_EQ(end, 100u);
  EXPECT_EQ(taken, 40u);
}

TEST(LandmarkToken, WithoutMarksTheNewestAreTaken) {
  const SelectorShape shape = marked_shape(GroupReduction::kSum);
  const Context context(shape, 300, 31);
  const auto selector = make("landmark-token", shape);
  NewTokens tokens = context.keys(0, 300);
  tokens.marks = nullptr;
  selector->append(tokens);
  const auto answer = select(*selector, shape, context.request(299, 17 + 20));
  for (const SelectedUnit& unit : answer[0].ranked) EXPECT_GE(unit.block.value * 8, 264u);
  EXPECT_EQ(selector->metadata_bytes(), 0u);
}

TEST(LandmarkToken, MoreLandmarksThanExpectedFindRoom) {
  const SelectorShape shape = marked_shape(GroupReduction::kSum);
  const Context context(shape, 300, 31);
  const std::vector<std::uint8_t> marks(300, kIsLandmark);
  const auto selector = make("landmark-token", shape);
  NewTokens tokens = context.keys(0, 300);
  tokens.marks = marks.data();
  selector->append(tokens);
  EXPECT_EQ(selector->metadata_bytes(), 300u * (2 * 64 * 4 + 4));
  const auto answer = select(*selector, shape, context.request(299, 300));
  EXPECT_EQ(answer[0].ranked.size(), 283u) << "every token is a block of its own";
}

TEST(LandmarkToken, NeedsMarks) {
  EXPECT_EQ(missing_needs(make_selector_factory("landmark-token")->needs, {}), "landmark tokens");
}

}  // namespace
}  // namespace kvtier
