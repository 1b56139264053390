#pragma once

#include "kernels/gpu.h"
#include "memory/status.h"
#include "memory/stream_ref.h"

#include <cstddef>
#include <cstdint>
#include <span>

namespace kvtier {

/// One block to move, by byte offsets from the starts of the two regions; multiples of 16.
struct BlockMove {
  std::uint64_t source_offset = 0;
  std::uint64_t target_offset = 0;
};

/// What became of one move. Anything but `kMoved` must not be attended.
enum class MoveState : std::uint32_t {
  kPending = 0,     ///< Not reached; callers clear states to this.
  kMoved = 1,       ///< Copied, and right where it was checked.
  kCorrupt = 2,     ///< The checksum differs; the target holds bytes 0xFF, NaN in every dtype.
  kOutOfRange = 3,  ///< An offset leaves its region; nothing was read or written.
};

enum class MoveCheck : unsigned char {
  kNone,
  kVerify,   ///< Compare with `sums`.
  kCompute,  ///< Write `sums`.
};

/// Moves equal blocks between two regions: pinned host memory to the device slab (gather), or back
/// (scatter), or within one of them. Targets of one call do not overlap, nor do the regions where
/// they are used.
struct MoveBlocksParams {
  /// Memory the GPU reaches: its own or page-locked. 16-byte aligned.
  std::span<const std::byte> source;
  std::span<std::byte> target;
  std::size_t block_bytes = 0;  ///< A multiple of 16 up to 16 MiB.

  const BlockMove* moves = nullptr;  ///< [moves_max]
  std::uint32_t moves_max = 0;
  /// How many of them there are, read when the kernel runs; none: `moves_max`.
  const std::uint32_t* move_count = nullptr;

  MoveCheck check = MoveCheck::kNone;
  /// [moves_max]: `block_seed` of what each block must be; for a check.
  const std::uint64_t* seeds = nullptr;
  /// [moves_max]: `seeded_checksum` of each block, expected or written.
  std::uint64_t* sums = nullptr;
  MoveState* states = nullptr;  ///< [moves_max]; optional without a check.
};

/// Enqueues the moves on the GPU. All pointers are device-reachable, and alive until the stream is
/// past them. Allocates nothing, waits for nothing; may be captured in a graph.
///
/// The checksum is XXH3-64 as everywhere (checksum.h), computed from the registers that carry the
/// block: no byte is read twice. `unsupported` for a block size that is not a multiple of 16, or,
/// with a check, below 256 or not a multiple of 64.
///
/// A block is moved by one warp, 4 KiB at a time: the full rate needs a hundred KiB of blocks.
/// Lists in address order of the source move blocks below 1 KiB up to twice as fast.
Status move_blocks(const Gpu& gpu, const MoveBlocksParams& params, StreamRef stream);

/// The same contract on the calling thread and host memory, at once. Any checked size.
Status move_blocks(const MoveBlocksParams& params);

/// Byte by byte; for tests.
void move_blocks_reference(const MoveBlocksParams& params);

}  // namespace kvtier
