#include "kernels/partial_attention.h"

#include "kernels/merge_states.h"
#include "kernels/simd_targets.h"
#include "tests/kernels/attention_case.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

namespace kvtier {
namespace {

const DType kDTypes[] = {DType::kF16, DType::kBF16, DType::kF32};

std::vector<AttentionShape> shape_table() {
  std::vector<AttentionShape> shapes;
  for (const std::uint32_t dim : {64u, 80u, 96u, 128u, 256u}) {
    shapes.push_back({.head_dim = dim, .value_dim = dim, .blocks = 21});
    shapes.push_back({.head_dim = dim, .value_dim = dim, .blocks = 9, .ragged = true});
  }
  for (std::uint32_t group = 1; group <= kMaxGroupQueries; ++group) {
    shapes.push_back({.group = group, .queries = 1 + group % 3, .blocks = 10});
  }
  // Unequal dims, multiples of 8 only, and the largest.
  shapes.push_back({.head_dim = 192, .value_dim = 128, .group = 4});
  shapes.push_back({.head_dim = 8, .value_dim = 24, .group = 2, .ragged = true});
  shapes.push_back({.head_dim = 72, .value_dim = 40, .group = 5, .queries = 2});
  shapes.push_back({.head_dim = 576, .value_dim = 512, .group = 16, .blocks = 9});
  // Several heads per block, other block sizes, several queries, causal cuts, caps.
  shapes.push_back({.heads = 3, .group = 2, .queries = 2, .blocks = 20, .ragged = true});
  shapes.push_back({.tokens_per_block = 1, .blocks = 67});
  shapes.push_back({.tokens_per_block = 64, .group = 7, .blocks = 3, .ragged = true});
  shapes.push_back({.tokens_per_block = 5, .group = 4, .queries = 8, .blocks = 14, .causal = true});
  shapes.push_back({.heads = 2, .queries = 4, .blocks = 9, .ragged = true, .causal = true});
  shapes.push_back({.group = 4, .blocks = 12, .logit_cap = 1.5f});
  shapes.push_back({.queries = 3, .blocks = 12, .causal = true, .logit_cap = 50.0f});
  // One token; a tile and a token; exactly one chunk; a chunk and one block; several chunks.
  shapes.push_back({.tokens_per_block = 1, .blocks = 1});
  shapes.push_back({.tokens_per_block = 1, .blocks = kAttentionTileTokens + 1});
  shapes.push_back({.blocks = kAttentionChunkTokens / 8});
  shapes.push_back({.blocks = kAttentionChunkTokens / 8 + 1});
  shapes.push_back({.tokens_per_block = 7, .group = 2, .blocks = 400, .ragged = true});
  // Many queries: just more than a step's, one piece of rows and one row more, ragged and causal.
  shapes.push_back({.group = 1, .queries = 9, .blocks = 20, .causal = true});
  shapes.push_back({.group = 1, .queries = 256, .blocks = 40, .causal = true});
  shapes.push_back({.group = 3, .queries = 86, .blocks = 33, .ragged = true, .causal = true});
  shapes.push_back(
      {.tokens_per_block = 5, .group = 7, .queries = 70, .blocks = 14, .causal = true});
  shapes.push_back({.heads = 2, .group = 2, .queries = 30, .blocks = 21, .ragged = true});
  shapes.push_back({.head_dim = 8, .value_dim = 24, .group = 2, .queries = 40, .causal = true});
  shapes.push_back({.head_dim = 72, .value_dim = 40, .group = 5, .queries = 13, .causal = true});
  shapes.push_back({.head_dim = 128,
                    .value_dim = 128,
                    .group = 4,
                    .queries = 65,
                    .blocks = 30,
                    .causal = true,
                    .logit_cap = 1.5f});
  shapes.push_back({.head_dim = 576, .value_dim = 512, .group = 16, .queries = 9, .blocks = 9});
  return shapes;
}

TEST(PartialAttention, AgreesWithTheReferenceOnEveryShapeTypeAndInstructionSet) {
  WorkerPool pool(2);
  std::uint32_t seed = 1;
  for (const AttentionShape& shape : shape_table()) {
    for (const DType dtype : kDTypes) {
      const AttentionCase c(shape, dtype, seed++);
      const AttentionResult expected = c.reference();
      for (const std::string& target : simd_targets()) {
        const ScopedSimdTarget use(target);
        EXPECT_LE(largest_difference(c.attend(pool), expected), c.tolerance())
            << shape.describe() << " " << to_string(dtype) << " " << target;
      }
    }
  }
}

// Keys that lie elsewhere are read there, and those of the block are not.
TEST(PartialAttention, KeysMayLieElsewhere) {
  WorkerPool pool(2);
  for (const AttentionShape& shape : shape_table()) {
    const AttentionCase original(shape, DType::kF16, 9);
    const AttentionResult expected = original.reference();
    AttentionCase moved(shape, DType::kF16, 9);
    const std::size_t bytes = moved.layout().value_offset(0, 0);
    std::vector<std::vector<std::byte>> keys;
    for (BlockRange& range : moved.ranges()) keys.emplace_back(range.block, range.block + bytes);
    for (std::size_t i = 0; i < keys.size(); ++i) {
      BlockRange& range = moved.ranges()[i];
      range.keys = keys[i].data();
      // Not a number in every element.
      std::fill_n(const_cast<std::byte*>(range.block), bytes, std::byte{0xFF});
    }
    EXPECT_LE(largest_difference(moved.reference(), expected), 0.0) << shape.describe();
    EXPECT_LE(largest_difference(moved.attend(pool), expected), moved.tolerance())
        << shape.describe();
  }
}

TEST(PartialAttention, ListsEveryInstructionSetOnce) {
  std::vector<std::string> names = simd_targets();
  ASSERT_FALSE(names.empty());
  std::sort(names.begin(), names.end());
  EXPECT_EQ(std::adjacent_find(names.begin(), names.end()), names.end());
}

TEST(PartialAttention, ManyTokensOfOneLongList) {
  const AttentionCase c({.group = 2, .blocks = 4096}, DType::kF16, 5);
  WorkerPool pool(2);
  EXPECT_LE(largest_difference(c.attend(pool), c.reference()), c.tolerance());
}

TEST(PartialAttention, EmptyListsGiveZerosAndAnEmptyLse) {
  AttentionCase c({.heads = 2, .queries = 2}, DType::kF16, 6);
  WorkerPool pool(1);
  for (const bool ranges_without_tokens : {false, true}) {
    if (ranges_without_tokens) {
      for (BlockRange& range : c.ranges()) range.tokens = 0;
    } else {
      c.ranges().clear();
    }
    const AttentionResult result = c.attend(pool);
    EXPECT_EQ(result.out, std::vector<float>(result.out.size(), 0.0f));
    EXPECT_EQ(result.lse, std::vector<float>(result.lse.size(), kEmptyLse));
    c = AttentionCase({.heads = 2, .queries = 2}, DType::kF16, 6);
  }
  AttentionWorkspace workspace;
  EXPECT_TRUE(partial_attention(c.params(), {}, workspace, pool).ok());
}

TEST(PartialAttention, AQueryBeforeEveryTokenAttendsNothing) {
  AttentionCase c({.queries = 2, .blocks = 80}, DType::kF16, 7);
  for (BlockRange& range : c.ranges()) range.position += 100;
  const std::vector<std::uint32_t> positions = {99, 100};
  WorkerPool pool(2);
  AttentionWorkspace workspace;
  AttentionResult result;
  AttentionTask task = c.task(result);
  task.query_positions = positions;
  ASSERT_TRUE(partial_attention(c.params(), std::span(&task, 1), workspace, pool).ok());
  AttentionResult expected;
  AttentionTask expected_task = c.task(expected);
  expected_task.query_positions = positions;
  partial_attention_reference(c.params(), expected_task);
  EXPECT_EQ(result.lse[0], kEmptyLse);
  EXPECT_EQ(result.out[0], 0.0f);
  EXPECT_NE(result.lse[3], kEmptyLse);
  EXPECT_LE(largest_difference(result, expected), c.tolerance());
}

TEST(PartialAttention, SeveralTasksShareOneCall) {
  WorkerPool pool(2);
  AttentionWorkspace workspace;
  const AttentionCase a({.group = 4, .queries = 2, .blocks = 100}, DType::kBF16, 8);
  const AttentionCase b({.group = 4, .queries = 1, .blocks = 3}, DType::kBF16, 9);
  AttentionResult from_a;
  AttentionResult from_b;
  const AttentionTask tasks[] = {a.task(from_a), b.task(from_b)};
  // The second round runs in a workspace that has grown.
  for (int round = 0; round < 2; ++round) {
    ASSERT_TRUE(partial_attention(a.params(), tasks, workspace, pool).ok());
    EXPECT_LE(largest_difference(from_a, a.reference()), a.tolerance());
    EXPECT_LE(largest_difference(from_b, b.reference()), b.tolerance());
  }
}

TEST(PartialAttention, BitsDoNotDependOnTheNumberOfWorkers) {
  WorkerPool one(1);
  const AttentionCase c(
      {.head_dim = 128, .value_dim = 128, .heads = 2, .group = 7, .blocks = 500, .ragged = true},
      DType::kF16, 10);
  const AttentionResult expected = c.attend(one);
  for (const unsigned threads : {2u, 3u, 8u}) {
    WorkerPool pool(threads);
    for (int round = 0; round < 3; ++round) {
      const AttentionResult result = c.attend(pool);
      EXPECT_EQ(result.out, expected.out) << threads;
      EXPECT_EQ(result.lse, expected.lse) << threads;
    }
  }
}

TEST(PartialAttention, BitsOfManyQueriesDependOnNeitherWorkersNorCompany) {
  WorkerPool one(1);
  const AttentionCase c({.group = 7, .queries = 130, .blocks = 60, .ragged = true, .causal = true},
                        DType::kBF16, 14);
  const AttentionCase few({.group = 7, .queries = 2, .blocks = 90}, DType::kBF16, 15);
  const AttentionResult expected = c.attend(one);
  const AttentionResult expected_few = few.attend(one);
  for (const unsigned threads : {1u, 2u, 3u, 8u}) {
    WorkerPool pool(threads);
    AttentionWorkspace workspace;
    for (int round = 0; round < 3; ++round) {
      AttentionResult results[3];
      const AttentionTask tasks[] = {few.task(results[0]), c.task(results[1]),
                                     few.task(results[2])};
      ASSERT_TRUE(partial_attention(c.params(), tasks, workspace, pool).ok());
      EXPECT_EQ(results[1].out, expected.out) << threads;
      EXPECT_EQ(results[1].lse, expected.lse) << threads;
      EXPECT_EQ(results[0].out, expected_few.out) << threads;
      EXPECT_EQ(results[2].lse, expected_few.lse) << threads;
    }
  }
}

TEST(PartialAttention, ManyQueriesBeforeEveryTokenAttendNothing) {
  AttentionCase c({.group = 2, .queries = 40, .blocks = 12}, DType::kF32, 16);
  for (BlockRange& range : c.ranges()) range.position += 100;
  std::vector<std::uint32_t> positions(40);
  for (std::uint32_t q = 0; q < 40; ++q) positions[q] = 80 + q;
  WorkerPool pool(2);
  AttentionWorkspace workspace;
  AttentionResult result;
  AttentionTask task = c.task(result);
  task.query_positions = positions;
  ASSERT_TRUE(partial_attention(c.params(), std::span(&task, 1), workspace, pool).ok());
  AttentionResult expected;
  AttentionTask expected_task = c.task(expected);
  expected_task.query_positions = positions;
  partial_attention_reference(c.params(), expected_task);
  EXPECT_EQ(result.lse[2 * 19 + 1], kEmptyLse);
  EXPECT_EQ(result.out[0], 0.0f);
  EXPECT_NE(result.lse[2 * 20], kEmptyLse);
  EXPECT_LE(largest_difference(result, expected), c.tolerance());
  task.blocks = {};
  ASSERT_TRUE(partial_attention(c.params(), std::span(&task, 1), workspace, pool).ok());
  EXPECT_EQ(result.out, std::vector<float>(result.out.size(), 0.0f));
  EXPECT_EQ(result.lse, std::vector<float>(result.lse.size(), kEmptyLse));
}

TEST(PartialAttention, PartsMergeToTheWhole) {
  WorkerPool pool(2);
  const AttentionCase c({.group = 4, .queries = 2, .blocks = 200, .ragged = true, .causal = true},
                        DType::kF16, 11);
  const AttentionResult whole = c.reference();
  const std::span<const BlockRange> ranges = c.ranges();
  for (const std::size_t cut : {std::size_t{0}, std::size_t{1}, std::size_t{77}, ranges.size()}) {
    AttentionResult first = c.attend(pool, ranges.first(cut));
    AttentionResult second = c.attend(pool, ranges.subspan(cut));
    merge_states({first.out.data(), first.lse.data()}, {second.out.data(), second.lse.data()},
                 c.rows(), c.shape().value_dim);
    EXPECT_LE(largest_difference(first, whole), c.tolerance()) << cut;
  }
}

TEST(PartialAttention, RefusesShapesItHasNoLoopsFor) {
  WorkerPool pool(1);
  AttentionWorkspace workspace;
  const auto attend = [&](const AttentionShape& shape) {
    const AttentionCase c(shape, DType::kF16, 12);
    AttentionResult result;
    const AttentionTask task = c.task(result);
    return partial_attention(c.params(), std::span(&task, 1), workspace, pool).code();
  };
  EXPECT_EQ(attend({.head_dim = 68}), StatusCode::kUnsupported);
  EXPECT_EQ(attend({.value_dim = 12}), StatusCode::kUnsupported);
  EXPECT_EQ(attend({.head_dim = 584}), StatusCode::kUnsupported);
  EXPECT_EQ(attend({.group = 17}), StatusCode::kUnsupported);
  EXPECT_EQ(attend({.head_dim = 68, .queries = 9}), StatusCode::kUnsupported);
  EXPECT_EQ(attend({}), StatusCode::kOk);
}

TEST(PartialAttentionDeathTest, ARangeOutsideItsBlockIsABug) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  AttentionCase c({}, DType::kF16, 13);
  c.ranges()[2].first_token = 1;
  EXPECT_DEATH(
      {
        WorkerPool pool(1);
        c.attend(pool);
      },
      "tokens 1 \\+ 8 of a block of 8");
}

}  // namespace
}  // namespace kvtier
