#include "kernels/checksum.h"
#include "kernels/move_blocks.h"
#include "kernels/xxh3.cuh"

#include <algorithm>
#include <cstring>

// One warp moves one block after another, in rows of 512 bytes: a 16-byte piece per lane, up to
// kRowsInFlight rows requested before the first is stored, whichever blocks they belong to. So
// blocks of 512 bytes keep as many requests in flight as blocks of 1 MiB, and the warp that meets
// them at one time are neighbours in the list, which is what an address translation cache likes.

namespace kvtier {
namespace {

constexpr unsigned kRowsInFlight = 8;
constexpr unsigned kThreads = 512;
constexpr unsigned kWarps = kThreads / kWarpLanes;

/// CTAs by compute capability and block size. Measured on an H100 (GB/s, gather from random places
/// of 8 GiB with 4, 8, 16, 32, 64, 132 CTAs): 512 B: 17.4 18.4 17.6 24.7 21.4 20.8; 1 KiB: 34.6
/// 35.7 43.8 50.1 50.1 49.8; 2 KiB: 39 50.6 49.9 50.0 50.0 50.5; 4 KiB and more 50.5 throughout.
/// Scatter is best at 16 to 32 and loses 10 % at 132. Fewer CTAs leave more of the GPU to others.
struct MoveTuning {
  int capability;           ///< From this one on.
  std::size_t block_bytes;  ///< Up to this size.
  unsigned ctas;
};
constexpr MoveTuning kTuning[] = {
    {90, 1024, 32}, {90, ~std::size_t{0}, 16}, {0, 1024, 32}, {0, ~std::size_t{0}, 16}};

unsigned ctas_for(int capability, std::size_t block_bytes) {
  const MoveTuning* row = kTuning;
  while (capability < row->capability || block_bytes > row->block_bytes) ++row;
  return row->ctas;
}

struct Arguments {
  const std::byte* source;
  std::byte* target;
  std::uint64_t source_bytes;
  std::uint64_t target_bytes;
  const BlockMove* moves;
  const std::uint32_t* move_count;
  const std::uint64_t* seeds;
  std::uint64_t* sums;
  MoveState* states;
  std::uint32_t moves_max;
  std::uint32_t block_bytes;
  Xxh3Secret secret;
};

/// A row of the stream of rows that one warp moves: its blocks lie `stride` apart in the list.
struct Cursor {
  std::uint32_t move;
  std::uint32_t row;

  __device__ void advance(std::uint32_t rows, std::uint32_t stride) {
    if (++row < rows) return;
    row = 0;
    move += stride;
  }
};

__device__ bool in_range(std::uint64_t offset, std::uint64_t bytes, std::uint64_t region) {
  return offset % 16 == 0 && offset <= region && bytes <= region - offset;
}

/// Past the first-level cache, which has no use for bytes that are read once.
__device__ uint4 load_once(const std::byte* from) {
  uint4 bytes;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(bytes.x), "=r"(bytes.y), "=r"(bytes.z), "=r"(bytes.w)
               : "l"(from));
  return bytes;
}

template <MoveCheck kCheck>
class WarpMover {
 public:
  __device__ WarpMover(const Arguments& a, std::uint32_t warp, std::uint32_t stride)
      : a_(a),
        lane_(threadIdx.x % kWarpLanes),
        stride_(stride),
        pieces_(a.block_bytes / 16),
        rows_((pieces_ + kWarpLanes - 1) / kWarpLanes),
        next_{warp, 0},
        hash_(a.secret, lane_) {}

  __device__ void run(std::uint32_t count) {
    while (next_.move < count) {
      uint4 bytes[kRowsInFlight];
      std::byte* targets[kRowsInFlight];
      Cursor load = next_;
#pragma unroll
      for (unsigned k = 0; k < kRowsInFlight; ++k) {
        targets[k] = request(load, count, bytes[k]);
        load.advance(rows_, stride_);
      }
#pragma unroll
      for (unsigned k = 0; k < kRowsInFlight; ++k) {
        if (next_.move >= count) break;
        place(bytes[k], targets[k]);
        next_.advance(rows_, stride_);
      }
    }
  }

 private:
  /// Requests this lane's piece of a row; returns where it goes, or null for a block that is out
  /// of range. A lane without a piece (the row is the block's last) asks for nothing.
  __device__ std::byte* request(const Cursor& at, std::uint32_t count, uint4& bytes) const {
    bytes = {};
    if (at.move >= count) return nullptr;
    const BlockMove move = a_.moves[at.move];
    if (!in_range(move.source_offset, a_.block_bytes, a_.source_bytes) ||
        !in_range(move.target_offset, a_.block_bytes, a_.target_bytes)) {
      return nullptr;
    }
    const std::uint32_t piece = at.row * kWarpLanes + lane_;
    if (piece < pieces_) {
      bytes = load_once(a_.source + move.source_offset + std::size_t{piece} * 16);
    }
    return a_.target + move.target_offset;
  }

  __device__ void place(uint4 bytes, std::byte* target) {
    const bool last_row = next_.row + 1 == rows_;
    if (target == nullptr) {
      if (last_row) report(MoveState::kOutOfRange);
      return;
    }
    const std::uint32_t piece = next_.row * kWarpLanes + lane_;
    if (piece < pieces_) *reinterpret_cast<uint4*>(target + std::size_t{piece} * 16) = bytes;
    if constexpr (kCheck == MoveCheck::kNone) {
      if (last_row) report(MoveState::kMoved);
    } else {
      if (next_.row == 0) hash_.start(a_.seeds[next_.move]);
      if (piece < pieces_) hash_.add(bytes, next_.row, piece + 4 >= pieces_);
      if (last_row) {
        judge(hash_.finish(a_.block_bytes), target);
      } else if (next_.row % 2 == 1) {
        hash_.end_kib();
      }
    }
  }

  __device__ void judge(std::uint64_t sum, std::byte* target) {
    if constexpr (kCheck == MoveCheck::kCompute) {
      if (lane_ == 0) a_.sums[next_.move] = sum;
    } else if (a_.sums[next_.move] != sum) {
      const uint4 ones = {~0u, ~0u, ~0u, ~0u};
      for (std::uint32_t piece = lane_; piece < pieces_; piece += kWarpLanes) {
        *reinterpret_cast<uint4*>(target + std::size_t{piece} * 16) = ones;
      }
      report(MoveState::kCorrupt);
      return;
    }
    report(MoveState::kMoved);
  }

  __device__ void report(MoveState state) {
    if (lane_ == 0 && a_.states != nullptr) a_.states[next_.move] = state;
  }

  const Arguments& a_;
  unsigned lane_;
  std::uint32_t stride_;
  std::uint32_t pieces_;
  std::uint32_t rows_;
  Cursor next_;
  WarpXxh3 hash_;
};

template <MoveCheck kCheck>
__global__ void __launch_bounds__(kThreads)
    move_blocks_kernel(const __grid_constant__ Arguments arguments) {
  const std::uint32_t count = arguments.move_count == nullptr
                                  ? arguments.moves_max
                                  : min(*arguments.move_count, arguments.moves_max);
  const std::uint32_t warp = blockIdx.x * kWarps + threadIdx.x / kWarpLanes;
  WarpMover<kCheck>(arguments, warp, gridDim.x * kWarps).run(count);
}

const void* kernel_for(MoveCheck check) {
  switch (check) {
    case MoveCheck::kNone: break;
    case MoveCheck::kVerify:
      return reinterpret_cast<const void*>(&move_blocks_kernel<MoveCheck::kVerify>);
    case MoveCheck::kCompute:
      return reinterpret_cast<const void*>(&move_blocks_kernel<MoveCheck::kCompute>);
  }
  return reinterpret_cast<const void*>(&move_blocks_kernel<MoveCheck::kNone>);
}

Status check_shape(const MoveBlocksParams& params) {
  constexpr std::size_t kMostBytes = std::size_t{16} << 20;
  if (params.block_bytes % 16 != 0 || params.block_bytes > kMostBytes) {
    return unsupported(fmt::format("blocks of {} bytes, expected a multiple of 16 up to {}",
                                   params.block_bytes, kMostBytes));
  }
  if (params.check == MoveCheck::kNone) return {};
  if (params.block_bytes < 256 || params.block_bytes % 64 != 0) {
    return unsupported(fmt::format("checked blocks of {} bytes, expected a multiple of 64 from 256",
                                   params.block_bytes));
  }
  KVTIER_CHECK(params.seeds != nullptr && params.sums != nullptr && params.states != nullptr,
               "a check needs seeds, sums and states");
  return {};
}

}  // namespace

const void* any_kernel() { return kernel_for(MoveCheck::kNone); }

Status move_blocks(const Gpu& gpu, const MoveBlocksParams& params, StreamRef stream) {
  KVTIER_RETURN_IF_ERROR(check_shape(params));
  if (params.moves_max == 0 || params.block_bytes == 0) return {};
  Arguments arguments = {.source = params.source.data(),
                         .target = params.target.data(),
                         .source_bytes = params.source.size(),
                         .target_bytes = params.target.size(),
                         .moves = params.moves,
                         .move_count = params.move_count,
                         .seeds = params.seeds,
                         .sums = params.sums,
                         .states = params.states,
                         .moves_max = params.moves_max,
                         .block_bytes = static_cast<std::uint32_t>(params.block_bytes),
                         .secret = {}};
  const auto secret = checksum_secret();
  static_assert(sizeof(arguments.secret) == sizeof(secret));
  std::memcpy(&arguments.secret, secret.data(), sizeof(secret));
  void* pointers[] = {&arguments};
  const unsigned most = (params.moves_max + kWarps - 1) / kWarps;
  const unsigned ctas = std::min(ctas_for(gpu.traits().capability, params.block_bytes), most);
  return gpu.launch({.kernel = kernel_for(params.check),
                     .grid = {ctas, 1, 1},
                     .threads = kThreads,
                     .arguments = pointers,
                     .stream = stream.get()},
                    "move_blocks");
}

}  // namespace kvtier
