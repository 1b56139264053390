#pragma once

#include "kernels/resolve_slots.h"
#include "kernels/warp.cuh"

#include <cstdint>

// What the kernels of resolve_slots.cu and settle_fetch.cu are given, and how they read its tables.

namespace kvtier {

/// One CTA goes through the misses of all lists, a thread a list where it sums them up.
inline constexpr std::uint32_t kMaxResolveLists = 1024;

struct ResolveArguments {
  SlotMap map;
  BlockPlaces places;
  std::uint32_t lists;
  std::uint32_t k;
  std::uint32_t tokens_per_block;
  const std::uint32_t* chosen;
  SlotRange* ranges;
  std::uint32_t* begins;
  std::uint32_t* hit_counts;
  std::uint32_t* miss_begins;
  std::uint32_t* miss_counts;
  std::uint32_t* all_counts;
  MissRecord* missing;
  BlockMove* moves;
  std::uint32_t* move_count;
  std::uint64_t* move_seeds;
  std::uint64_t* move_sums;
  std::uint32_t* moved_blocks;
  std::uint32_t* moved_lists;
  FailedBlock* failed;
  std::uint32_t* failed_count;

  __device__ std::uint32_t extent_of(std::uint32_t list, std::uint32_t cell) const {
    const std::uint32_t at = cell / places.blocks_per_extent;
    return at < places.extents_max ? places.extents[std::size_t{list} * places.extents_max + at]
                                   : kNoBlock;
  }
  /// `kNoBlock` where the tables have none.
  __device__ std::uint32_t block_of(std::uint32_t extent, std::uint32_t cell) const {
    if (extent >= places.extent_count) return kNoBlock;
    const std::uint64_t block =
        std::uint64_t{extent} * places.blocks_per_extent + cell % places.blocks_per_extent;
    return block < map.blocks ? static_cast<std::uint32_t>(block) : kNoBlock;
  }
  __device__ std::uint32_t slot_of(std::uint32_t block, std::uint32_t generation) const {
    if (block == kNoBlock) return kNoSlot;
    const MapEntry entry = map.entries[block];
    return entry.generation == generation && entry.slot < map.slots ? entry.slot : kNoSlot;
  }
  __device__ SlotRange range(std::uint32_t slot, std::uint32_t cell) const {
    return {slot, cell * tokens_per_block, 0, static_cast<std::uint16_t>(tokens_per_block)};
  }
};

inline ResolveArguments resolve_arguments(const ResolveParams& params) {
  return {.map = params.map,
          .places = params.places,
          .lists = params.lists,
          .k = params.k,
          .tokens_per_block = params.tokens_per_block,
          .chosen = params.chosen,
          .ranges = params.ranges,
          .begins = params.begins,
          .hit_counts = params.hit_counts,
          .miss_begins = params.miss_begins,
          .miss_counts = params.miss_counts,
          .all_counts = params.all_counts,
          .missing = params.missing,
          .moves = params.moves,
          .move_count = params.move_count,
          .move_seeds = params.move_seeds,
          .move_sums = params.move_sums,
          .moved_blocks = params.moved_blocks,
          .moved_lists = params.moved_lists,
          .failed = params.failed,
          .failed_count = params.failed_count};
}

inline Status check_resolve(const ResolveParams& params) {
  if (params.lists <= kMaxResolveLists && params.places.blocks_per_extent > 0 &&
      std::uint64_t{params.lists} * params.k < SlotMap::kNobody) {
    return {};
  }
  return unsupported(
      fmt::format("resolving {} lists of {} choices, {} blocks an extent; expected "
                  "up to {} lists",
                  params.lists, params.k, params.places.blocks_per_extent, kMaxResolveLists));
}

}  // namespace kvtier
