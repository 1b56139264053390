#include "kernels/score_bounds.h"
#include "selectors/box_search.h"
#include "selectors/box_tree.h"
#include "selectors/rank_blocks.h"
#include "tests/selectors/context.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

// `chunk-tree`: boxes of the tree bound all that is below them, the search without a limit is exact
// whatever was asked before, and with one it keeps it.

namespace kvtier {
namespace {

using testing::Context;
using testing::make;
using testing::select;

constexpr std::uint32_t kTreeTokens = 607;
constexpr std::uint32_t kLeaf = 4;

SelectorShape tree_shape(DType dtype, GroupReduction reduction) {
  SelectorShape shape;
  shape.dtype = dtype;
  shape.kv_heads = 2;
  shape.heads_per_group = 2;
  shape.queries_per_kv_head = 2;
  shape.head_dim = 64;
  shape.tokens_per_block = 4;
  shape.sinks = 6;
  shape.window = 8;
  shape.softmax.scale = 0.125f;
  shape.reduction = reduction;
  shape.tokens_max = kTreeTokens;
  return shape;
}

TEST(BoxTree, EveryNodeIsTheBoxOfItsTokensWithoutSinks) {
  for (const DType dtype : {DType::kF16, DType::kBF16, DType::kF32}) {
    const SelectorShape shape = tree_shape(dtype, GroupReduction::kSum);
    const Context context(shape, kTreeTokens, 1);
    const Context other(shape, kTreeTokens, 2);
    BoxTree tree(shape, kLeaf);
    for (std::uint32_t t = 0; t < kTreeTokens; t += 50) {
      tree.append(context.keys(t, std::min(50u, kTreeTokens - t)));
    }
    // A rejected draft in between, deep enough to close leaves and their parents.
    tree.truncate(600);
    tree.append(other.keys(600, 7));
    tree.truncate(600);
    tree.append(context.keys(600, 7));
    for (std::uint32_t level = 0; level < tree.levels(); ++level) {
      for (std::uint32_t i = 0; i < tree.closed_leaves() >> 2 * level; ++i) {
        const BoxTree::Node node = tree.node(level, i);
        ASSERT_EQ(tree.level_of(node), level);
        ASSERT_EQ(tree.index_of(node), i);
        if (tree.empty(node)) continue;
        const std::uint32_t begin = std::max(tree.first_leaf(node) * kLeaf, shape.sinks);
        const std::uint32_t end = tree.end_leaf(node) * kLeaf;
        for (std::uint32_t head = 0; head < shape.kv_heads; ++head) {
          const NewTokens keys = context.keys(begin, end - begin);
          const RowsView rows{keys.keys + head * keys.key_head_stride, end - begin, shape.head_dim,
                              keys.key_token_stride, dtype};
          std::vector<std::byte> expected(tree.boxes(head).stride_bytes);
          box_rows_reference(rows, end - begin, expected.data());
          ASSERT_TRUE(std::equal(expected.begin(), expected.end(), tree.boxes(head).row(node)))
              << "level " << level << ", node " << i;
        }
      }
    }
  }
}

TEST(BoxTree, BoundsNeverGrowOnTheWayDownAndBoundEveryLogit) {
  for (const DType dtype : {DType::kF16, DType::kBF16, DType::kF32}) {
    const SelectorShape shape = tree_shape(dtype, GroupReduction::kSum);
    const Context context(shape, kTreeTokens, 4);
    BoxTree tree(shape, kLeaf);
    tree.append(context.keys(0, kTreeTokens));
    std::vector<float> query(shape.head_dim);
    std::vector<float> split(2 * shape.head_dim);
    for (std::uint32_t e = 0; e < shape.head_dim; ++e) query[e] = context.query(0, 0, e);
    split_by_sign(query, 1.0f, split.data());
    std::vector<float> bounds(tree.nodes_max());
    const ScoreTask task{tree.boxes(0), split.data(), split.size(), 1,
                         bounds.data(), bounds.size()};
    ASSERT_TRUE(score_rows({}, task).ok());
    for (std::uint32_t leaf = 2; leaf < tree.closed_leaves(); ++leaf) {
      for (std::uint32_t t = leaf * kLeaf; t < (leaf + 1) * kLeaf; ++t) {
        double logit = 0;
        for (std::uint32_t e = 0; e < shape.head_dim; ++e) {
          logit += double{query[e]} * double{context.key(t, 0, e)};
        }
        // 128 roundings of sums below 300.
        ASSERT_LE(logit, double{bounds[leaf]} + 128 * 300 * 0x1p-24);
      }
      for (std::uint32_t level = 1; leaf >> 2 * level < tree.closed_leaves() >> 2 * level;
           ++level) {
        // Not a tolerance: float32 sums in one order are monotone.
        ASSERT_LE(bounds[tree.node(level - 1, leaf >> 2 * (level - 1))],
                  bounds[tree.node(level, leaf >> 2 * level)]);
      }
    }
  }
}

/// Leaves by their bounds, in obvious float64 loops over all of them.
struct PlainLeaves {
  const SelectorShape& shape;
  const Context& context;
  FarRegion region;

  /// The box bound of tokens [begin, end) for one query head.
  double bound(std::uint32_t begin, std::uint32_t end, std::uint32_t head, std::uint32_t h) const {
    double sum = 0;
    for (std::uint32_t e = 0; e < shape.head_dim; ++e) {
      const double q = double{context.query(0, head * shape.queries_per_kv_head + h, e)};
      double most = -std::numeric_limits<double>::infinity();
      for (std::uint32_t t = std::max(begin, shape.sinks); t < end; ++t) {
        most = std::max(most, q * double{context.key(t, head, e)});
      }
      sum += most;
    }
    return double{shape.softmax.scale} * sum;
  }
  /// Log of the mass that the coarse tiling could have; 149 whole leaves are 37 fours and a rest.
  double offset(std::uint32_t head, std::uint32_t h) const {
    if (shape.reduction == GroupReduction::kMean) return 0;
    const std::uint32_t leaves = (region.end - 1) / kLeaf + 1;
    double mass = 0;
    for (std::uint32_t leaf = 0; leaf < leaves;) {
      const std::uint32_t step = leaf + 4 <= leaves ? 4 : 1;
      mass += step * kLeaf * std::exp(bound(leaf * kLeaf, (leaf + step) * kLeaf, head, h));
      leaf += step;
    }
    return std::log(mass);
  }
  std::vector<RankedRange> ranked() const {
    std::vector<double> offsets;
    for (std::uint32_t head = 0; head < shape.kv_heads; ++head) {
      for (std::uint32_t h = 0; h < shape.queries_per_kv_head; ++h) {
        offsets.push_back(offset(head, h));
      }
    }
    std::vector<RankedRange> leaves;
    for (std::uint32_t leaf = region.begin / kLeaf; leaf * kLeaf < region.end; ++leaf) {
      double largest = -std::numeric_limits<double>::infinity(), mass = 0, mean = 0;
      for (std::size_t row = 0; row < offsets.size(); ++row) {
        const auto r = static_cast<std::uint32_t>(row);
        const double value = bound(leaf * kLeaf, (leaf + 1) * kLeaf, r / shape.queries_per_kv_head,
                                   r % shape.queries_per_kv_head) -
                             offsets[row];
        largest = std::max(largest, value);
        mass += std::exp(value);
        mean += value / static_cast<double>(offsets.size());
      }
      const double score = shape.reduction == GroupReduction::kMax   ? largest
                           : shape.reduction == GroupReduction::kSum ? std::log(mass)
                                                                     : mean;
      leaves.push_back({std::max(leaf * kLeaf, region.begin),
                        std::min((leaf + 1) * kLeaf, region.end), static_cast<float>(score)});
    }
    std::ranges::sort(leaves, [](const RankedRange& a, const RankedRange& b) {
      return a.score != b.score ? a.score > b.score : a.begin < b.begin;
    });
    return leaves;
  }
};

TEST(ChunkTree, WithoutALimitItIsExactWhateverWasAskedBefore) {
  for (const GroupReduction reduction :
       {GroupReduction::kMax, GroupReduction::kSum, GroupReduction::kMean}) {
    const SelectorShape shape = tree_shape(DType::kF32, reduction);
    const Context context(shape, kTreeTokens, 21);
    const Context others(shape, kTreeTokens, 22);
    const auto selector = make("chunk-tree(tokens=4,effort=0,merge=2)", shape);
    selector->append(context.keys(0, kTreeTokens));
    const std::uint32_t position = kTreeTokens - 4;
    const FarRegion region = FarRegion::of(shape, position);
    const std::vector<RankedRange> expected = PlainLeaves{shape, context, region}.ranked();
    for (std::uint32_t round = 0; round < 6; ++round) {
      SCOPED_TRACE(round);
      const auto answer = select(*selector, shape, context.request(position, 14 + 80));
      std::uint32_t taken = 0;
      std::size_t i = 0;
      for (const SelectedUnit& unit : answer[0].ranked) {
        const std::uint32_t begin = unit.block.value * 4 + unit.first_token;
        ASSERT_EQ(begin, expected[i].begin);
        ASSERT_NEAR(unit.score, expected[i].score, 1e-4);
        taken += unit.tokens;
        // All but the last, where the budget ends.
        if (taken < 80) {
          ASSERT_EQ(begin + unit.tokens, expected[i].end);
        }
        ++i;
      }
      EXPECT_EQ(taken, 80u);
      // Another question in between leaves another frontier to begin with.
      select(*selector, shape, others.request(position, 14 + 10 + 40 * round));
    }
  }
}

/// A context of noise in eight channels, with marks that single tokens carry.
struct Noise {
  explicit Noise(std::uint32_t tokens) : keys(std::size_t{tokens} * 8) {
    shape.dtype = DType::kF32;
    shape.head_dim = 8;
    shape.tokens_per_block = 16;
    shape.sinks = 0;
    shape.window = 1;
    shape.tokens_max = tokens;
    std::mt19937 random(tokens);
    for (float& value : keys) value = static_cast<float>(random() % 2001) / 1000.0f - 1.0f;
  }
  void append_to(BoxTree& tree) const {
    tree.append({.first_position = 0,
                 .tokens = shape.tokens_max,
                 .keys = reinterpret_cast<const std::byte*>(keys.data()),
                 .key_token_stride = 32,
                 .key_head_stride = 32});
  }
  /// Asks for what `channel` marks.
  std::vector<float> query(std::size_t channel) const {
    std::vector<float> q(8, 0.1f);
    q[channel] = 5.0f;
    return q;
  }
  SelectRequest request(const std::vector<float>& query) const {
    return {.queries = query.data(), .query_stride = 8, .first_position = shape.tokens_max - 1};
  }
  SelectorShape shape;
  std::vector<float> keys;  ///< [tokens, 8]
};

bool has_leaf(const BoxTree& tree, const Frontier& frontier, std::uint32_t leaf) {
  return std::ranges::any_of(frontier.chunks, [&](const Frontier::Chunk& chunk) {
    return chunk.node == tree.node(0, leaf);
  });
}

TEST(ChunkTree, SplitsWhereItLooksAndMergesWhatItNoLongerUses) {
  Noise noise(16 * 1024);
  noise.keys[(500 * 16 + 3) * 8 + 0] = 9.0f;
  noise.keys[(900 * 16 + 5) * 8 + 1] = 9.0f;
  BoxTree tree(noise.shape, 16);
  noise.append_to(tree);
  BoxSearch search(noise.shape, tree, {.effort = 0, .least = 64, .merge_after = 3});
  const FarRegion region = FarRegion::of(noise.shape, noise.shape.tokens_max - 1);
  const auto ask = [&](std::size_t channel, const Frontier* start) {
    const std::vector<float> query = noise.query(channel);
    const SelectRequest request = noise.request(query);
    EXPECT_TRUE(search.run(tree, {request, region, 0, 16, 0}, start).ok());
    EXPECT_EQ(search.best()[0].begin, channel == 0 ? 500u * 16 : 900u * 16);
    return search.frontier();
  };
  Frontier frontier = ask(0, nullptr);
  EXPECT_TRUE(has_leaf(tree, frontier, 500));
  EXPECT_FALSE(has_leaf(tree, frontier, 900));
  const std::size_t from_nothing = search.touched();
  frontier = ask(0, &frontier);
  EXPECT_LT(search.touched(), from_nothing + 16) << "the last frontier was no start";
  for (int i = 0; i < 3 * 4; ++i) {
    frontier = ask(1, &frontier);
    // Left to right, without gaps or overlap.
    std::uint32_t leaf = 0;
    for (const Frontier::Chunk& chunk : frontier.chunks) {
      ASSERT_EQ(tree.first_leaf(chunk.node), leaf);
      leaf = tree.end_leaf(chunk.node);
    }
    ASSERT_EQ(leaf, frontier.leaves);
  }
  EXPECT_TRUE(has_leaf(tree, frontier, 900));
  EXPECT_FALSE(has_leaf(tree, frontier, 500)) << "what is not used any more was not merged";
}

TEST(ChunkTree, WorkHardlyGrowsWithTheContextWhereChunksStandOut) {
  std::vector<std::size_t> touched;
  for (std::uint32_t tokens : {4u * 1024, 64u * 1024}) {
    Noise noise(tokens);
    for (std::uint32_t i = 1; i < 5; ++i) noise.keys[(tokens / 5 * i) * 8] = 9.0f;
    BoxTree tree(noise.shape, 16);
    noise.append_to(tree);
    BoxSearch search(noise.shape, tree, {.effort = 0, .least = 64, .merge_after = 8});
    const std::vector<float> query = noise.query(0);
    const SelectRequest request = noise.request(query);
    const FarRegion region = FarRegion::of(noise.shape, tokens - 1);
    ASSERT_TRUE(search.run(tree, {request, region, 0, 4 * 16, 0}, nullptr).ok());
    ASSERT_EQ(search.best().size(), 4u);
    touched.push_back(search.touched());
  }
  EXPECT_LT(touched[1], 2 * touched[0]) << "for sixteen times the context";
}

TEST(ChunkTree, TheLimitHoldsAndTheAnswerIsStillWhole) {
  // Noise alone: nothing stands out, and proving an order would mean looking at everything.
  Noise noise(64 * 1024);
  BoxTree tree(noise.shape, 16);
  noise.append_to(tree);
  BoxSearch limited(noise.shape, tree, {.effort = 4, .least = 64, .merge_after = 8});
  BoxSearch exact(noise.shape, tree, {.effort = 0, .least = 64, .merge_after = 8});
  const FarRegion region = FarRegion::of(noise.shape, noise.shape.tokens_max - 1);
  Frontier frontier;
  for (std::size_t i = 0; i < 30; ++i) {
    const std::vector<float> query = noise.query(i % 8);
    const SelectRequest request = noise.request(query);
    const BoxSearch::Question question{request, region, 0, 2048, 0};
    ASSERT_TRUE(limited.run(tree, question, i == 0 ? nullptr : &frontier).ok());
    EXPECT_TRUE(limited.stopped_early());
    EXPECT_LE(limited.touched(), 4 * 2048u / 16);
    std::uint32_t found = 0;
    std::vector<bool> seen(noise.shape.tokens_max);
    for (const RankedRange& range : limited.best()) {
      found += range.end - range.begin;
      for (std::uint32_t t = range.begin; t < range.end; ++t) {
        ASSERT_FALSE(seen[t]);
        seen[t] = true;
      }
    }
    EXPECT_GE(found, 2048u);
    // With a band the choice is the same, and goes on.
    const std::vector<RankedRange> without(limited.best().begin(), limited.best().end());
    const Frontier before = frontier;
    frontier = limited.frontier();
    ASSERT_TRUE(
        limited.run(tree, {request, region, 0, 2048, 1024}, i == 0 ? nullptr : &before).ok());
    ASSERT_GE(limited.best().size(), without.size() + 1);
    for (std::size_t j = 0; j < without.size(); ++j) {
      ASSERT_EQ(limited.best()[j].begin, without[j].begin);
      ASSERT_EQ(limited.best()[j].score, without[j].score);
    }
    if (i > 0) continue;
    ASSERT_TRUE(exact.run(tree, question, nullptr).ok());
    EXPECT_FALSE(exact.stopped_early());
    EXPECT_GT(exact.touched(), 1000u) << "so easy that a limit has nothing to do";
  }
}

TEST(ChunkTree, GoingBackRestoresTheFrontier) {
  const SelectorShape shape = tree_shape(DType::kF16, GroupReduction::kSum);
  const Context context(shape, kTreeTokens, 8);
  const Context draft(shape, kTreeTokens, 9);
  const std::string name = "chunk-tree(tokens=1,effort=1,least=256,merge=1)";
  const auto disturbed = make(name, shape);
  const auto undisturbed = make(name, shape);
  for (const auto& selector : {disturbed.get(), undisturbed.get()}) {
    selector->append(context.keys(0, 590));
    for (std::uint32_t t = 586; t < 590; ++t) {
      select(*selector, shape, context.request(t, 14 + 100));
    }
  }
  disturbed->append(draft.keys(590, 4));
  for (std::uint32_t t = 590; t < 594; ++t) {
    select(*disturbed, shape, draft.request(t, 14 + 40));
  }
  disturbed->truncate(590);
  const auto fresh = make(name, shape);
  fresh->append(context.keys(0, 590));
  const SelectRequest next = context.request(589, 14 + 100);
  const auto expected = select(*undisturbed, shape, next)[0].ranked;
  EXPECT_EQ(select(*disturbed, shape, next)[0].ranked, expected);
  EXPECT_NE(select(*fresh, shape, next)[0].ranked, expected) << "the frontier makes no difference";
}

}  // namespace
}  // namespace kvtier
