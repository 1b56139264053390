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

/// What lane k knows of the k-th row of a batch, read ahead: one latency for all rows of a batch,
/// hidden behind the batch before. `target_offset` is kNowhere for a block out of range.
struct RowAhead {
  std::uint32_t move = 0;
  std::uint32_t row = 0;
  std::uint64_t source_offset = 0;
  std::uint64_t target_offset = 0;
  std::uint64_t seed = 0;
  std::uint64_t sum = 0;
};
constexpr std::uint64_t kNowhere = ~std::uint64_t{0};

template <MoveCheck kCheck>
class WarpMover {
 public:
  __device__ WarpMover(const Arguments& a, std::uint32_t warp, std::uint32_t stride,
                       std::uint32_t count)
      : a_(a),
        lane_(threadIdx.x % kWarpLanes),
        warp_(warp),
        stride_(stride),
        count_(count),
        pieces_(a.block_bytes / 16),
        rows_((pieces_ + kWarpLanes - 1) / kWarpLanes),
        hash_(a.secret, lane_) {}

  __device__ void run() {
    if (warp_ >= count_) return;
    const std::uint64_t all = std::uint64_t{(count_ - warp_ - 1) / stride_ + 1} * rows_;
    look_ahead(0, all);
    for (std::uint64_t first = 0; first < all; first += kRowsInFlight) {
      const RowAhead batch = ahead_;
      uint4 bytes[kRowsInFlight];
#pragma unroll
      for (unsigned k = 0; k < kRowsInFlight; ++k) {
        bytes[k] = first + k < all ? request(batch, k) : uint4{};
      }
      look_ahead(first + kRowsInFlight, all);
#pragma unroll
      for (unsigned k = 0; k < kRowsInFlight; ++k) {
        if (first + k >= all) break;
        place(batch, k, bytes[k]);
      }
    }
  }

 private:
  /// Reads what there is to know of the rows from `first` on, one row a lane.
  __device__ void look_ahead(std::uint64_t first, std::uint64_t all) {
    const std::uint64_t at = first + lane_;
    if (lane_ >= kRowsInFlight || at >= all) return;
    ahead_.move = warp_ + static_cast<std::uint32_t>(at / rows_) * stride_;
    ahead_.row = static_cast<std::uint32_t>(at % rows_);
    const BlockMove move = a_.moves[ahead_.move];
    const bool inside = in_range(move.source_offset, a_.block_bytes, a_.source_bytes) &&
                        in_range(move.target_offset, a_.block_bytes, a_.target_bytes);
    ahead_.source_offset = move.source_offset;
    ahead_.target_offset = inside ? move.target_offset : kNowhere;
    if constexpr (kCheck != MoveCheck::kNone) ahead_.seed = a_.seeds[ahead_.move];
    if constexpr (kCheck == MoveCheck::kVerify) ahead_.sum = a_.sums[ahead_.move];
  }

  template <typename T>
  __device__ static T of_row(T value, unsigned k) {
    return __shfl_sync(kAllLanes, value, k);
  }

  /// Requests this lane's piece of a row. A lane without a piece (the row is the block's last) asks
  /// for nothing, nor does any lane for a block out of range.
  __device__ uint4 request(const RowAhead& batch, unsigned k) const {
    const std::uint64_t source = of_row(batch.source_offset, k);
    const bool inside = of_row(batch.target_offset, k) != kNowhere;
    const std::uint32_t piece = of_row(batch.row, k) * kWarpLanes + lane_;
    if (!inside || piece >= pieces_) return {};
    return load_once(a_.source + source + std::size_t{piece} * 16);
  }

  __device__ void place(const RowAhead& batch, unsigned k, uint4 bytes) {
    const std::uint32_t move = of_row(batch.move, k);
    const std::uint32_t row = of_row(batch.row, k);
    const std::uint64_t offset = of_row(batch.target_offset, k);
    const bool last_row = row + 1 == rows_;
    if (offset == kNowhere) {
      if (last_row) report(move, MoveState::kOutOfRange);
      return;
    }
    std::byte* const target = a_.target + offset;
    const std::uint32_t piece = row * kWarpLanes + lane_;
    if (piece < pieces_) *reinterpret_cast<uint4*>(target + std::size_t{piece} * 16) = bytes;
    if constexpr (kCheck == MoveCheck::kNone) {
      if (last_row) report(move, MoveState::kMoved);
    } else {
      if (row == 0) hash_.start(of_row(batch.seed, k));
      if (piece < pieces_) hash_.add(bytes, row, piece + 4 >= pieces_);
      if (last_row) {
        judge(move, hash_.finish(a_.block_bytes), of_row(batch.sum, k), target);
      } else if (row % 2 == 1) {
        hash_.end_kib();
      }
    }
  }

  __device__ void judge(std::uint32_t move, std::uint64_t sum, std::uint64_t expected,
                        std::byte* target) {
    if constexpr (kCheck == MoveCheck::kCompute) {
      if (lane_ == 0) a_.sums[move] = sum;
    } else if (expected != sum) {
      const uint4 ones = {~0u, ~0u, ~0u, ~0u};
      for (std::uint32_t piece = lane_; piece < pieces_; piece += kWarpLanes) {
        *reinterpret_cast<uint4*>(target + std::size_t{piece} * 16) = ones;
      }
      report(move, MoveState::kCorrupt);
      return;
    }
    report(move, MoveState::kMoved);
  }

  __device__ void report(std::uint32_t move, MoveState state) {
    if (lane_ == 0 && a_.states != nullptr) a_.states[move] = state;
  }

  const Arguments& a_;
  unsigned lane_;
  std::uint32_t warp_;
  std::uint32_t stride_;
  std::uint32_t count_;
  std::uint32_t pieces_;
  std::uint32_t rows_;
  RowAhead ahead_;
  WarpXxh3 hash_;
};

template <MoveCheck kCheck>
__global__ void __launch_bounds__(kThreads)
    move_blocks_kernel(const __grid_constant__ Arguments arguments) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const std::uint32_t count = arguments.move_count == nullptr
                                  ? arguments.moves_max
                                  : min(*arguments.move_count, arguments.moves_max);
  const std::uint32_t warp = blockIdx.x * kWarps + threadIdx.x / kWarpLanes;
  WarpMover<kCheck>(arguments, warp, gridDim.x * kWarps, count).run();
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
                     .stream = stream.get(),
                     .early = gpu.traits().capability >= 90},
                    "move_blocks");
}

}  // namespace kvtier
