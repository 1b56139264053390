#include "kernels/radix_cut.cuh"
#include "kernels/resolve_tables.cuh"
#include "kernels/top_k.h"

// Two kernels: one looks every choice up, a CTA a list, and marks what is used; when all marks are
// set, one CTA goes through what is missing, in the order of lists and choices, and through the
// slots from the hand on, a chunk of threads at a time. Counts over a chunk (sum_before) stand for
// the order in which one thread would have met them, so the answer is that of the plain loop
// (resolve_slots_reference) to the last slot.

namespace kvtier {
namespace {

constexpr unsigned kLookupThreads = 256;
constexpr unsigned kPlaceThreads = 1024;
constexpr std::uint32_t kMaxLists = kMaxResolveLists;
static_assert(kMaxLists <= kPlaceThreads);

__device__ std::uint32_t used_mark(std::uint32_t step) { return 2 * step + 1; }

/// What the tables say of a choice; everything is asked for at once.
__device__ MissRecord find_block(const ResolveArguments& a, std::uint32_t list,
                                 std::uint32_t cell) {
  const std::uint32_t extent = a.extent_of(list, cell);
  MissRecord record;
  record.cell = cell;
  record.block = a.block_of(extent, cell);
  if (record.block != kNoBlock) {
    record.generation = a.places.generations[extent];
    record.frame = a.places.frames[extent];
  }
  return record;
}

__global__ void __launch_bounds__(kLookupThreads)
    lookup_kernel(const __grid_constant__ ResolveArguments a) {
  __shared__ std::uint32_t scratch[kLookupThreads / kWarpLanes];
  wait_for_previous_kernel();
  let_next_kernel_start();
  const std::uint32_t list = blockIdx.x;
  const std::size_t first = std::size_t{list} * a.k;
  const std::uint32_t mark = used_mark(a.map.clock->step + 1);
  std::uint32_t hits = 0;
  std::uint32_t misses = 0;
  for (std::uint32_t at = 0; at < a.k; at += kLookupThreads) {
    const std::uint32_t i = at + threadIdx.x;
    const std::uint32_t cell = i < a.k ? a.chosen[first + i] : kNoIndex;
    const bool wanted = cell != kNoIndex;
    MissRecord record = {};
    if (wanted) record = find_block(a, list, cell);
    const std::uint32_t slot = wanted ? a.slot_of(record.block, record.generation) : kNoSlot;
    const bool hit = slot != kNoSlot;
    const bool miss = wanted && !hit;
    if (hit && a.map.marks[slot] != SlotMap::kHeld) a.map.marks[slot] = mark;
    if (miss && record.block != kNoBlock && a.places.seeds != nullptr) {
      record.seed = a.places.seeds[record.block];
      record.sum = a.places.sums[record.block];
    }
    std::uint32_t all;
    const std::uint32_t before =
        sum_before<kLookupThreads>((hit ? 1u : 0u) | (miss ? 0x10000u : 0u), scratch, all);
    if (hit) a.ranges[first + hits + (before & 0xFFFF)] = a.range(slot, cell);
    if (miss) {
      const std::size_t place = first + misses + (before >> 16);
      a.missing[place] = record;
      if (record.block != kNoBlock) {
        atomicMin(a.map.owners + record.block, static_cast<std::uint32_t>(place));
      }
    }
    hits += all & 0xFFFF;
    misses += all >> 16;
  }
  if (threadIdx.x > 0) return;
  a.begins[list] = static_cast<std::uint32_t>(first);
  a.hit_counts[list] = hits;
  a.miss_begins[list] = static_cast<std::uint32_t>(first) + hits;
  a.miss_counts[list] = misses;
  a.all_counts[list] = hits + misses;
}

/// One miss of the step.
struct Miss {
  std::uint32_t list;
  std::uint32_t place;  ///< Among the list's misses.
  MissRecord record;
};

/// A slot that the clock looks at, read ahead: nothing that is found out about misses changes it.
struct SlotAhead {
  std::uint32_t mark = SlotMap::kHeld;
  std::uint32_t resident = kNoBlock;
  std::uint32_t slot_of_resident = kNoSlot;
};

/// What the one CTA that places misses shares. Of the first moves what comes next is kept here.
struct Shared {
  std::uint32_t scratch[kPlaceThreads / kWarpLanes];
  std::uint32_t begins[kMaxLists];  ///< Misses of all lists before each.
  std::uint32_t blocks[kPlaceThreads];
  std::uint32_t generations[kPlaceThreads];
  std::uint32_t slots[kPlaceThreads];
  std::uint32_t failed;
};

__device__ Miss find_miss(const ResolveArguments& a, const std::uint32_t* begins,
                          std::uint32_t at) {
  std::uint32_t list = 0;
  for (std::uint32_t half = kMaxLists / 2; half > 0; half /= 2) {
    if (list + half < a.lists && begins[list + half] <= at) list += half;
  }
  Miss miss;
  miss.list = list;
  miss.place = at - begins[list];
  miss.record = a.missing[std::size_t{list} * a.k + miss.place];
  return miss;
}

__device__ void fail(const ResolveArguments& a, Shared& shared, std::uint32_t block,
                     std::uint32_t list, FetchState state) {
  a.failed[atomicAdd(&shared.failed, 1u)] = {block, list, state};
}

__device__ void list_move(const ResolveArguments& a, Shared& shared, const Miss& miss,
                          std::uint32_t move) {
  const MissRecord& record = miss.record;
  a.moved_blocks[move] = record.block;
  a.moved_lists[move] = miss.list;
  a.moves[move].source_offset =
      record.frame * std::uint64_t{a.places.frame_bytes} + a.places.header_bytes +
      record.block % a.places.blocks_per_extent * std::uint64_t{a.places.block_bytes};
  if (a.places.seeds != nullptr) {
    a.move_seeds[move] = record.seed;
    a.move_sums[move] = record.sum;
  }
  if (move >= kPlaceThreads) return;
  shared.blocks[move] = record.block;
  shared.generations[move] = record.generation;
}

/// Lists the distinct blocks that can be fetched, in order; returns how many. `first_miss` is this
/// thread's of the first chunk, and `first_move` its move, if it has one.
__device__ std::uint32_t list_moves(const ResolveArguments& a, Shared& shared, std::uint32_t misses,
                                    Miss& first_miss, std::uint32_t& first_move) {
  std::uint32_t wanted = 0;
  for (std::uint32_t first = 0; first < misses; first += kPlaceThreads) {
    const std::uint32_t at = first + threadIdx.x;
    bool mine = false;
    Miss miss = {};
    if (at < misses) {
      miss = find_miss(a, shared.begins, at);
      const auto entry = static_cast<std::uint32_t>(std::size_t{miss.list} * a.k + miss.place);
      if (miss.record.block == kNoBlock) {
        fail(a, shared, kNoBlock, miss.list, FetchState::kOutOfRange);
      } else if (a.map.owners[miss.record.block] == entry) {
        mine = miss.record.frame != kNoFrame;
        if (!mine) fail(a, shared, miss.record.block, miss.list, FetchState::kNotInHost);
      }
    }
    std::uint32_t all;
    const std::uint32_t before = sum_before<kPlaceThreads>(mine ? 1u : 0u, shared.scratch, all);
    if (mine) list_move(a, shared, miss, wanted + before);
    if (first == 0) {
      first_miss = miss;
      first_move = mine ? before : kNoBlock;
    }
    wanted += all;
  }
  __syncthreads();
  return wanted;
}

__device__ SlotAhead look_at(const ResolveArguments& a, std::uint32_t slot) {
  SlotAhead ahead;
  ahead.mark = a.map.marks[slot];
  ahead.resident = a.map.residents[slot];
  if (ahead.resident != kNoBlock) ahead.slot_of_resident = a.map.entries[ahead.resident].slot;
  return ahead;
}

__device__ void take_slot(const ResolveArguments& a, Shared& shared, std::uint32_t slot,
                          std::uint32_t move, std::uint32_t mark) {
  const bool kept = move < kPlaceThreads;
  const std::uint32_t block = kept ? shared.blocks[move] : a.moved_blocks[move];
  const std::uint32_t generation =
      kept ? shared.generations[move] : a.places.generations[block / a.places.blocks_per_extent];
  a.map.entries[block] = {slot, generation};
  a.map.residents[slot] = block;
  a.map.marks[slot] = mark;
  a.moves[move].target_offset = slot * std::uint64_t{a.places.block_bytes};
  if (kept) shared.slots[move] = slot;
}

/// Gives slots to the first moves; returns how many got one. The hand goes round twice at most: by
/// then every slot that may go has lost its second chance. `ahead` is what this thread read of the
/// first chunk.
__device__ std::uint32_t turn_clock(const ResolveArguments& a, Shared& shared, std::uint32_t wanted,
                                    std::uint32_t step, std::uint32_t hand, SlotAhead ahead) {
  const std::uint32_t slots = a.map.slots;
  if (slots == 0 || wanted == 0) return 0;
  const std::uint32_t chunk = min(kPlaceThreads, slots);
  std::uint32_t found = 0;
  std::uint32_t at = hand;
  std::uint64_t passed = 0;
  while (found < wanted && passed < 2 * std::uint64_t{slots}) {
    const std::uint64_t left = 2 * std::uint64_t{slots} - passed;
    const bool looks = threadIdx.x < min(static_cast<std::uint64_t>(chunk), left);
    // Both are below `slots`, so once round is enough.
    std::uint64_t place = std::uint64_t{at} + threadIdx.x;
    if (place >= slots) place -= slots;
    const auto slot = static_cast<std::uint32_t>(place);
    if (passed > 0) ahead = looks ? look_at(a, slot) : SlotAhead{};
    const bool fixed = ahead.mark == SlotMap::kHeld || ahead.mark / 2 == step;
    const bool free = ahead.resident == kNoBlock;
    const bool goes = looks && !fixed && (free || ahead.mark % 2 == 0);
    std::uint32_t all;
    const std::uint32_t before = sum_before<kPlaceThreads>(goes ? 1u : 0u, shared.scratch, all);
    // Slots behind the last one needed are not passed.
    const bool reached = looks && found + before < wanted;
    if (reached && !fixed && !goes) a.map.marks[slot] = ahead.mark - 1;
    if (reached && goes && !free && ahead.slot_of_resident == slot) {
      a.map.entries[ahead.resident].slot = kNoSlot;
    }
    // A block can be among the victims, under an older generation, and among those that come.
    __syncthreads();
    if (reached && goes) take_slot(a, shared, slot, found + before, used_mark(step));
    const bool last = reached && goes && found + before + 1 == wanted;
    std::uint32_t ended;
    sum_before<kPlaceThreads>(last ? threadIdx.x + 1 : 0u, shared.scratch, ended);
    const std::uint32_t looked =
        ended > 0 ? ended : static_cast<std::uint32_t>(min(std::uint64_t{chunk}, left));
    passed += looked;
    std::uint64_t next = std::uint64_t{at} + looked;
    if (next >= slots) next -= slots;
    at = static_cast<std::uint32_t>(next);
    found += all;
  }
  if (threadIdx.x == 0) a.map.clock->hand = at;
  return min(found, wanted);
}

__global__ void __launch_bounds__(kPlaceThreads)
    place_kernel(const __grid_constant__ ResolveArguments a) {
  __shared__ Shared shared;
  wait_for_previous_kernel();
  let_next_kernel_start();
  const SlotMap::Clock clock = *a.map.clock;
  const std::uint32_t step = clock.step + 1;
  const std::uint32_t of_list = threadIdx.x < a.lists ? a.miss_counts[threadIdx.x] : 0;
  SlotAhead ahead;
  if (threadIdx.x < a.map.slots) {
    std::uint64_t slot = std::uint64_t{clock.hand} + threadIdx.x;
    if (slot >= a.map.slots) slot -= a.map.slots;
    ahead = look_at(a, static_cast<std::uint32_t>(slot));
  }
  std::uint32_t misses;
  shared.begins[threadIdx.x] = sum_before<kPlaceThreads>(of_list, shared.scratch, misses);
  if (threadIdx.x == 0) shared.failed = 0;
  __syncthreads();
  Miss first_miss;
  std::uint32_t first_move = kNoBlock;
  const std::uint32_t wanted = list_moves(a, shared, misses, first_miss, first_move);
  const std::uint32_t found = turn_clock(a, shared, wanted, step, clock.hand, ahead);
  for (std::uint32_t i = found + threadIdx.x; i < wanted; i += kPlaceThreads) {
    fail(a, shared, a.moved_blocks[i], a.moved_lists[i], FetchState::kNoSlot);
  }
  __syncthreads();
  for (std::uint32_t at = threadIdx.x; at < misses; at += kPlaceThreads) {
    const bool first = at < kPlaceThreads;
    const Miss miss = first ? first_miss : find_miss(a, shared.begins, at);
    const MissRecord& record = miss.record;
    const std::uint32_t slot = first && first_move < found
                                   ? shared.slots[first_move]
                                   : a.slot_of(record.block, record.generation);
    a.ranges[a.miss_begins[miss.list] + miss.place] = a.range(slot, record.cell);
    if (record.block != kNoBlock) a.map.owners[record.block] = SlotMap::kNobody;
  }
  if (threadIdx.x > 0) return;
  a.map.clock->step = step;
  *a.move_count = found;
  *a.failed_count = shared.failed;
}

}  // namespace

Status resolve_slots(const Gpu& gpu, const ResolveParams& params, StreamRef stream) {
  KVTIER_RETURN_IF_ERROR(check_resolve(params));
  if (params.lists == 0) return {};
  ResolveArguments arguments = resolve_arguments(params);
  void* pointers[] = {&arguments};
  const bool early = gpu.traits().capability >= 90;
  KVTIER_RETURN_IF_ERROR(gpu.launch({.kernel = reinterpret_cast<const void*>(&lookup_kernel),
                                     .grid = {params.lists, 1, 1},
                                     .threads = kLookupThreads,
                                     .arguments = pointers,
                                     .stream = stream.get(),
                                     .early = early},
                                    "resolve_slots"));
  return gpu.launch({.kernel = reinterpret_cast<const void*>(&place_kernel),
                     .grid = {1, 1, 1},
                     .threads = kPlaceThreads,
                     .arguments = pointers,
                     .stream = stream.get(),
                     .early = early},
                    "resolve_slots");
}

}  // namespace kvtier
