#include "selectors/rank_blocks.h"

#include "kernels/partial_attention.h"

#include <gtest/gtest.h>

#include <numeric>
#include <vector>

namespace kvtier {
namespace {

GroupSelection rank(std::vector<float> scores, std::vector<std::uint8_t> always, FarRegion region,
                    std::uint32_t tokens_per_block, std::uint32_t budget, std::uint32_t band = 0) {
  std::vector<std::uint32_t> order(scores.size());
  GroupSelection result;
  rank_blocks({.scores = scores,
               .always = always,
               .region = region,
               .tokens_per_block = tokens_per_block,
               .far_budget_tokens = budget,
               .band_tokens = band},
              order, result);
  return result;
}

std::vector<std::uint32_t> blocks(const GroupSelection& selection) {
  std::vector<std::uint32_t> result;
  for (const SelectedUnit& unit : selection.ranked) result.push_back(unit.block.value);
  return result;
}

using Blocks = std::vector<std::uint32_t>;

TEST(FarRegion, LiesBehindTheSinksAndBeforeTheWindow) {
  SelectorShape shape;
  shape.sinks = 4;
  shape.window = 10;
  struct Row {
    std::uint32_t position, begin, end;
  };
  // The window holds the query's own token: at position 99, tokens 90 to 99.
  for (const Row& row :
       {Row{99, 4, 90}, Row{14, 4, 5}, Row{13, 4, 4}, Row{5, 4, 4}, Row{1, 2, 2}, Row{0, 1, 1}}) {
    const FarRegion region = FarRegion::of(shape, row.position);
    EXPECT_EQ(region.begin, row.begin) << row.position;
    EXPECT_EQ(region.end, row.end) << row.position;
  }
  shape.window = 0;
  EXPECT_EQ(FarRegion::of(shape, 99).end, 100u);
}

TEST(RankBlocks, CutsTheBlocksThatStraddleAnEdge) {
  const GroupSelection all = rank({1, 2, 3}, {}, {5, 21}, 8, 16);
  ASSERT_EQ(blocks(all), (Blocks{2, 1, 0}));
  EXPECT_EQ(all.ranked[0], (SelectedUnit{BlockIndex(2), 0, 5, 3.0f}));
  EXPECT_EQ(all.ranked[1], (SelectedUnit{BlockIndex(1), 0, 8, 2.0f}));
  EXPECT_EQ(all.ranked[2], (SelectedUnit{BlockIndex(0), 5, 3, 1.0f}));
  EXPECT_EQ(all.chosen, 3u);
}

TEST(RankBlocks, TheFirstThatDoesNotFitEndsTheChoice) {
  // 11 tokens: block 2 (8) fits, block 1 (8) does not, and block 0 (3) would have.
  const GroupSelection result = rank({1, 2, 3}, {}, {5, 24}, 8, 11);
  EXPECT_EQ(blocks(result), (Blocks{2}));
}

TEST(RankBlocks, TiesGoToTheEarlierBlock) {
  EXPECT_EQ(blocks(rank({1, 1, 1, 1}, {}, {0, 16}, 4, 8)), (Blocks{0, 1}));
  EXPECT_EQ(blocks(rank({1, 1, 1, 1}, {0, 0, 1, 1}, {0, 16}, 4, 12)), (Blocks{2, 3, 0}));
}

TEST(RankBlocks, MarkedBlocksComeFirstAndCount) {
  const GroupSelection result = rank({9, 1, 8, 2, 7}, {0, 1, 0, 1, 0}, {0, 20}, 4, 12, 8);
  EXPECT_EQ(blocks(result), (Blocks{3, 1, 0, 2, 4}));
  EXPECT_EQ(result.held, 2u);
  EXPECT_EQ(result.chosen, 3u);
}

TEST(RankBlocks, ABudgetThatEndsAmongTheMarkedHasNoBand) {
  const GroupSelection result = rank({9, 1, 8, 2, 7}, {0, 1, 0, 1, 0}, {0, 20}, 4, 7, 8);
  EXPECT_EQ(blocks(result), (Blocks{3}));
  EXPECT_EQ(result.held, 1u);
  EXPECT_EQ(result.chosen, 1u);
}

TEST(RankBlocks, NothingToRank) {
  GroupSelection result = rank({}, {}, {7, 7}, 4, 100);
  EXPECT_TRUE(result.ranked.empty());
  result = rank({1, 2}, {}, {0, 8}, 4, 0, 0);
  EXPECT_TRUE(result.ranked.empty());
  result = rank({1, 2}, {}, {0, 8}, 4, 0, 4);
  EXPECT_EQ(blocks(result), (Blocks{1}));
  EXPECT_EQ(result.chosen, 0u);
}

TEST(BlockCount, CountsWhatTheRegionTouches) {
  EXPECT_EQ(block_count({4, 4}, 8), 0u);
  EXPECT_EQ(block_count({4, 5}, 8), 1u);
  EXPECT_EQ(block_count({7, 9}, 8), 2u);
  EXPECT_EQ(block_count({8, 16}, 8), 1u);
  EXPECT_EQ(block_count({3, 10}, 1), 7u);
}

TEST(CheckRequest, ABudgetNeedsToCoverOnlyWhatIsThere) {
  SelectorShape shape;
  shape.head_dim = 8;
  shape.sinks = 4;
  shape.window = 10;
  const std::vector<float> query(8, 1.0f);
  SelectRequest request{.queries = query.data(), .query_stride = 8, .first_position = 99};
  request.budget_tokens = 13;
  const Status refused = check_request(shape, request);
  EXPECT_EQ(refused.code(), StatusCode::kInvalidArgument);
  EXPECT_NE(refused.message().find("13"), std::string::npos) << refused.message();
  request.budget_tokens = 14;
  EXPECT_TRUE(check_request(shape, request).ok());
  EXPECT_EQ(far_budget_tokens(shape, request), 0u);
  // A context of six tokens is attended whole, and six is budget enough.
  request.first_position = 5;
  request.budget_tokens = 6;
  EXPECT_TRUE(check_request(shape, request).ok());
  request.first_position = 19;
  request.budget_tokens = 500;
  EXPECT_EQ(far_budget_tokens(shape, request), 6u);
}

TEST(ReduceTokenWeights, AddsTokensThenQueriesThenHeads) {
  // Two queries of two heads over six tokens, the far ones being 1 to 4, in blocks of 3: token 1
  // and 2 are block 0, token 3 and 4 are block 1. Sums are exact in float.
  const std::vector<float> weights = {
      64, 1, 2, 4, 8, 64,  // query 0, head 0
      64, 3, 1, 0, 2, 64,  // query 0, head 1
      64, 2, 2, 1, 1, 64,  // query 1, head 0
      64, 0, 5, 0, 0, 64,  // query 1, head 1
  };
  std::vector<float> scores(2);
  reduce_token_weights(weights, 4, 6, {1, 5}, 3, GroupReduction::kSum, scores, 2);
  EXPECT_EQ(scores, (std::vector<float>{16, 16}));
  reduce_token_weights(weights, 4, 6, {1, 5}, 3, GroupReduction::kMean, scores, 2);
  EXPECT_EQ(scores, (std::vector<float>{16, 16}));
  reduce_token_weights(weights, 4, 6, {1, 5}, 3, GroupReduction::kMax, scores, 2);
  EXPECT_EQ(scores, (std::vector<float>{9, 14}));
  // Four heads of one query: their largest, without adding.
  reduce_token_weights(weights, 4, 6, {1, 5}, 3, GroupReduction::kMax, scores);
  EXPECT_EQ(scores, (std::vector<float>{5, 12}));
}

}  // namespace
}  // namespace kvtier
