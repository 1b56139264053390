#include "kernels/checksum.h"
#include "kernels/move_blocks.h"
#include "tests/kernels/gpu_fixture.h"

#include <algorithm>
#include <numeric>

namespace kvtier {
namespace {

constexpr std::byte kPoison{0xEE};

/// Random distinct places of a region, in 16-byte steps where blocks leave room.
std::vector<std::uint64_t> random_places(std::size_t blocks, std::size_t block_bytes,
                                         std::size_t region, std::mt19937_64& random) {
  const std::size_t pitch = block_bytes + 16;
  std::vector<std::uint64_t> places(region / pitch);
  for (std::size_t i = 0; i < places.size(); ++i) places[i] = i * pitch;
  std::shuffle(places.begin(), places.end(), random);
  places.resize(std::min(blocks, places.size()));
  return places;
}

class MoveBlocksGpu : public GpuTest {
 protected:
  static constexpr std::size_t kRegionBytes = std::size_t{12} << 20;

  struct Case {
    std::vector<BlockMove> moves;
    std::vector<std::uint64_t> seeds;
    std::vector<std::uint64_t> sums;
    std::vector<MoveState> states;
  };

  Case make_case(std::size_t block_bytes, std::size_t blocks, std::span<const std::byte> source) {
    std::mt19937_64 random(block_bytes * 31 + blocks);
    const auto from = random_places(blocks, block_bytes, kRegionBytes, random);
    const auto to = random_places(blocks, block_bytes, kRegionBytes, random);
    Case c;
    for (std::size_t i = 0; i < from.size(); ++i) {
      c.moves.push_back({from[i], to[i]});
      c.seeds.push_back(random());
      c.sums.push_back(seeded_checksum(source.subspan(from[i], block_bytes), c.seeds.back()));
    }
    c.states.assign(from.size(), MoveState::kPending);
    return c;
  }

  /// Runs a case on the GPU and by the reference over copies of the same memory; what both leave
  /// must be equal, byte for byte.
  void expect_same(Case c, MoveBlocksParams params, std::span<std::byte> target_host,
                   const DeviceBuffer* target_device) {
    std::vector<std::byte> expected(kRegionBytes, kPoison);
    Case reference = c;
    MoveBlocksParams plain = params;
    plain.source = source_copy_;
    plain.target = expected;
    attach(plain, reference.moves.data(), reference.seeds.data(), reference.sums.data(),
           reference.states.data(), c.moves.size());
    move_blocks_reference(plain);

    const DeviceBuffer moves = to_device(c.moves);
    const DeviceBuffer seeds = to_device(c.seeds);
    const DeviceBuffer sums = to_device(c.sums);
    const DeviceBuffer states = to_device(c.states);
    attach(params, moves.as<BlockMove>(), seeds.as<std::uint64_t>(), sums.as<std::uint64_t>(),
           states.as<MoveState>(), c.moves.size());
    const Status status = move_blocks(gpu(), params, stream());
    ASSERT_TRUE(status.ok()) << status.to_string();
    wait();
    if (target_device != nullptr) {
      const auto actual = to_host<std::byte>(*target_device);
      ASSERT_TRUE(std::equal(actual.begin(), actual.end(), expected.begin()));
    } else {
      ASSERT_TRUE(std::equal(target_host.begin(), target_host.end(), expected.begin()));
    }
    EXPECT_EQ(to_host<std::uint64_t>(sums), reference.sums);
    EXPECT_EQ(to_host<MoveState>(states), reference.states);
  }

  static void attach(MoveBlocksParams& params, const BlockMove* moves, const std::uint64_t* seeds,
                     std::uint64_t* sums, MoveState* states, std::size_t count) {
    params.moves = moves;
    params.seeds = seeds;
    params.sums = sums;
    params.states = states;
    params.moves_max = static_cast<std::uint32_t>(count);
  }

  void gather(const Case& c, std::size_t block_bytes, MoveCheck check) {
    const DeviceBuffer slab = device_bytes(kRegionBytes);
    ASSERT_TRUE(slab.fill(int(kPoison)).ok());
    MoveBlocksParams params;
    params.source = host_->bytes();
    params.target = {slab.data(), slab.size()};
    params.block_bytes = block_bytes;
    params.check = check;
    expect_same(c, params, {}, &slab);
  }

  void SetUp() override {
    GpuTest::SetUp();
    if (IsSkipped() || HasFatalFailure()) return;
    host_.emplace(pinned_bytes(kRegionBytes));
    fill_random(host_->bytes(), 1);
    source_copy_.assign(host_->bytes().begin(), host_->bytes().end());
  }

  std::optional<PinnedRegion> host_;
  std::vector<std::byte> source_copy_;
};

// Powers of two, the rows of every head dim, a row's end inside a KiB, more rows than are in
// flight.
constexpr std::size_t kSizes[] = {256,  320,  384,  512,  576,  768,   1024,  1088,   1152,   1536,
                                  2048, 2560, 4096, 4160, 9216, 16384, 65536, 262144, 1048576};

TEST_F(MoveBlocksGpu, GathersAndVerifiesEverySizeByteForByte) {
  for (const std::size_t bytes : kSizes) {
    for (const std::size_t blocks : {std::size_t{1}, std::size_t{7}, std::size_t{3000}}) {
      SCOPED_TRACE(fmt::format("{} blocks of {} bytes", blocks, bytes));
      Case c = make_case(bytes, blocks, host_->bytes());
      gather(c, bytes, MoveCheck::kVerify);
      gather(c, bytes, MoveCheck::kNone);
      gather(c, bytes, MoveCheck::kCompute);
      if (HasFatalFailure()) return;
    }
  }
}

TEST_F(MoveBlocksGpu, SizesThatAreOnlyCopied) {
  for (const std::size_t bytes : {std::size_t{16}, std::size_t{48}, std::size_t{528}}) {
    SCOPED_TRACE(bytes);
    gather(make_case(bytes, 500, host_->bytes()), bytes, MoveCheck::kNone);
  }
}

TEST_F(MoveBlocksGpu, ScattersToHostMemoryAndWritesSums) {
  const DeviceBuffer slab = to_device(source_copy_);
  for (const std::size_t bytes : kSizes) {
    SCOPED_TRACE(bytes);
    Case c = make_case(bytes, 2000, source_copy_);
    std::fill(c.sums.begin(), c.sums.end(), 7);
    std::fill(host_->bytes().begin(), host_->bytes().end(), kPoison);
    MoveBlocksParams params;
    params.source = {slab.data(), slab.size()};
    params.target = host_->bytes();
    params.block_bytes = bytes;
    params.check = MoveCheck::kCompute;
    expect_same(c, params, host_->bytes(), nullptr);
    if (HasFatalFailure()) return;
  }
}

TEST_F(MoveBlocksGpu, ADamagedBlockIsReportedAndItsSlotIsNotANumber) {
  for (const std::size_t bytes : {std::size_t{512}, std::size_t{2048}, std::size_t{9216}}) {
    Case c = make_case(bytes, 600, host_->bytes());
    for (std::size_t i = 0; i < c.moves.size(); i += 5) {
      // A flipped bit anywhere, another block's seed, an old sum: all are the wrong block.
      if (i % 3 == 0) {
        const std::size_t at = c.moves[i].source_offset + (i * 37) % bytes;
        host_->bytes()[at] ^= std::byte{0x10};
        source_copy_[at] ^= std::byte{0x10};
      } else if (i % 3 == 1) {
        ++c.seeds[i];
      } else {
        ++c.sums[i];
      }
    }
    SCOPED_TRACE(bytes);
    gather(c, bytes, MoveCheck::kVerify);
  }
}

TEST_F(MoveBlocksGpu, PlacesOutsideARegionAreReportedAndTouchNothing) {
  Case c = make_case(1024, 100, host_->bytes());
  c.moves[3].source_offset = kRegionBytes - 1008;
  c.moves[4].target_offset = kRegionBytes;
  c.moves[5].source_offset = ~std::uint64_t{0} - 15;
  c.moves[50].target_offset += 8;
  c.moves[99].source_offset = std::uint64_t{1} << 40;
  gather(c, 1024, MoveCheck::kVerify);
  gather(c, 1024, MoveCheck::kNone);
}

TEST_F(MoveBlocksGpu, TheCountIsReadOnTheDevice) {
  for (const std::uint32_t count : {0u, 1u, 33u, 100u, 4000u}) {
    Case c = make_case(512, 100, host_->bytes());
    const DeviceBuffer slab = device_bytes(kRegionBytes);
    ASSERT_TRUE(slab.fill(int(kPoison)).ok());
    const DeviceBuffer moves = to_device(c.moves);
    const DeviceBuffer seeds = to_device(c.seeds);
    const DeviceBuffer sums = to_device(c.sums);
    const DeviceBuffer states = to_device(c.states);
    const DeviceBuffer counter = to_device(std::vector<std::uint32_t>{count});
    MoveBlocksParams params{
        .source = host_->bytes(), .target = {slab.data(), slab.size()}, .block_bytes = 512};
    attach(params, moves.as<BlockMove>(), seeds.as<std::uint64_t>(), sums.as<std::uint64_t>(),
           states.as<MoveState>(), 100);
    params.move_count = counter.as<std::uint32_t>();
    params.check = MoveCheck::kVerify;
    ASSERT_TRUE(move_blocks(gpu(), params, stream()).ok());
    const auto written = to_host<MoveState>(states);
    for (std::uint32_t i = 0; i < 100; ++i) {
      ASSERT_EQ(written[i], i < count ? MoveState::kMoved : MoveState::kPending) << i;
    }
  }
}

TEST_F(MoveBlocksGpu, OffsetsReachBeyondFourGiB) {
  const std::size_t bytes = (std::size_t{4} << 30) + 8192;
  Result<DeviceBuffer> large = DeviceBuffer::allocate(gpu(), bytes, stream());
  if (!large.ok()) GTEST_SKIP() << large.status().to_string();
  const std::vector<BlockMove> there = {{0, bytes - 4096}, {4096, bytes - 8192}};
  const std::vector<BlockMove> back = {{bytes - 4096, 65536}, {bytes - 8192, 65536 + 4096}};
  const DeviceBuffer moves_there = to_device(there);
  const DeviceBuffer moves_back = to_device(back);
  MoveBlocksParams params{.source = host_->bytes(),
                          .target = {large->data(), bytes},
                          .block_bytes = 4096,
                          .moves = moves_there.as<BlockMove>(),
                          .moves_max = 2};
  ASSERT_TRUE(move_blocks(gpu(), params, stream()).ok());
  params.source = {large->data(), bytes};
  params.target = host_->bytes();
  params.moves = moves_back.as<BlockMove>();
  ASSERT_TRUE(move_blocks(gpu(), params, stream()).ok());
  wait();
  EXPECT_TRUE(std::equal(source_copy_.begin(), source_copy_.begin() + 8192,
                         host_->bytes().begin() + 65536));
}

TEST_F(MoveBlocksGpu, NothingToMoveIsSuccessAndOddSizesAreRefused) {
  MoveBlocksParams params;
  params.block_bytes = 512;
  EXPECT_TRUE(move_blocks(gpu(), params, stream()).ok());
  params.moves_max = 1;
  params.block_bytes = 24;
  EXPECT_EQ(move_blocks(gpu(), params, stream()).code(), StatusCode::kUnsupported);
  params.block_bytes = 528;
  params.check = MoveCheck::kVerify;
  EXPECT_EQ(move_blocks(gpu(), params, stream()).code(), StatusCode::kUnsupported);
  params.block_bytes = 192;
  EXPECT_EQ(move_blocks(gpu(), params, stream()).code(), StatusCode::kUnsupported);
  wait();
}

}  // namespace
}  // namespace kvtier
