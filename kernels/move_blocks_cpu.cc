#include "kernels/move_blocks.h"

#include "kernels/checksum.h"

#include <algorithm>
#include <cstring>

namespace kvtier {
namespace {

bool in_range(std::uint64_t offset, std::size_t bytes, std::size_t region) {
  return offset % 16 == 0 && offset <= region && bytes <= region - offset;
}

MoveState move_one(const MoveBlocksParams& params, std::uint32_t i) {
  const BlockMove& move = params.moves[i];
  if (!in_range(move.source_offset, params.block_bytes, params.source.size()) ||
      !in_range(move.target_offset, params.block_bytes, params.target.size())) {
    return MoveState::kOutOfRange;
  }
  std::byte* target = params.target.data() + move.target_offset;
  std::memcpy(target, params.source.data() + move.source_offset, params.block_bytes);
  if (params.check == MoveCheck::kNone) return MoveState::kMoved;
  const std::uint64_t sum = seeded_checksum({target, params.block_bytes}, params.seeds[i]);
  if (params.check == MoveCheck::kCompute) {
    params.sums[i] = sum;
  } else if (params.sums[i] != sum) {
    std::memset(target, 0xFF, params.block_bytes);
    return MoveState::kCorrupt;
  }
  return MoveState::kMoved;
}

}  // namespace

Status move_blocks(const MoveBlocksParams& params) {
  if (params.block_bytes % 16 != 0) {
    return unsupported(
        fmt::format("blocks of {} bytes, expected a multiple of 16", params.block_bytes));
  }
  const std::uint32_t count = params.move_count == nullptr
                                  ? params.moves_max
                                  : std::min(*params.move_count, params.moves_max);
  for (std::uint32_t i = 0; i < count; ++i) {
    const MoveState state = move_one(params, i);
    if (params.states != nullptr) params.states[i] = state;
  }
  return {};
}

}  // namespace kvtier
