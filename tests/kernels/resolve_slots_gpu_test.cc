#include "kernels/resolve_slots.h"
#include "kernels/top_k.h"
#include "tests/kernels/gpu_fixture.h"

#include <algorithm>
#include <tuple>

namespace kvtier {
namespace {

/// Everything that a resolve reads and writes, in ordinary memory.
struct World {
  std::uint32_t lists = 3;
  std::uint32_t k = 20;
  std::uint32_t extents_max = 12;
  std::uint32_t blocks_per_extent = 5;
  std::uint32_t extent_count = 30;
  std::uint32_t slots = 64;

  std::vector<std::uint32_t> extents, frames, generations, chosen;
  std::vector<std::uint64_t> seeds, sums;
  std::vector<MapEntry> entries;
  std::vector<std::uint32_t> residents, marks, owners;
  std::vector<SlotMap::Clock> clock{1};

  std::vector<SlotRange> ranges;
  std::vector<std::uint32_t> begins, hit_counts, miss_begins, miss_counts, all_counts;
  std::vector<MissRecord> missing;
  std::vector<BlockMove> moves;
  std::vector<std::uint32_t> move_count{0}, moved_blocks, moved_lists, failed_count{0};
  std::vector<std::uint64_t> move_seeds, move_sums;
  std::vector<FailedBlock> failed;

  std::uint32_t blocks() const { return extent_count * blocks_per_extent; }

  void fill(std::mt19937& random) {
    for (std::uint32_t i = 0; i < lists * extents_max; ++i) {
      extents.push_back(random() % extent_count);
    }
    for (std::uint32_t e = 0; e < extent_count; ++e) {
      frames.push_back(random() % 11 == 0 ? kNoFrame : extent_count - 1 - e);
      generations.push_back(random() % 3);
    }
    for (std::uint32_t b = 0; b < blocks(); ++b) {
      seeds.push_back(random());
      sums.push_back(random());
    }
    entries.resize(blocks());
    owners.assign(blocks(), SlotMap::kNobody);
    residents.assign(slots, kNoBlock);
    marks.assign(slots, 0);
    // Some slots are held for good.
    for (std::uint32_t s = 0; s < slots; s += 1 + random() % 9) marks[s] = SlotMap::kHeld;
    const std::size_t choices = std::size_t{lists} * k;
    chosen.resize(choices);
    ranges.resize(choices);
    missing.resize(choices);
    moves.resize(choices);
    moved_blocks.resize(choices);
    moved_lists.resize(choices);
    move_seeds.resize(choices);
    move_sums.resize(choices);
    failed.resize(choices);
    for (auto* counts : {&begins, &hit_counts, &miss_begins, &miss_counts, &all_counts}) {
      counts->resize(lists);
    }
  }

  /// Distinct cells per list in ascending order; the same few often, so that there are hits.
  void choose(std::mt19937& random) {
    const std::uint32_t cells = extents_max * blocks_per_extent + 2;  // Two outside the table.
    for (std::uint32_t list = 0; list < lists; ++list) {
      std::vector<std::uint32_t> all(cells);
      for (std::uint32_t c = 0; c < cells; ++c) all[c] = c;
      std::shuffle(all.begin(), all.end(), random);
      const std::uint32_t count = random() % (std::min(k, cells) + 1);
      all.resize(count);
      std::ranges::sort(all);
      all.resize(k, kNoIndex);
      std::ranges::copy(all, chosen.begin() + std::ptrdiff_t{list} * k);
    }
  }

  ResolveParams params() {
    ResolveParams p;
    p.map = {entries.data(), residents.data(), marks.data(), owners.data(), clock.data(),
             slots,          blocks()};
    p.places = {.extents = extents.data(),
                .extents_max = extents_max,
                .blocks_per_extent = blocks_per_extent,
                .frames = frames.data(),
                .generations = generations.data(),
                .extent_count = extent_count,
                .frame_bytes = 8192,
                .header_bytes = 4096,
                .block_bytes = 512,
                .seeds = seeds.data(),
                .sums = sums.data()};
    p.lists = lists;
    p.k = k;
    p.tokens_per_block = 4;
    p.chosen = chosen.data();
    p.ranges = ranges.data();
    p.begins = begins.data();
    p.hit_counts = hit_counts.data();
    p.miss_begins = miss_begins.data();
    p.miss_counts = miss_counts.data();
    p.all_counts = all_counts.data();
    p.missing = missing.data();
    p.moves = moves.data();
    p.move_count = move_count.data();
    p.move_seeds = move_seeds.data();
    p.move_sums = move_sums.data();
    p.moved_blocks = moved_blocks.data();
    p.moved_lists = moved_lists.data();
    p.failed = failed.data();
    p.failed_count = failed_count.data();
    return p;
  }
};

class ResolveGpu : public GpuTest {
 protected:
  /// A copy of the world on the GPU; `back` brings it to the host again.
  class Twin {
   public:
    Twin(const ResolveGpu& test, World& world) : test_(test), params_(world.params()) {
      add(params_.map.entries, world.entries);
      add(params_.map.residents, world.residents);
      add(params_.map.marks, world.marks);
      add(params_.map.owners, world.owners);
      add(params_.map.clock, world.clock);
      add(params_.places.extents, world.extents);
      add(params_.places.frames, world.frames);
      add(params_.places.generations, world.generations);
      add(params_.places.seeds, world.seeds);
      add(params_.places.sums, world.sums);
      add(params_.chosen, world.chosen);
      add(params_.ranges, world.ranges);
      add(params_.begins, world.begins);
      add(params_.hit_counts, world.hit_counts);
      add(params_.miss_begins, world.miss_begins);
      add(params_.miss_counts, world.miss_counts);
      add(params_.all_counts, world.all_counts);
      add(params_.missing, world.missing);
      add(params_.moves, world.moves);
      add(params_.move_count, world.move_count);
      add(params_.move_seeds, world.move_seeds);
      add(params_.move_sums, world.move_sums);
      add(params_.moved_blocks, world.moved_blocks);
      add(params_.moved_lists, world.moved_lists);
      add(params_.failed, world.failed);
      add(params_.failed_count, world.failed_count);
    }
    const ResolveParams& params() const { return params_; }
    void back() const {
      for (const auto& [buffer, bytes] : parts_) {
        ASSERT_TRUE(buffer.download(bytes).ok());
      }
      test_.wait();
    }

   private:
    template <typename T, typename U>
    void add(T*& pointer, std::vector<U>& values) {
      parts_.emplace_back(test_.to_device(values), std::as_writable_bytes(std::span(values)));
      pointer = parts_.back().first.template as<U>();
    }
    const ResolveGpu& test_;
    ResolveParams params_;
    std::vector<std::pair<DeviceBuffer, std::span<std::byte>>> parts_;
  };

  void resolve(World& world) {
    const Twin twin(*this, world);
    const Status status = resolve_slots(gpu(), twin.params(), stream());
    ASSERT_TRUE(status.ok()) << status.to_string();
    twin.back();
  }

  static void sort_failed(World& world) {
    const auto key = [](const FailedBlock& f) {
      return std::tuple(f.block, f.list, static_cast<std::uint32_t>(f.state));
    };
    std::sort(world.failed.begin(), world.failed.begin() + world.failed_count[0],
              [&](const FailedBlock& a, const FailedBlock& b) { return key(a) < key(b); });
  }

  static void expect_same(World& actual, World& expected) {
    const auto equal_bytes = [](const auto& a, const auto& b, std::size_t count) {
      return std::memcmp(a.data(), b.data(), count * sizeof(a[0])) == 0;
    };
    EXPECT_TRUE(equal_bytes(actual.entries, expected.entries, actual.entries.size()));
    EXPECT_EQ(actual.residents, expected.residents);
    EXPECT_EQ(actual.marks, expected.marks);
    EXPECT_EQ(actual.owners, expected.owners);
    EXPECT_EQ(actual.clock[0].hand, expected.clock[0].hand);
    EXPECT_EQ(actual.clock[0].step, expected.clock[0].step);
    EXPECT_EQ(actual.hit_counts, expected.hit_counts);
    EXPECT_EQ(actual.miss_counts, expected.miss_counts);
    EXPECT_EQ(actual.all_counts, expected.all_counts);
    EXPECT_EQ(actual.begins, expected.begins);
    EXPECT_EQ(actual.miss_begins, expected.miss_begins);
    EXPECT_EQ(actual.move_count, expected.move_count);
    EXPECT_EQ(actual.failed_count, expected.failed_count);
    const std::uint32_t moves = expected.move_count[0];
    EXPECT_TRUE(equal_bytes(actual.moves, expected.moves, moves));
    EXPECT_TRUE(equal_bytes(actual.moved_blocks, expected.moved_blocks, moves));
    EXPECT_TRUE(equal_bytes(actual.moved_lists, expected.moved_lists, moves));
    EXPECT_TRUE(equal_bytes(actual.move_seeds, expected.move_seeds, moves));
    EXPECT_TRUE(equal_bytes(actual.move_sums, expected.move_sums, moves));
    for (std::uint32_t list = 0; list < actual.lists; ++list) {
      EXPECT_EQ(std::memcmp(&actual.ranges[list * actual.k], &expected.ranges[list * actual.k],
                            expected.all_counts[list] * sizeof(SlotRange)),
                0)
          << list;
    }
    sort_failed(actual);
    sort_failed(expected);
    EXPECT_TRUE(equal_bytes(actual.failed, expected.failed, expected.failed_count[0]));
  }
};

TEST_F(ResolveGpu, AgreesWithThePlainLoopOverManySteps) {
  for (std::uint32_t seed = 0; seed < 12; ++seed) {
    std::mt19937 random(seed);
    World world;
    world.lists = 1 + random() % 9;
    world.k = 1 + random() % 700;
    world.slots = 1 + random() % (seed % 3 == 0 ? 4000 : 200);
    world.extents_max = 1 + random() % 150;
    world.extent_count = 1 + random() % 500;
    world.fill(random);
    for (int step = 0; step < 6; ++step) {
      SCOPED_TRACE(fmt::format("seed {} step {}", seed, step));
      world.choose(random);
      for (std::uint32_t& generation : world.generations) generation += random() % 20 == 0;
      World expected = world;
      resolve_slots_reference(expected.params());
      resolve(world);
      expect_same(world, expected);
      if (HasFailure()) return;
    }
  }
}

TEST_F(ResolveGpu, WhatTheStepUsesStaysAndWhatHasNoSlotFails) {
  std::mt19937 random(1);
  World world;
  world.lists = 1;
  world.k = 8;
  world.slots = 4;
  world.fill(random);
  world.marks = {0, 0, SlotMap::kHeld, 0};
  for (std::uint32_t e = 0; e < world.extents_max; ++e) world.extents[e] = e;
  for (std::uint32_t e = 0; e < world.extent_count; ++e) world.frames[e] = e;
  world.chosen = {0, 1, 2, kNoIndex, kNoIndex, kNoIndex, kNoIndex, kNoIndex};
  resolve(world);
  EXPECT_EQ(world.move_count[0], 3u);
  world.chosen = {0, 1, 2, 3, 4, kNoIndex, kNoIndex, kNoIndex};
  resolve(world);
  EXPECT_EQ(world.hit_counts[0], 3u);
  EXPECT_EQ(world.move_count[0], 0u);
  ASSERT_EQ(world.failed_count[0], 2u);
  EXPECT_EQ(world.failed[0].state, FetchState::kNoSlot);
  EXPECT_EQ(world.ranges[3].slot, kNoSlot);
  EXPECT_EQ(world.ranges[4].slot, kNoSlot);
  // Another step may have the slots.
  world.chosen = {3, 4, kNoIndex, kNoIndex, kNoIndex, kNoIndex, kNoIndex, kNoIndex};
  resolve(world);
  EXPECT_EQ(world.move_count[0], 2u);
  EXPECT_EQ(world.failed_count[0], 0u);
}

TEST_F(ResolveGpu, ASharedBlockIsFetchedOnce) {
  std::mt19937 random(1);
  World world;
  world.lists = 4;
  world.k = 3;
  world.fill(random);
  for (std::uint32_t list = 0; list < 4; ++list) {
    for (std::uint32_t e = 0; e < world.extents_max; ++e) {
      world.extents[list * world.extents_max + e] = e;
    }
  }
  for (std::uint32_t e = 0; e < world.extent_count; ++e) world.frames[e] = e;
  world.chosen = {0, 1, 7, 1, 7, kNoIndex, 7, 8, kNoIndex, 0, kNoIndex, kNoIndex};
  resolve(world);
  EXPECT_EQ(world.move_count[0], 4u);
  EXPECT_EQ(world.ranges[2].slot, world.ranges[4].slot);
  EXPECT_EQ(world.ranges[2].slot, world.ranges[6].slot);
  EXPECT_EQ(world.ranges[0].slot, world.ranges[9].slot);
}

TEST_F(ResolveGpu, WhatDidNotArriveLeavesTheMapAndIsReported) {
  std::mt19937 random(1);
  World world;
  world.lists = 1;
  world.k = 4;
  world.fill(random);
  for (std::uint32_t e = 0; e < world.extents_max; ++e) world.extents[e] = e;
  for (std::uint32_t e = 0; e < world.extent_count; ++e) world.frames[e] = e == 1 ? kNoFrame : e;
  world.chosen = {0, 1, 2, 6};
  const Twin twin(*this, world);
  ASSERT_TRUE(resolve_slots(gpu(), twin.params(), stream()).ok());
  const DeviceBuffer states =
      to_device(std::vector<MoveState>{MoveState::kMoved, MoveState::kCorrupt, MoveState::kMoved});
  const PinnedRegion pinned = pinned_bytes(4096);
  auto* report = reinterpret_cast<FetchReport*>(pinned.bytes().data());
  auto* failed = reinterpret_cast<FailedBlock*>(pinned.bytes().data() + 1024);
  ASSERT_TRUE(
      settle_fetch(gpu(), twin.params(), {states.as<MoveState>(), report, failed, 10}, stream())
          .ok());
  twin.back();
  EXPECT_EQ(report->step, 1u);
  EXPECT_EQ(report->hits, 0u);
  EXPECT_EQ(report->misses, 4u);
  EXPECT_EQ(report->fetched, 2u);
  ASSERT_EQ(report->failed, 2u);
  EXPECT_EQ(failed[0].block, 6u);
  EXPECT_EQ(failed[0].state, FetchState::kNotInHost);
  EXPECT_EQ(failed[1].block, 1u);
  EXPECT_EQ(failed[1].state, FetchState::kCorrupt);
  EXPECT_EQ(world.entries[0].generation, world.generations[0]);
  EXPECT_NE(world.entries[0].slot, kNoSlot);
  EXPECT_EQ(world.entries[1].slot, kNoSlot);
  EXPECT_EQ(std::ranges::count(world.residents, 1u), 0);
}

TEST_F(ResolveGpu, NothingFromNothingAndTooManyListsAreRefused) {
  ResolveParams params;
  params.places.blocks_per_extent = 1;
  EXPECT_TRUE(resolve_slots(gpu(), params, stream()).ok());
  params.lists = 1025;
  params.k = 1;
  EXPECT_EQ(resolve_slots(gpu(), params, stream()).code(), StatusCode::kUnsupported);
}

}  // namespace
}  // namespace kvtier
