#include "kernels/attend_merge.cuh"
#include "kernels/attend_plan.h"
#include "kernels/attend_slots.h"
#include "kernels/attend_team.cuh"

#include <algorithm>
#include <array>

// Decoding reads every key and value once and does little with it, so everything here serves the
// reading: a CTA's teams keep their rings of copies full (attend_team.cuh), a list is split until
// the GPU is full (attend_plan.cc), and splits are merged by a second kernel that starts while the
// first one ends (attend_merge.cuh).

namespace kvtier {
namespace {

/// Starts copying the rows of queries of one unit to shared memory; zeros where there are none.
template <typename S>
__device__ void load_queries(const AttendArguments& a, const AttendPlace& place,
                             std::uint32_t shared) {
  constexpr unsigned kElement = sizeof(typename S::Element);
  for (unsigned i = threadIdx.x; i < kAttendRows * S::kKeyPieces; i += kAttendThreads) {
    const unsigned row = i / S::kKeyPieces;
    const unsigned piece = i % S::kKeyPieces;
    const bool present = row < place.rows;
    const std::uint32_t query = (place.first_row + row) / a.group;
    const std::uint32_t head = place.first_head + (place.first_row + row) % a.group;
    const std::byte* from = a.queries;
    if (present) {
      from += place.sequence * a.sequence_stride_bytes + query * a.query_stride_bytes +
              std::size_t{head} * S::kHeadDim * kElement + piece * 16;
    }
    copy_async(shared + row * S::kKeyPitch + piece * 16, from, present);
  }
  commit_copies();
}

__device__ AttendList list_of(const AttendArguments& a, const AttendPlace& place) {
  const std::uint32_t kv_head = place.first_head / a.group;
  const std::uint32_t task = place.sequence * a.head_groups + kv_head / a.heads_per_block;
  const std::uint32_t begin = a.list_offsets[task];
  const std::uint32_t count =
      a.list_counts != nullptr ? a.list_counts[task] : a.list_offsets[task + 1] - begin;
  AttendList list = {
      a.ranges + begin, count, place.split, a.splits, kv_head % a.heads_per_block, {}};
#pragma unroll
  for (unsigned r = 0; r < 2; ++r) {
    const std::uint32_t row = place.first_row + threadIdx.x % kWarpLanes / 4 + 8 * r;
    // One below "no position", so that what is not there is behind every row.
    list.limits[r] = kNoPosition - 1;
    if (a.query_positions != nullptr && row < a.rows) {
      list.limits[r] = a.query_positions[place.sequence * a.query_count + row / a.group];
    }
  }
  return list;
}

template <typename S>
__global__ void __launch_bounds__(kAttendThreads, 2)
    attend_slots_kernel(const __grid_constant__ AttendArguments a) {
  extern __shared__ __align__(128) std::byte shared[];
  wait_for_previous_kernel();
  let_next_kernel_start();
  const AttendPlace place(a, blockIdx.x);
  load_queries<S>(a, place, shared_address(shared));
  const AttendList list = list_of(a, place);
  AttendTeam<S> team(a, list, shared_address(shared));
  team.run();
  __syncthreads();

  std::byte* const ring = shared + S::kQueryBytes;
  TeamMerge<S> merge(ring);
  merge.collect(team);
  const bool whole = a.splits == 1;
  constexpr unsigned kQuads = S::kValueDim / 4;
  for (unsigned i = threadIdx.x; i < place.rows * kQuads; i += kAttendThreads) {
    const unsigned row = i / kQuads;
    const unsigned dim = i % kQuads * 4;
    const auto means = merge.row(row);
    const std::size_t state =
        whole ? place.state(a, row) : place.partial_state(a, place.split, row);
    float* const out = (whole ? a.out : a.partial_out) + state * S::kValueDim + dim;
    *reinterpret_cast<float4*>(out) = merge.mean(means, row, dim);
    if (dim == 0) (whole ? a.lse : a.partial_lse)[state] = means.lse;
  }
}

/// A kernel for one shape, and what launching it takes.
struct AttendKernel {
  DType dtype;
  std::uint32_t head_dim;
  std::uint32_t value_dim;
  bool values_in_keys;
  std::uint32_t teams;
  std::size_t shared_bytes;
  const void* kernel;
};

template <DType kDType, typename Element, unsigned kHeadDim, unsigned kValueDim = kHeadDim,
          bool kInKeys = false>
AttendKernel kernel_entry() {
  // A warp's registers hold the sums of 128 value dims.
  constexpr unsigned kSlices = kValueDim <= 128 ? 1 : kValueDim / 128;
  using S = AttendShape<Element, kHeadDim, kValueDim, kInKeys, kSlices>;
  return {kDType,
          kHeadDim,
          kValueDim,
          kInKeys,
          S::kTeams,
          S::kSharedBytes,
          reinterpret_cast<const void*>(&attend_slots_kernel<S>)};
}

template <DType kDType, typename Element>
std::array<AttendKernel, 6> kernels_of() {
  return {kernel_entry<kDType, Element, 64>(),  kernel_entry<kDType, Element, 80>(),
          kernel_entry<kDType, Element, 96>(),  kernel_entry<kDType, Element, 128>(),
          kernel_entry<kDType, Element, 256>(), kernel_entry<kDType, Element, 576, 512, true>()};
}

Result<AttendKernel> find_kernel(const AttendSlotsParams& params) {
  const KvSlab& slab = params.slab;
  if (params.queries_per_kv_head == 0 || params.queries_per_kv_head > 16 ||
      params.query_count == 0 || params.query_count > 8) {
    return unsupported(
        fmt::format("{} query heads per KV head and {} queries, expected up to 16 and 8",
                    params.queries_per_kv_head, params.query_count));
  }
  for (const auto& kernels :
       {kernels_of<DType::kF16, __half>(), kernels_of<DType::kBF16, __nv_bfloat16>()}) {
    for (const AttendKernel& kernel : kernels) {
      if (kernel.dtype == slab.dtype && kernel.head_dim == slab.head_dim &&
          kernel.value_dim == slab.value_dim && kernel.values_in_keys == slab.values_in_keys) {
        return kernel;
      }
    }
  }
  return unsupported(fmt::format("attention on the GPU over {} with dims {} and {}{}",
                                 to_string(slab.dtype), slab.head_dim, slab.value_dim,
                                 slab.values_in_keys ? " in one row" : ""));
}

void check_params(const AttendSlotsParams& params) {
  const KvSlab& slab = params.slab;
  KVTIER_CHECK(slab.tokens_per_block >= 1 && slab.tokens_per_block <= 64, "{} tokens per block",
               slab.tokens_per_block);
  KVTIER_CHECK(
      slab.block_bytes % 16 == 0 && reinterpret_cast<std::uintptr_t>(slab.blocks) % 16 == 0,
      "blocks of {} bytes are not aligned to 16", slab.block_bytes);
  KVTIER_CHECK(params.sequence_stride % 8 == 0 && params.query_stride % 8 == 0 &&
                   reinterpret_cast<std::uintptr_t>(params.queries) % 16 == 0,
               "rows of queries are not aligned to 16 bytes");
}

AttendArguments arguments_of(const AttendSlotsParams& params, const AttendPlan& plan) {
  const KvSlab& slab = params.slab;
  const std::size_t element = size_of(slab.dtype);
  const std::size_t head_bytes = std::size_t{slab.tokens_per_block} * slab.head_dim * element;
  std::byte* const workspace = params.workspace;
  return {.blocks = slab.blocks,
          .block_bytes = slab.block_bytes,
          .head_bytes = head_bytes,
          // Rows of keys and of values are equally long, or one.
          .values_offset = slab.values_in_keys ? 0 : slab.heads_per_block * head_bytes,
          .queries = static_cast<const std::byte*>(params.queries),
          .sequence_stride_bytes = params.sequence_stride * element,
          .query_stride_bytes = params.query_stride * element,
          .query_positions = params.query_positions,
          .ranges = params.ranges,
          .list_offsets = params.list_offsets,
          .list_counts = params.list_counts,
          .out = params.out,
          .lse = params.lse,
          .partial_lse = reinterpret_cast<float*>(workspace),
          .partial_out = reinterpret_cast<float*>(workspace + plan.partial_out_offset),
          .slots = slab.slots,
          .tokens_per_block = slab.tokens_per_block,
          .heads_per_block = slab.heads_per_block,
          .head_groups = params.head_groups,
          .group = params.queries_per_kv_head,
          .query_count = params.query_count,
          .rows = plan.rows,
          .row_groups = plan.row_groups,
          .splits = plan.splits,
          .scale = params.softmax.scale,
          .logit_cap = params.softmax.logit_cap};
}

}  // namespace

std::size_t attend_slots_workspace_bytes(const Gpu& gpu, const AttendSlotsParams& params) {
  const Result<AttendKernel> kernel = find_kernel(params);
  return kernel.ok() ? plan_attend(gpu.traits(), params, kernel->teams).workspace_bytes : 0;
}

Status attend_slots(const Gpu& gpu, const AttendSlotsParams& params, StreamRef stream) {
  KVTIER_ASSIGN_OR_RETURN(const AttendKernel kernel, find_kernel(params));
  const AttendPlan plan = plan_attend(gpu.traits(), params, kernel.teams);
  if (plan.units == 0) return {};
  check_params(params);
  KVTIER_CHECK(plan.workspace_bytes == 0 || params.workspace != nullptr, "no workspace");
  AttendArguments arguments = arguments_of(params, plan);
  // A kernel may start early from sm_90 on.
  const bool early = gpu.traits().capability >= 90;
  void* pointers[] = {&arguments};
  KVTIER_RETURN_IF_ERROR(gpu.launch({.kernel = kernel.kernel,
                                     .grid = {plan.units * plan.splits, 1, 1},
                                     .threads = kAttendThreads,
                                     .shared_bytes = kernel.shared_bytes,
                                     .arguments = pointers,
                                     .stream = stream.get(),
                                     .early = early},
                                    "attend_slots"));
  if (plan.splits == 1) return {};
  std::uint32_t value_dim = params.slab.value_dim;
  void* merge_pointers[] = {&arguments, &value_dim};
  return gpu.launch({.kernel = reinterpret_cast<const void*>(&merge_splits_kernel),
                     .grid = {plan.units, std::min(plan.rows, kAttendRows), 1},
                     .threads = kAttendThreads,
                     .arguments = merge_pointers,
                     .stream = stream.get(),
                     .early = early},
                    "merging the splits of attend_slots");
}

}  // namespace kvtier
