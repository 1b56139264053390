#pragma once

#include "kernels/attend_slots.h"
#include "kernels/gpu.h"
#include "kernels/move_blocks.h"
#include "memory/status.h"
#include "memory/stream_ref.h"

#include <cstddef>
#include <cstdint>

namespace kvtier {

inline constexpr std::uint32_t kNoBlock = 0xFFFFFFFFu;
inline constexpr std::uint32_t kNoFrame = 0xFFFFFFFFu;

/// Where a block is on the device. An entry of another generation is as good as none: the block was
/// cut open and sealed again since.
struct MapEntry {
  std::uint32_t slot = kNoSlot;
  std::uint32_t generation = 0;
};

/// The map from blocks to slots, in device memory and written by kernels alone: the counterpart of
/// runtime/device_map.h, with the clock as its policy. Starts as `MapEntry{}`, `kNoBlock`, 0, 0
/// and `kNobody`.
struct SlotMap {
  /// A mark of a slot that is never given away: of sinks, window and open tail.
  static constexpr std::uint32_t kHeld = 0xFFFFFFFFu;
  static constexpr std::uint32_t kNobody = 0xFFFFFFFFu;
  struct Clock {
    std::uint32_t hand = 0;  ///< The slot that is looked at next.
    std::uint32_t step = 0;  ///< Of the step that was resolved last; counts up to 2^31 - 2.
  };

  MapEntry* entries = nullptr;         ///< [blocks]
  std::uint32_t* residents = nullptr;  ///< [slots]: the block in each slot, or `kNoBlock`.
  /// [slots]: `kHeld`, or 2 * (last step that used it) + (1: used since the hand last passed).
  std::uint32_t* marks = nullptr;
  std::uint32_t* owners = nullptr;  ///< [blocks]: scratch, `kNobody` between calls.
  Clock* clock = nullptr;
  std::uint32_t slots = 0;
  std::uint32_t blocks = 0;
};

/// Which block a list's candidate is and where its bytes lie in host memory. Device memory.
struct BlockPlaces {
  /// [lists, extents_max]: extents of each list in the order of their tokens.
  const std::uint32_t* extents = nullptr;
  std::uint32_t extents_max = 0;
  std::uint32_t blocks_per_extent = 0;
  /// By extent: the frame of host memory it is in, or `kNoFrame`; and its blocks' generation.
  const std::uint32_t* frames = nullptr;
  const std::uint32_t* generations = nullptr;
  std::uint32_t extent_count = 0;
  /// Block p of the extent in frame f begins at `f * frame_bytes + header_bytes + p * block_bytes`.
  std::size_t frame_bytes = 0;
  std::size_t header_bytes = 0;
  std::size_t block_bytes = 0;
  /// By block, for verification (checksum.h); optional together.
  const std::uint64_t* seeds = nullptr;
  const std::uint64_t* sums = nullptr;
};

/// Why a block that was wanted is not there. The first three are `MoveState`'s.
enum class FetchState : std::uint32_t {
  kPending = 0,
  kCorrupt = 2,
  kOutOfRange = 3,
  kNotInHost = 4,  ///< Its extent is in no frame: on disk, or nowhere.
  kNoSlot = 5,     ///< Every slot is held or used by this step.
};
struct FailedBlock {
  std::uint32_t block = kNoBlock;
  std::uint32_t list = 0;  ///< Of the first list that wanted it.
  FetchState state = FetchState::kPending;
};

/// What became of a step; in page-locked memory, complete when the step's work is done.
struct FetchReport {
  std::uint32_t step = 0;
  std::uint32_t hits = 0;     ///< Of the choices, every list for itself.
  std::uint32_t misses = 0;   ///< The others.
  std::uint32_t fetched = 0;  ///< Distinct blocks that arrived and are right.
  std::uint32_t failed = 0;   ///< Distinct blocks that did not; their lists' rows are NaN.
};

/// What the lookup leaves of a choice that is not resident.
struct alignas(16) MissRecord {
  std::uint32_t cell = 0;
  std::uint32_t block = kNoBlock;
  std::uint32_t generation = 0;
  std::uint32_t frame = kNoFrame;
  std::uint64_t seed = 0;
  std::uint64_t sum = 0;
};

/// Turns choices into slots. Lists are [lists, k].
struct ResolveParams {
  SlotMap map;
  BlockPlaces places;
  std::uint32_t lists = 0;  ///< Up to 1,024.
  std::uint32_t k = 0;
  std::uint32_t tokens_per_block = 0;
  const std::uint32_t* chosen = nullptr;  ///< [lists, k]; `kNoIndex` from the first one on: none.

  /// [lists, k]: first what is resident, then what is fetched, each in the order of the choice.
  SlotRange* ranges = nullptr;
  std::uint32_t* begins = nullptr;       ///< [lists]: k * list; of the hits, and of all.
  std::uint32_t* hit_counts = nullptr;   ///< [lists]
  std::uint32_t* miss_begins = nullptr;  ///< [lists]
  std::uint32_t* miss_counts = nullptr;  ///< [lists]
  std::uint32_t* all_counts = nullptr;   ///< [lists]

  MissRecord* missing = nullptr;  ///< [lists, k]: scratch, the misses in the order of the choice.
  /// [lists * k]: what `move_blocks` is given; in the order of lists and choices.
  BlockMove* moves = nullptr;
  std::uint32_t* move_count = nullptr;
  std::uint64_t* move_seeds = nullptr;  ///< With `places.seeds`.
  std::uint64_t* move_sums = nullptr;
  std::uint32_t* moved_blocks = nullptr;  ///< [lists * k]: the block of each move.
  std::uint32_t* moved_lists = nullptr;   ///< [lists * k]: the list that wanted it first.
  FailedBlock* failed = nullptr;          ///< [lists * k]: blocks with no move.
  std::uint32_t* failed_count = nullptr;
};

/// Enqueues the lookup: hits are marked as used by this step, and a block that is missing in
/// several lists (sequences that share a prefix) is fetched once. Victims are taken by the clock,
/// one slot after the other from where the hand stopped: free slots, and such as were not used
/// since it came by last; never what is held or used by this step. Where none is left, or the
/// extent is in no frame, the range names `kNoSlot`, so that attending it gives NaN, and the block
/// is in `failed`.
///
/// A function of the map and the choices alone: the same on every run. Two kernels; the second is
/// one CTA, whose time grows with misses and slots passed, not with the choices. Captured, it can
/// be replayed with other choices and places.
Status resolve_slots(const Gpu& gpu, const ResolveParams& params, StreamRef stream);

/// The same step by step on host memory; for tests.
void resolve_slots_reference(const ResolveParams& params);

/// After the moves: what did not arrive leaves the map again, and the report is written. Follows
/// `resolve_slots` and `move_blocks`. One kernel, one CTA.
struct SettleParams {
  const MoveState* states = nullptr;     ///< [lists * k]: as `move_blocks` left them.
  FetchReport* report = nullptr;         ///< Device-reachable host memory.
  FailedBlock* failed_blocks = nullptr;  ///< [failed_max], likewise.
  std::uint32_t failed_max = 0;
};
Status settle_fetch(const Gpu& gpu, const ResolveParams& params, const SettleParams& settle,
                    StreamRef stream);

}  // namespace kvtier
