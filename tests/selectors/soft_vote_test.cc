#include "selectors/rank_blocks.h"
#include "tests/selectors/context.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <vector>

namespace kvtier {
namespace {

using testing::Context;
using testing::make;
using testing::select;

constexpr std::uint32_t kVoteTokens = 260;

SelectorShape vote_shape(std::uint32_t tokens_per_block = 1) {
  SelectorShape shape;
  shape.kv_heads = 2;
  shape.queries_per_kv_head = 2;
  shape.head_dim = 64;
  shape.tokens_per_block = tokens_per_block;
  shape.sinks = 4;
  shape.window = 16;
  shape.softmax.scale = 0.2f;
  shape.tokens_max = kVoteTokens;
  return shape;
}

/// Score of each far token, in float64: softmax over the far region, added over the heads.
std::vector<double> plain_votes(const SelectorShape& shape, const Context& context,
                                const SelectRequest& request, std::uint32_t kv_head) {
  const FarRegion region = FarRegion::of(shape, request.first_position);
  std::vector<double> votes(kVoteTokens);
  for (std::uint32_t h = 0; h < 2; ++h) {
    std::vector<double> weights(kVoteTokens);
    double sum = 0.0;
    for (std::uint32_t t = region.begin; t < region.end; ++t) {
      double dot = 0.0;
      for (std::uint32_t i = 0; i < 64; ++i) {
        dot += double{request.queries[(kv_head * 2 + h) * 64 + i]} *
               double{context.key(t, kv_head, i)};
      }
      weights[t] = std::exp(double{shape.softmax.scale} * dot);
      sum += weights[t];
    }
    for (std::uint32_t t = region.begin; t < region.end; ++t) votes[t] += weights[t] / sum;
  }
  return votes;
}

std::map<std::uint32_t, float> scores_of(const GroupSelection& group) {
  std::map<std::uint32_t, float> scores;
  for (const SelectedUnit& unit : group.ranked) scores[unit.block.value] = unit.score;
  return scores;
}

TEST(SoftVote, ATokensScoreIsTheSumOfItsSoftmaxWeights) {
  const SelectorShape shape = vote_shape();
  const Context context(shape, kVoteTokens, 3);
  auto selector = make("soft-vote", shape);
  selector->append(context.keys(0, kVoteTokens));
  const SelectRequest request = context.request(kVoteTokens - 1, kVoteTokens);
  const auto found = select(*selector, shape, request);
  for (std::uint32_t head = 0; head < 2; ++head) {
    const std::vector<double> votes = plain_votes(shape, context, request, head);
    ASSERT_EQ(found[head].ranked.size(), kVoteTokens - 20u);
    for (const auto& [token, score] : scores_of(found[head])) {
      EXPECT_NEAR(score, votes[token], 1e-4 * votes[token]) << token;
    }
    EXPECT_NEAR(found[head].mass, 2.0, 1e-3);  // Two heads, one each.
  }
}

// The promise: votes are counted again exactly when the query has turned away farther than that.
TEST(SoftVote, VotesAreReusedExactlyWhenTheQueryIsSimilarEnough) {
  const SelectorShape shape = vote_shape();
  Context context(shape, kVoteTokens, 3);
  const std::size_t size = std::size_t{shape.query_heads()} * shape.head_dim;
  const std::vector<float> first(context.queries().begin(),
                                 context.queries().begin() + static_cast<std::ptrdiff_t>(size));
  // Something at a right angle to it: neighbouring elements swapped, one of them turned round.
  std::vector<float> across(size);
  for (std::size_t i = 0; i < size; i += 2) {
    across[i] = -first[i + 1];
    across[i + 1] = first[i];
  }
  for (const double cosine : {0.5, 0.899, 0.901, 0.999}) {
    auto selector = make("soft-vote(similarity=0.9)", shape);
    auto always = make("soft-vote(similarity=2)", shape);
    selector->append(context.keys(0, 250));
    always->append(context.keys(0, 250));
    std::ranges::copy(first, context.queries().begin());
    const auto before = select(*selector, shape, context.request(249, kVoteTokens));
    select(*always, shape, context.request(249, kVoteTokens));
    selector->append(context.keys(250, 1));
    always->append(context.keys(250, 1));
    const double sine = std::sqrt(1.0 - cosine * cosine);
    for (std::size_t i = 0; i < size; ++i) {
      // The length is nothing to the angle.
      context.queries()[i] =
          static_cast<float>(3.0 * (cosine * double{first[i]} + sine * double{across[i]}));
    }
    const auto after = select(*selector, shape, context.request(250, kVoteTokens));
    const auto fresh = select(*always, shape, context.request(250, kVoteTokens));
    for (std::size_t group = 0; group < 2; ++group) {
      auto expected = scores_of(cosine >= 0.9 ? before[group] : fresh[group]);
      // The token that left the window since nobody voted for.
      if (cosine >= 0.9) expected[234] = 0.0f;
      EXPECT_EQ(scores_of(after[group]), expected) << cosine;
      EXPECT_NE(scores_of(before[group]), scores_of(fresh[group]));
    }
  }
}

TEST(SoftVote, ACutBringsBackTheVotesThatItsPrefixHad) {
  const SelectorShape shape = vote_shape();
  Context context(shape, kVoteTokens, 3);
  auto selector = make("soft-vote", shape);
  selector->append(context.keys(0, 250));
  const auto before = select(*selector, shape, context.request(249, kVoteTokens));
  // An unlike query of a draft counts anew, then the draft is rejected.
  selector->append(context.keys(250, 2));
  std::vector<float> kept = context.queries();
  for (float& value : context.queries()) value = -value;
  const auto draft = select(*selector, shape, context.request(251, kVoteTokens));
  EXPECT_NE(scores_of(draft[0]), scores_of(before[0]));
  selector->truncate(250);
  context.queries() = kept;
  selector->append(context.keys(250, 1));
  const auto after = select(*selector, shape, context.request(250, kVoteTokens));
  auto expected = scores_of(before[0]);
  expected[234] = 0.0f;
  EXPECT_EQ(scores_of(after[0]), expected);
}

TEST(SoftVote, MaxPoolGivesATokenItsNeighboursVote) {
  const SelectorShape shape = vote_shape();
  const Context context(shape, kVoteTokens, 4);
  auto plain = make("soft-vote", shape);
  auto pooled = make("soft-vote(pool=5)", shape);
  plain->append(context.keys(0, kVoteTokens));
  pooled->append(context.keys(0, kVoteTokens));
  const SelectRequest request = context.request(kVoteTokens - 1, kVoteTokens);
  const auto votes = scores_of(select(*plain, shape, request)[0]);
  const FarRegion region = FarRegion::of(shape, kVoteTokens - 1);
  for (const auto& [token, score] : scores_of(select(*pooled, shape, request)[0])) {
    float expected = 0.0f;
    for (std::uint32_t t = std::max(token, region.begin + 2) - 2;
         t < std::min(token + 3, region.end); ++t) {
      expected = std::max(expected, votes.at(t));
    }
    EXPECT_EQ(score, expected) << token;
  }
}

TEST(SoftVote, OneSetForTheLayerIsTheSumOverItsHeads) {
  const SelectorShape shape = vote_shape();
  const Context context(shape, kVoteTokens, 5);
  auto shared = make("soft-vote(share=layer)", shape);
  shared->append(context.keys(0, kVoteTokens));
  const SelectRequest request = context.request(kVoteTokens - 1, 60);
  const auto found = select(*shared, shape, request);
  EXPECT_EQ(found[0].ranked, found[1].ranked);
  EXPECT_EQ(found[0].chosen, found[1].chosen);
  const std::vector<double> a = plain_votes(shape, context, request, 0);
  const std::vector<double> b = plain_votes(shape, context, request, 1);
  for (const auto& [token, score] : scores_of(found[0])) {
    EXPECT_NEAR(score, a[token] + b[token], 1e-4) << token;
  }
}

}  // namespace
}  // namespace kvtier
