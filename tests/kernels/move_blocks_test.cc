#include "kernels/move_blocks.h"

#include "kernels/checksum.h"

#include <gtest/gtest.h>

#include <random>
#include <vector>

namespace kvtier {
namespace {

struct Outcome {
  std::vector<std::byte> target;
  std::vector<std::uint64_t> sums;
  std::vector<MoveState> states;
  bool operator==(const Outcome&) const = default;
};

class MoveBlocksCpu : public testing::TestWithParam<MoveCheck> {
 protected:
  static constexpr std::size_t kBytes = 320;
  static constexpr std::uint32_t kMoves = 60;

  MoveBlocksCpu() {
    std::mt19937_64 random(3);
    for (std::byte& b : source_) b = static_cast<std::byte>(random());
    for (std::uint64_t i = 0; i < kMoves; ++i) {
      moves_.push_back({(i * 7 % kMoves) * kBytes, (i * 11 % kMoves) * kBytes});
      seeds_.push_back(random());
      sums_.push_back(seeded_checksum(
          std::span(source_).subspan(moves_.back().source_offset, kBytes), seeds_.back()));
    }
    ++sums_[5];
    ++seeds_[6];
    moves_[7].source_offset = kMoves * kBytes - 16;
    moves_[8].target_offset += 8;
  }

  Outcome run(MoveCheck check, bool reference) {
    Outcome o{std::vector<std::byte>(source_.size(), std::byte{0xEE}), sums_,
              std::vector<MoveState>(kMoves)};
    const std::uint32_t count = kMoves - 1;
    const MoveBlocksParams params{.source = source_,
                                  .target = o.target,
                                  .block_bytes = kBytes,
                                  .moves = moves_.data(),
                                  .moves_max = kMoves,
                                  .move_count = &count,
                                  .check = check,
                                  .seeds = seeds_.data(),
                                  .sums = o.sums.data(),
                                  .states = o.states.data()};
    if (reference) {
      move_blocks_reference(params);
    } else {
      EXPECT_TRUE(move_blocks(params).ok());
    }
    return o;
  }

  std::vector<std::byte> source_ = std::vector<std::byte>(kMoves * kBytes);
  std::vector<BlockMove> moves_;
  std::vector<std::uint64_t> seeds_;
  std::vector<std::uint64_t> sums_;
};

TEST_P(MoveBlocksCpu, AgreesWithTheReference) {
  EXPECT_EQ(run(GetParam(), false), run(GetParam(), true));
}

TEST_P(MoveBlocksCpu, TellsDamagedAndMisplacedBlocksApart) {
  const Outcome o = run(GetParam(), false);
  const bool verified = GetParam() == MoveCheck::kVerify;
  const MoveState damaged = verified ? MoveState::kCorrupt : MoveState::kMoved;
  EXPECT_EQ(o.states[4], MoveState::kMoved);
  EXPECT_EQ(o.states[5], damaged);
  EXPECT_EQ(o.states[6], damaged);
  EXPECT_EQ(o.states[7], MoveState::kOutOfRange);
  EXPECT_EQ(o.states[8], MoveState::kOutOfRange);
  EXPECT_EQ(o.states[kMoves - 1], MoveState::kPending);
  const std::byte first = o.target[moves_[5].target_offset];
  EXPECT_EQ(first, verified ? std::byte{0xFF} : source_[moves_[5].source_offset]);
}

INSTANTIATE_TEST_SUITE_P(Checks, MoveBlocksCpu,
                         testing::Values(MoveCheck::kNone, MoveCheck::kVerify,
                                         MoveCheck::kCompute));

}  // namespace
}  // namespace kvtier
