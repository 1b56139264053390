#include "kernels/radix_cut.cuh"
#include "kernels/resolve_tables.cuh"

#include <algorithm>

namespace kvtier {
namespace {

constexpr unsigned kThreads = 1024;
static_assert(kMaxResolveLists <= kThreads);

struct SettleArguments {
  const MoveState* states;
  FetchReport* report;
  FailedBlock* failed_blocks;
  std::uint32_t failed_max;
};

__global__ void __launch_bounds__(kThreads)
    settle_kernel(const __grid_constant__ ResolveArguments a,
                  const __grid_constant__ SettleArguments s) {
  __shared__ std::uint32_t scratch[kThreads / kWarpLanes];
  __shared__ std::uint32_t failed;
  wait_for_previous_kernel();
  let_next_kernel_start();
  const std::uint32_t moves = *a.move_count;
  const std::uint32_t unplaced = *a.failed_count;
  if (threadIdx.x == 0) failed = unplaced;
  for (std::uint32_t i = threadIdx.x; i < min(unplaced, s.failed_max); i += kThreads) {
    s.failed_blocks[i] = a.failed[i];
  }
  __syncthreads();
  for (std::uint32_t i = threadIdx.x; i < moves; i += kThreads) {
    if (s.states[i] == MoveState::kMoved) continue;
    const std::uint32_t block = a.moved_blocks[i];
    const std::uint32_t slot = a.map.entries[block].slot;
    a.map.entries[block].slot = kNoSlot;
    a.map.residents[slot] = kNoBlock;
    a.map.marks[slot] = 0;
    const std::uint32_t place = atomicAdd(&failed, 1u);
    if (place < s.failed_max) {
      s.failed_blocks[place] = {block, a.moved_lists[i], static_cast<FetchState>(s.states[i])};
    }
  }
  std::uint32_t hits;
  std::uint32_t misses;
  const bool is_list = threadIdx.x < a.lists;
  sum_before<kThreads>(is_list ? a.hit_counts[threadIdx.x] : 0, scratch, hits);
  sum_before<kThreads>(is_list ? a.miss_counts[threadIdx.x] : 0, scratch, misses);
  if (threadIdx.x > 0) return;
  *s.report = {a.map.clock->step, hits, misses, moves - (failed - unplaced), failed};
}

}  // namespace

Status settle_fetch(const Gpu& gpu, const ResolveParams& params, const SettleParams& settle,
                    StreamRef stream) {
  KVTIER_RETURN_IF_ERROR(check_resolve(params));
  if (params.lists == 0) return {};
  ResolveArguments arguments = resolve_arguments(params);
  SettleArguments second = {settle.states, settle.report, settle.failed_blocks, settle.failed_max};
  void* pointers[] = {&arguments, &second};
  return gpu.launch({.kernel = reinterpret_cast<const void*>(&settle_kernel),
                     .grid = {1, 1, 1},
                     .threads = kThreads,
                     .arguments = pointers,
                     .stream = stream.get()},
                    "settle_fetch");
}

}  // namespace kvtier
