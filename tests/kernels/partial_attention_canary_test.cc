#include "kernels/partial_attention.h"
#include "tests/kernels/attention_case.h"

#include <gtest/gtest.h>

#include <cstring>
#include <vector>

// Comparing with a reference proves something only if a wrong result would be noticed. These tests
// make every kind of wrong block list and require a difference beyond the tolerance.

namespace kvtier {
namespace {

constexpr AttentionShape kShape = {.group = 4, .blocks = 100};
/// Far above rounding: a test that passes by a hair proves little.
constexpr float kMargin = 4.0f;

class PartialAttentionCanary : public testing::TestWithParam<DType> {
 protected:
  PartialAttentionCanary() : case_(kShape, GetParam(), 21), expected_(case_.reference()) {}

  float difference(const std::vector<BlockRange>& ranges) {
    return largest_difference(case_.attend(pool_, ranges), expected_);
  }

  WorkerPool pool_{2};
  AttentionCase case_;
  AttentionResult expected_;
};

TEST_P(PartialAttentionCanary, TheRightListAgrees) {
  EXPECT_LE(difference(case_.ranges()), case_.tolerance());
}

TEST_P(PartialAttentionCanary, LeavingOutAnyBlockShows) {
  for (std::size_t i = 0; i < kShape.blocks; ++i) {
    std::vector<BlockRange> ranges = case_.ranges();
    ranges.erase(ranges.begin() + static_cast<std::ptrdiff_t>(i));
    EXPECT_GT(difference(ranges), kMargin * case_.tolerance()) << i;
  }
}

TEST_P(PartialAttentionCanary, RepeatingAnyBlockShows) {
  for (std::size_t i = 0; i < kShape.blocks; ++i) {
    std::vector<BlockRange> ranges = case_.ranges();
    ranges.push_back(ranges[i]);
    EXPECT_GT(difference(ranges), kMargin * case_.tolerance()) << i;
  }
}

TEST_P(PartialAttentionCanary, ReplacingAnyBlockByItsNeighbourShows) {
  for (std::size_t i = 0; i < kShape.blocks; ++i) {
    std::vector<BlockRange> ranges = case_.ranges();
    ranges[i] = ranges[(i + 1) % kShape.blocks];
    EXPECT_GT(difference(ranges), kMargin * case_.tolerance()) << i;
  }
}

TEST_P(PartialAttentionCanary, SwappingTheValuesOfAnyTwoBlocksShows) {
  const BlockLayout& layout = case_.layout();
  const std::size_t offset = layout.value_offset(0, 0);
  const std::size_t bytes = layout.tokens_per_block() * layout.value_row_bytes();
  std::vector<std::byte> kept(bytes);
  const auto swap_values = [&](std::size_t i, std::size_t j) {
    auto* a = const_cast<std::byte*>(case_.ranges()[i].block) + offset;
    auto* b = const_cast<std::byte*>(case_.ranges()[j].block) + offset;
    std::memcpy(kept.data(), a, bytes);
    std::memcpy(a, b, bytes);
    std::memcpy(b, kept.data(), bytes);
  };
  for (std::size_t i = 0; i < kShape.blocks; ++i) {
    const std::size_t j = (i + 1) % kShape.blocks;
    swap_values(i, j);
    EXPECT_GT(difference(case_.ranges()), kMargin * case_.tolerance()) << i;
    swap_values(i, j);
  }
}

TEST_P(PartialAttentionCanary, OneTokenTooFewShows) {
  for (std::size_t i = 0; i < kShape.blocks; ++i) {
    std::vector<BlockRange> ranges = case_.ranges();
    --ranges[i].tokens;
    EXPECT_GT(difference(ranges), case_.tolerance()) << i;
  }
}

INSTANTIATE_TEST_SUITE_P(Types, PartialAttentionCanary,
                         testing::Values(DType::kF16, DType::kBF16, DType::kF32),
                         [](const auto& type) { return std::string(to_string(type.param)); });

}  // namespace
}  // namespace kvtier
