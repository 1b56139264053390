#include "kernels/resolve_slots.h"

#include "kernels/top_k.h"

#include <vector>

namespace kvtier {
namespace {

std::uint32_t block_of(const ResolveParams& p, std::uint32_t list, std::uint32_t cell) {
  const BlockPlaces& places = p.places;
  const std::uint32_t at = cell / places.blocks_per_extent;
  if (at >= places.extents_max) return kNoBlock;
  const std::uint32_t extent = places.extents[std::size_t{list} * places.extents_max + at];
  if (extent >= places.extent_count) return kNoBlock;
  const std::uint64_t block =
      std::uint64_t{extent} * places.blocks_per_extent + cell % places.blocks_per_extent;
  return block < p.map.blocks ? static_cast<std::uint32_t>(block) : kNoBlock;
}

std::uint32_t slot_of(const ResolveParams& p, std::uint32_t block) {
  if (block == kNoBlock) return kNoSlot;
  const MapEntry& entry = p.map.entries[block];
  const bool current = entry.generation == p.places.generations[block / p.places.blocks_per_extent];
  return current && entry.slot < p.map.slots ? entry.slot : kNoSlot;
}

/// The slot that the clock gives away next, or `kNoSlot`; `looks` are those left to it in this
/// step.
std::uint32_t next_victim(const SlotMap& map, std::uint32_t step, std::uint64_t& looks) {
  for (; looks > 0; --looks) {
    const std::uint32_t slot = map.clock->hand;
    std::uint32_t& mark = map.marks[slot];
    const bool fixed = mark == SlotMap::kHeld || mark / 2 == step;
    const bool goes = !fixed && (map.residents[slot] == kNoBlock || mark % 2 == 0);
    if (!fixed && !goes) --mark;
    map.clock->hand = (slot + 1) % map.slots;
    if (!goes) continue;
    --looks;
    return slot;
  }
  return kNoSlot;
}

void fetch_block(const ResolveParams& p, std::uint32_t list, std::uint32_t block,
                 std::uint64_t& looks) {
  const SlotMap& map = p.map;
  const BlockPlaces& places = p.places;
  const std::uint32_t extent = block / places.blocks_per_extent;
  if (places.frames[extent] == kNoFrame) {
    p.failed[(*p.failed_count)++] = {block, list, FetchState::kNotInHost};
    return;
  }
  const std::uint32_t slot = next_victim(map, map.clock->step, looks);
  if (slot == kNoSlot) {
    p.failed[(*p.failed_count)++] = {block, list, FetchState::kNoSlot};
    return;
  }
  const std::uint32_t resident = map.residents[slot];
  if (resident != kNoBlock && map.entries[resident].slot == slot) {
    map.entries[resident].slot = kNoSlot;
  }
  map.entries[block] = {slot, places.generations[extent]};
  map.residents[slot] = block;
  map.marks[slot] = 2 * map.clock->step + 1;
  const std::uint32_t move = (*p.move_count)++;
  p.moves[move] = {std::uint64_t{places.frames[extent]} * places.frame_bytes + places.header_bytes +
                       block % places.blocks_per_extent * places.block_bytes,
                   slot * places.block_bytes};
  p.moved_blocks[move] = block;
  p.moved_lists[move] = list;
  if (places.seeds == nullptr) return;
  p.move_seeds[move] = places.seeds[block];
  p.move_sums[move] = places.sums[block];
}

}  // namespace

void resolve_slots_reference(const ResolveParams& p) {
  const SlotMap& map = p.map;
  ++map.clock->step;
  *p.move_count = 0;
  *p.failed_count = 0;
  // What is used is marked before the first slot is given away.
  for (std::uint32_t list = 0; list < p.lists; ++list) {
    const std::uint32_t first = list * p.k;
    std::uint32_t hits = 0;
    std::uint32_t misses = 0;
    for (std::uint32_t i = 0; i < p.k && p.chosen[first + i] != kNoIndex; ++i) {
      const std::uint32_t cell = p.chosen[first + i];
      const std::uint32_t slot = slot_of(p, block_of(p, list, cell));
      if (slot == kNoSlot) {
        p.missing[first + misses++].cell = cell;
        continue;
      }
      if (map.marks[slot] != SlotMap::kHeld) map.marks[slot] = 2 * map.clock->step + 1;
      p.ranges[first + hits++] = {slot, cell * p.tokens_per_block, 0,
                                  static_cast<std::uint16_t>(p.tokens_per_block)};
    }
    p.begins[list] = first;
    p.hit_counts[list] = hits;
    p.miss_begins[list] = first + hits;
    p.miss_counts[list] = misses;
    p.all_counts[list] = hits + misses;
  }
  std::vector<bool> met(map.blocks);
  std::uint64_t looks = 2 * std::uint64_t{map.slots};
  for (std::uint32_t list = 0; list < p.lists; ++list) {
    for (std::uint32_t m = 0; m < p.miss_counts[list]; ++m) {
      const std::uint32_t cell = p.missing[list * p.k + m].cell;
      const std::uint32_t block = block_of(p, list, cell);
      if (block == kNoBlock) {
        p.failed[(*p.failed_count)++] = {kNoBlock, list, FetchState::kOutOfRange};
      } else if (!met[block]) {
        met[block] = true;
        fetch_block(p, list, block, looks);
      }
      p.ranges[p.miss_begins[list] + m] = {slot_of(p, block), cell * p.tokens_per_block, 0,
                                           static_cast<std::uint16_t>(p.tokens_per_block)};
    }
  }
}

}  // namespace kvtier
