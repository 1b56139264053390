#include "memory/block_layout.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <set>
#include <string>
#include <utility>
#include <vector>

namespace kvtier {
namespace {

using testing::HasSubstr;

std::vector<BlockShape> good_shapes() {
  return {
      {},
      {.dtype = DType::kF16, .head_dim = 64, .value_dim = 64, .kv_heads = 3},
      {.dtype = DType::kBF16, .head_dim = 80, .value_dim = 80, .kv_heads = 32},
      {.dtype = DType::kF32, .head_dim = 96, .value_dim = 96, .kv_heads = 4, .tokens_per_block = 1},
      {.dtype = DType::kBF16,
       .head_dim = 256,
       .value_dim = 256,
       .kv_heads = 16,
       .kv_heads_per_block = 16,
       .tokens_per_block = 4},
      // A latent layout: one row per token, values a prefix of it.
      {.dtype = DType::kBF16,
       .head_dim = 576,
       .value_dim = 512,
       .kv_heads = 1,
       .tokens_per_block = 1},
      // The smallest and the largest there is.
      {.dtype = DType::kF16,
       .head_dim = 1,
       .value_dim = 1,
       .kv_heads = 1,
       .tokens_per_block = 1,
       .extent_bytes = 8192},
      {.dtype = DType::kF32,
       .head_dim = 1024,
       .value_dim = 1024,
       .kv_heads = 64,
       .kv_heads_per_block = 64,
       .tokens_per_block = 64,
       .extent_bytes = std::size_t{64} << 20},
      // Odd sizes, so that padding is not zero by luck.
      {.dtype = DType::kF16,
       .head_dim = 7,
       .value_dim = 5,
       .kv_heads = 6,
       .kv_heads_per_block = 3,
       .tokens_per_block = 5,
       .extent_bytes = 12288},
  };
}

// Spans of bytes that must neither touch each other nor leave `[0, size)`.
void expect_disjoint(const std::vector<std::pair<std::size_t, std::size_t>>& spans,
                     std::size_t size) {
  const std::set<std::pair<std::size_t, std::size_t>> sorted(spans.begin(), spans.end());
  ASSERT_EQ(sorted.size(), spans.size()) << "two spans start and end together";
  std::size_t end = 0;
  for (const auto& [offset, bytes] : sorted) {
    ASSERT_GE(offset, end) << "a span starts before the one below it ends";
    end = offset + bytes;
  }
  ASSERT_LE(end, size);
}

TEST(BlockLayout, RowsLieInsideTheBlockAndApart) {
  for (const BlockShape& shape : good_shapes()) {
    auto made = BlockLayout::make(shape);
    ASSERT_TRUE(made.ok()) << made.status().to_string();
    const BlockLayout& layout = made.value();
    SCOPED_TRACE(layout.describe());
    std::vector<std::pair<std::size_t, std::size_t>> rows;
    for (std::uint32_t head = 0; head < layout.heads_per_block(); ++head) {
      for (std::uint32_t token = 0; token < layout.tokens_per_block(); ++token) {
        rows.emplace_back(layout.key_offset(head, token), layout.key_row_bytes());
        rows.emplace_back(layout.value_offset(head, token), layout.value_row_bytes());
      }
    }
    expect_disjoint(rows, layout.payload_bytes());
    // Nothing between the rows: the payload is exactly their sum.
    EXPECT_EQ(layout.payload_bytes(), std::size_t{layout.heads_per_block()} *
                                          layout.tokens_per_block() * layout.token_head_bytes());
    EXPECT_EQ(layout.block_bytes() % BlockLayout::kBlockAlignment, 0u);
    EXPECT_GE(layout.block_bytes(), layout.payload_bytes());
    EXPECT_LT(layout.block_bytes() - layout.payload_bytes(), BlockLayout::kBlockAlignment);
  }
}

TEST(BlockLayout, BlocksFillTheExtentBehindItsHeader) {
  for (const BlockShape& shape : good_shapes()) {
    auto made = BlockLayout::make(shape);
    ASSERT_TRUE(made.ok()) << made.status().to_string();
    const BlockLayout& layout = made.value();
    SCOPED_TRACE(layout.describe());
    ASSERT_GE(layout.blocks_per_extent(), 1u);
    const std::size_t entries = BlockLayout::kExtentHeaderFixedBytes +
                                layout.blocks_per_extent() * BlockLayout::kExtentHeaderEntryBytes;
    EXPECT_GE(layout.extent_header_bytes(), entries);
    EXPECT_EQ(layout.extent_header_bytes() % BlockLayout::kPageBytes, 0u);
    EXPECT_EQ(layout.extent_bytes() % BlockLayout::kPageBytes, 0u);
    std::vector<std::pair<std::size_t, std::size_t>> spans = {{0, layout.extent_header_bytes()}};
    for (std::uint32_t place = 0; place < layout.blocks_per_extent(); ++place) {
      EXPECT_EQ(layout.block_offset(place) % BlockLayout::kBlockAlignment, 0u);
      spans.emplace_back(layout.block_offset(place), layout.block_bytes());
    }
    expect_disjoint(spans, layout.extent_bytes());
    // One more block, with its entry in the header, would not fit.
    const std::size_t more = entries + BlockLayout::kExtentHeaderEntryBytes;
    const std::size_t header =
        (more + BlockLayout::kPageBytes - 1) / BlockLayout::kPageBytes * BlockLayout::kPageBytes;
    EXPECT_GT(header + (layout.blocks_per_extent() + 1) * layout.block_bytes(),
              layout.extent_bytes());
    EXPECT_EQ(layout.tokens_per_extent(), layout.blocks_per_extent() * layout.tokens_per_block());
  }
}

TEST(BlockLayout, DescribesItself) {
  const auto layout =
      BlockLayout::make({.dtype = DType::kF16, .head_dim = 64, .value_dim = 64, .kv_heads = 3});
  ASSERT_TRUE(layout.ok());
  EXPECT_EQ(layout->describe(),
            "8 tokens x 1 head x (64 + 64) float16 = 2048 B; 62 blocks in 131072 B");
  EXPECT_EQ(layout->head_groups(), 3u);
}

TEST(BlockLayout, TokensAndBlocksNameEachOther) {
  const BlockLayout layout = BlockLayout::make({.tokens_per_block = 8}).value();
  EXPECT_EQ(layout.block_of_token(0), BlockIndex{0});
  EXPECT_EQ(layout.block_of_token(7), BlockIndex{0});
  EXPECT_EQ(layout.block_of_token(8), BlockIndex{1});
  for (std::uint32_t block : {0u, 1u, 1000u}) {
    EXPECT_EQ(layout.block_of_token(layout.first_token(BlockIndex{block})), BlockIndex{block});
  }
}

TEST(BlockLayout, BlockIdsGoBothWays) {
  const BlockLayout layout = BlockLayout::make({}).value();
  std::set<std::uint64_t> seen;
  for (std::uint32_t extent : {0u, 1u, 2u, 4'000'000'000u}) {
    for (std::uint32_t place = 0; place < layout.blocks_per_extent(); ++place) {
      const BlockId id = layout.block_id(ExtentId{extent}, place);
      EXPECT_TRUE(seen.insert(id.value).second) << id.value;
      EXPECT_EQ(layout.extent_of(id), ExtentId{extent});
      EXPECT_EQ(layout.place_of(id), place);
    }
  }
}

TEST(BlockLayout, FingerprintTellsEveryFieldApart) {
  const BlockShape base = {.dtype = DType::kF16,
                           .head_dim = 64,
                           .value_dim = 64,
                           .kv_heads = 8,
                           .kv_heads_per_block = 2,
                           .tokens_per_block = 8,
                           .extent_bytes = 65536};
  std::vector<BlockShape> shapes(8, base);
  shapes[1].dtype = DType::kBF16;
  shapes[2].head_dim = 65;
  shapes[3].value_dim = 65;
  shapes[4].kv_heads = 10;
  shapes[5].kv_heads_per_block = 4;
  shapes[6].tokens_per_block = 9;
  shapes[7].extent_bytes = 69632;
  std::set<std::uint64_t> fingerprints;
  for (const BlockShape& shape : shapes) {
    const auto layout = BlockLayout::make(shape);
    ASSERT_TRUE(layout.ok()) << layout.status().to_string();
    EXPECT_TRUE(fingerprints.insert(layout->fingerprint()).second) << layout->describe();
  }
  EXPECT_EQ(BlockLayout::make(base)->fingerprint(), BlockLayout::make(base)->fingerprint());
}

// Files written by one build are opened by the next: the digest itself must not change.
TEST(BlockLayout, FingerprintIsTheSameEverywhere) {
  EXPECT_EQ(BlockLayout::make({})->fingerprint(), 0xB0F1B9FF37BB506u);
}

struct BadShape {
  const char* why;
  BlockShape shape;
  const char* message;
};

TEST(BlockLayout, BadShapesNameTheFieldAndWhatWouldDo) {
  constexpr std::uint32_t kHuge = 0xFFFFFFFFu;
  const std::vector<BadShape> cases = {
      {"no key", {.head_dim = 0}, "head_dim is 0, expected 1 to 1024"},
      {"wide key", {.head_dim = 1025}, "head_dim is 1025, expected 1 to 1024"},
      {"absurd key", {.head_dim = kHuge}, "head_dim is 4294967295, expected 1 to 1024"},
      {"no value", {.value_dim = 0}, "value_dim is 0, expected 1 to 1024"},
      {"wide value", {.value_dim = 2048}, "value_dim is 2048, expected 1 to 1024"},
      {"no heads", {.kv_heads = 0}, "kv_heads is 0, expected 1 to 1024"},
      {"many heads", {.kv_heads = kHuge}, "kv_heads is 4294967295, expected 1 to 1024"},
      {"no tokens", {.tokens_per_block = 0}, "tokens_per_block is 0, expected 1 to 64"},
      {"long block", {.tokens_per_block = 65}, "tokens_per_block is 65, expected 1 to 64"},
      {"no head in a block", {.kv_heads_per_block = 0}, "kv_heads_per_block is 0, expected 1 to 8"},
      {"more than there are",
       {.kv_heads_per_block = 9},
       "kv_heads_per_block is 9, expected 1 to 8"},
      {"no divisor", {.kv_heads_per_block = 3}, "kv_heads_per_block is 3, expected a divisor of"},
      {"no extent", {.extent_bytes = 0}, "extent_bytes is 0, expected 8192 to 67108864"},
      {"one page", {.extent_bytes = 4096}, "extent_bytes is 4096, expected 8192 to 67108864"},
      {"half a page",
       {.extent_bytes = 10240},
       "extent_bytes is 10240, expected a multiple of 4096"},
      {"absurd extent", {.extent_bytes = static_cast<std::size_t>(-4096)}, "expected 8192 to"},
      {"block beyond extent",
       {.kv_heads_per_block = 8, .tokens_per_block = 64, .extent_bytes = 65536},
       "extent_bytes is 65536, but one block of 262144 B with its header page needs 266240"},
  };
  for (const BadShape& bad : cases) {
    const auto layout = BlockLayout::make(bad.shape);
    ASSERT_FALSE(layout.ok()) << bad.why;
    EXPECT_EQ(layout.status().code(), StatusCode::kInvalidArgument) << bad.why;
    EXPECT_THAT(layout.status().message(), HasSubstr(bad.message)) << bad.why;
  }
}

// What the message says would do, does.
TEST(BlockLayout, SmallestExtentThatIsAskedForIsEnough) {
  BlockShape shape = {.kv_heads_per_block = 8, .tokens_per_block = 64, .extent_bytes = 266240};
  ASSERT_TRUE(BlockLayout::make(shape).ok());
  EXPECT_EQ(BlockLayout::make(shape)->blocks_per_extent(), 1u);
  shape.extent_bytes -= BlockLayout::kPageBytes;
  EXPECT_FALSE(BlockLayout::make(shape).ok());
}

}  // namespace
}  // namespace kvtier
