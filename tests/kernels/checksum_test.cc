#include "kernels/checksum.h"

#include <gtest/gtest.h>

#include <set>
#include <vector>

namespace kvtier {
namespace {

const BlockIdentity kIdentity = {
    {0x0123456789ABCDEFull, 0xFEDCBA9876543210ull}, LayerIndex{3}, HeadGroup{1}, BlockIndex{700}};

std::vector<std::byte> payload(std::size_t bytes) {
  std::vector<std::byte> data(bytes);
  for (std::size_t i = 0; i < bytes; ++i) data[i] = static_cast<std::byte>(i * 31 + 7);
  return data;
}

TEST(BlockChecksum, DependsOnEveryBitOfThePayload) {
  std::vector<std::byte> data = payload(512);
  const std::uint64_t right = block_checksum(data, kIdentity, Generation{0});
  EXPECT_EQ(block_checksum(payload(512), kIdentity, Generation{0}), right);
  for (std::size_t bit = 0; bit < data.size() * 8; ++bit) {
    data[bit / 8] ^= static_cast<std::byte>(1u << (bit % 8));
    EXPECT_NE(block_checksum(data, kIdentity, Generation{0}), right) << bit;
    data[bit / 8] ^= static_cast<std::byte>(1u << (bit % 8));
  }
  EXPECT_NE(block_checksum(std::span(data).first(511), kIdentity, Generation{0}), right);
}

TEST(BlockChecksum, DependsOnEveryFieldOfTheIdentityAndOnTheGeneration) {
  const std::vector<std::byte> data = payload(2048);
  std::set<std::uint64_t> seen;
  const auto add = [&](BlockIdentity identity, Generation generation) {
    EXPECT_TRUE(seen.insert(block_checksum(data, identity, generation)).second) << seen.size();
  };
  add(kIdentity, Generation{0});
  add(kIdentity, Generation{1});
  for (const std::uint32_t bit : {1u, 1u << 31}) {
    BlockIdentity identity = kIdentity;
    identity.layer.value ^= bit;
    add(identity, Generation{0});
    identity = kIdentity;
    identity.head_group.value ^= bit;
    add(identity, Generation{0});
    identity = kIdentity;
    identity.index.value ^= bit;
    add(identity, Generation{0});
    identity = kIdentity;
    identity.origin.high ^= bit;
    add(identity, Generation{0});
    identity = kIdentity;
    identity.origin.low ^= bit;
    add(identity, Generation{0});
  }
  // Exchanged fields are another identity.
  add({{kIdentity.origin.low, kIdentity.origin.high},
       kIdentity.layer,
       kIdentity.head_group,
       kIdentity.index},
      Generation{0});
  add({kIdentity.origin, LayerIndex{1}, HeadGroup{3}, kIdentity.index}, Generation{0});
}

TEST(BlockChecksum, AnEmptyPayloadStillNamesItsIdentity) {
  BlockIdentity other = kIdentity;
  other.index = BlockIndex{701};
  EXPECT_NE(block_checksum({}, kIdentity, Generation{0}), block_checksum({}, other, Generation{0}));
}

TEST(Checksum, IsXxh3WithSeedZero) {
  // The published value for an empty input: what lies on disk must not depend on our build.
  EXPECT_EQ(checksum({}), 0x2D06800538D394C2ull);
}

}  // namespace
}  // namespace kvtier
