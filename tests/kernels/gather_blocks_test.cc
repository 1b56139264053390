#include "kernels/gather_blocks.h"

#include <gtest/gtest.h>

#include <random>
#include <vector>

namespace kvtier {
namespace {

TEST(GatherBlocks, CopiesByteForByteAndNothingElse) {
  std::mt19937 random(1);
  std::vector<std::byte> source(1 << 18);
  for (std::byte& b : source) b = static_cast<std::byte>(random());
  std::vector<std::byte> target(source.size() * 2, std::byte{0xEE});
  std::vector<std::byte> expected = target;
  for (const std::size_t bytes : {std::size_t{0}, std::size_t{1}, std::size_t{63}, std::size_t{64},
                                  std::size_t{65}, std::size_t{2048}, std::size_t{5000}}) {
    std::vector<CopySpan> spans;
    std::vector<CopySpan> reference;
    std::size_t at = 1;
    for (int i = 0; i < 40; ++i) {
      const std::byte* from = source.data() + random() % (source.size() - bytes);
      spans.push_back({from, target.data() + at, bytes});
      reference.push_back({from, expected.data() + at, bytes});
      at += bytes + 3;
    }
    gather_blocks(spans);
    gather_blocks_reference(reference);
    EXPECT_EQ(target, expected) << bytes;
  }
}

TEST(GatherBlocks, EmptyListsAndEmptySpansCopyNothing) {
  gather_blocks({});
  const CopySpan empty;
  gather_blocks(std::span(&empty, 1));
  std::byte target{7};
  const std::byte source{8};
  const CopySpan spans[] = {empty, {&source, &target, 1}, empty};
  gather_blocks(spans);
  EXPECT_EQ(target, std::byte{8});
}

TEST(GatherBlocks, LaterSpansMayReadWhatEarlierOnesWrote) {
  std::byte bytes[3] = {std::byte{1}, std::byte{2}, std::byte{3}};
  const CopySpan spans[] = {{&bytes[0], &bytes[1], 1}, {&bytes[1], &bytes[2], 1}};
  gather_blocks(spans);
  EXPECT_EQ(bytes[2], std::byte{1});
}

}  // namespace
}  // namespace kvtier
