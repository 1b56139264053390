#include "kernels/move_blocks.h"

#include "kernels/checksum.h"

namespace kvtier {

void move_blocks_reference(const MoveBlocksParams& params) {
  for (std::uint32_t i = 0; i < params.moves_max; ++i) {
    if (params.move_count != nullptr && i >= *params.move_count) break;
    const std::uint64_t from = params.moves[i].source_offset;
    const std::uint64_t to = params.moves[i].target_offset;
    MoveState state = MoveState::kMoved;
    const bool inside = from <= params.source.size() && to <= params.target.size() &&
                        params.source.size() - from >= params.block_bytes &&
                        params.target.size() - to >= params.block_bytes;
    if (from % 16 != 0 || to % 16 != 0 || !inside) {
      state = MoveState::kOutOfRange;
    } else {
      for (std::size_t b = 0; b < params.block_bytes; ++b) {
        params.target[to + b] = params.source[from + b];
      }
      if (params.check != MoveCheck::kNone) {
        const std::uint64_t sum =
            seeded_checksum(params.source.subspan(from, params.block_bytes), params.seeds[i]);
        if (params.check == MoveCheck::kCompute) params.sums[i] = sum;
        if (params.sums[i] != sum) {
          state = MoveState::kCorrupt;
          for (std::size_t b = 0; b < params.block_bytes; ++b)
            params.target[to + b] = std::byte{0xFF};
        }
      }
    }
    if (params.states != nullptr) params.states[i] = state;
  }
}

}  // namespace kvtier
