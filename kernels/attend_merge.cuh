#pragma once

#include "kernels/attend_team.cuh"

// How the partial sums of one CTA's teams, and of one unit's CTAs, become one result. Splits are
// merged by a second kernel that is launched early: measured on an H100 at a batch of one over 2K
// tokens it costs 2 to 3 us, where counting the CTAs in and merging in the last one costs 5 to 9
// (fence, atomic, and one CTA that reads all), more the more splits there are. Merging inside a
// cluster of CTAs was tried too: it saves the kernel, but eight CTAs a list are too few (11.3 us
// against 9.6), and clusters of four leave multiprocessors empty (batch 8: 40 us against 33).

namespace kvtier {

/// Where one CTA stands in the batch.
struct AttendPlace {
  std::uint32_t unit;
  std::uint32_t split;
  std::uint32_t first_row;  ///< Of the KV head's rows of queries.
  std::uint32_t rows;       ///< Up to 16.
  std::uint32_t sequence;
  std::uint32_t first_head;  ///< Query head of the KV head's first row.

  __device__ AttendPlace(const AttendArguments& a, std::uint32_t cta) {
    const std::uint32_t row_group = cta % a.row_groups;
    split = cta / a.row_groups % a.splits;
    const std::uint32_t head_of_all = cta / a.row_groups / a.splits;
    unit = head_of_all * a.row_groups + row_group;
    first_row = row_group * kAttendRows;
    rows = min(kAttendRows, a.rows - first_row);
    const std::uint32_t heads = a.head_groups * a.heads_per_block;
    sequence = head_of_all / heads;
    first_head = head_of_all % heads * a.group;
  }

  /// Number of a row of this place among all [sequences, queries, query heads].
  __device__ std::size_t state(const AttendArguments& a, std::uint32_t row) const {
    const std::uint32_t query = (first_row + row) / a.group;
    const std::uint32_t heads = a.head_groups * a.heads_per_block * a.group;
    return (std::size_t{sequence} * a.query_count + query) * heads + first_head +
           (first_row + row) % a.group;
  }
  __device__ std::size_t partial_state(const AttendArguments& a, std::uint32_t of_split,
                                       std::uint32_t row) const {
    return (std::size_t{unit} * a.splits + of_split) * kAttendRows + row;
  }
};

__device__ inline float4 add_scaled(float4 sum, float scale, float4 x) {
  return {sum.x + scale * x.x, sum.y + scale * x.y, sum.z + scale * x.z, sum.w + scale * x.w};
}

/// Leaves the sums of a CTA's teams, brought under one maximum, in shared memory, and from there
/// writes the mean and the lse of every row.
template <typename S>
class TeamMerge {
 public:
  static constexpr unsigned kPitch = S::kValueDim + 8;
  static constexpr unsigned kSumBytes = S::kTeams * kAttendRows * kPitch * 4;
  static constexpr unsigned kBytes = kSumBytes + 2 * S::kTeams * kAttendRows * 4;
  static_assert(kBytes <= S::kRingBytes);

  /// `shared` is the ring, which no copy is on its way to any more.
  __device__ explicit TeamMerge(std::byte* shared)
      : sums_(reinterpret_cast<float*>(shared)),
        tops_(reinterpret_cast<float*>(shared + kSumBytes)),
        weights_(tops_ + S::kTeams * kAttendRows) {}

  __device__ void collect(const AttendTeam<S>& team) {
    const unsigned lane = threadIdx.x % kWarpLanes;
    const unsigned number = threadIdx.x / S::kTeamThreads;
    const unsigned slice = threadIdx.x % S::kTeamThreads / kWarpLanes;
    if (slice == 0 && lane % 4 == 0) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        tops_[number * kAttendRows + lane / 4 + 8 * r] = team.top[r];
        weights_[number * kAttendRows + lane / 4 + 8 * r] = team.weight[r];
      }
    }
    float* const rows =
        sums_ + (number * kAttendRows + lane / 4) * kPitch + slice * S::kColumns * 8 + lane % 4 * 2;
#pragma unroll
    for (unsigned c = 0; c < S::kColumns; ++c) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float* const pair = rows + r * 8 * kPitch + c * 8;
        pair[0] = team.sums[c][2 * r];
        pair[1] = team.sums[c][2 * r + 1];
      }
    }
    __syncthreads();
  }

  /// The row's mean over all teams, four values of it; the divisor serves all of a row's calls.
  struct Row {
    float scales[S::kTeams];
    float lse;
  };
  __device__ Row row(std::uint32_t row) const {
    float most = kEmptyLse;
#pragma unroll
    for (unsigned t = 0; t < S::kTeams; ++t) most = fmaxf(most, tops_[t * kAttendRows + row]);
    const float base = most == kEmptyLse ? 0.0f : most;
    Row result;
    float total = 0.0f;
#pragma unroll
    for (unsigned t = 0; t < S::kTeams; ++t) {
      result.scales[t] = exp2f(tops_[t * kAttendRows + row] - base);
      total += result.scales[t] * weights_[t * kAttendRows + row];
    }
    const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
#pragma unroll
    for (float& scale : result.scales) scale *= inverse;
    result.lse = total == 0.0f ? kEmptyLse : (base + log2f(total)) * kLn2;
    return result;
  }
  __device__ float4 mean(const Row& row, std::uint32_t index, std::uint32_t dim) const {
    float4 sum = {};
#pragma unroll
    for (unsigned t = 0; t < S::kTeams; ++t) {
      const float* from = sums_ + (t * kAttendRows + index) * kPitch + dim;
      sum = add_scaled(sum, row.scales[t], *reinterpret_cast<const float4*>(from));
    }
    return sum;
  }

 private:
  float* sums_;
  float* tops_;
  float* weights_;
};

/// Merges the splits of one row, in an order of their own: CTA (unit, row of the unit). The threads
/// are groups that cover a row four values each; a group takes every so many-th split, and keeps
/// kLoads of them on their way, the first of which are asked for before the shares are known.
__global__ void __launch_bounds__(kAttendThreads)
    merge_splits_kernel(const __grid_constant__ AttendArguments a, std::uint32_t value_dim) {
  constexpr unsigned kLoads = 8;
  __shared__ float shares[kMaxSplits];
  __shared__ float4 sums[kAttendThreads];
  wait_for_previous_kernel();
  let_next_kernel_start();
  const AttendPlace place(
      a, blockIdx.x / a.row_groups * a.row_groups * a.splits + blockIdx.x % a.row_groups);
  const std::uint32_t row = blockIdx.y;
  if (row >= place.rows) return;
  const unsigned quads = value_dim / 4;
  const unsigned groups = kAttendThreads / quads;
  const unsigned group = threadIdx.x / quads;
  const unsigned dim = threadIdx.x % quads * 4;
  const bool works = group < groups;
  float4 loaded[kLoads];
  const auto load = [&](std::uint32_t first) {
#pragma unroll
    for (unsigned k = 0; k < kLoads; ++k) {
      const std::uint32_t s = first + k * groups + group;
      loaded[k] = {};
      if (!works || s >= a.splits) continue;
      const float* from = a.partial_out + place.partial_state(a, s, row) * value_dim + dim;
      loaded[k] = *reinterpret_cast<const float4*>(from);
    }
  };
  load(0);
  for (std::uint32_t s = threadIdx.x; s < a.splits; s += kAttendThreads) {
    shares[s] = a.partial_lse[place.partial_state(a, s, row)];
  }
  __syncthreads();
  // Every warp for itself: there are few splits, and a barrier costs more.
  const unsigned lane = threadIdx.x % kWarpLanes;
  float most = kEmptyLse;
  for (std::uint32_t s = lane; s < a.splits; s += kWarpLanes) most = fmaxf(most, shares[s]);
  for (unsigned i = 16; i > 0; i /= 2) most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, i));
  const float base = most == kEmptyLse ? 0.0f : most;
  float total = 0.0f;
  for (std::uint32_t s = lane; s < a.splits; s += kWarpLanes) total += expf(shares[s] - base);
  for (unsigned i = 16; i > 0; i /= 2) total += __shfl_xor_sync(kAllLanes, total, i);
  const float inverse = total == 0.0f ? 0.0f : 1.0f / total;

  float4 sum = {};
  for (std::uint32_t first = 0; first < a.splits; first += kLoads * groups) {
    if (first > 0) load(first);
#pragma unroll
    for (unsigned k = 0; k < kLoads; ++k) {
      const std::uint32_t s = first + k * groups + group;
      if (works && s < a.splits) {
        sum = add_scaled(sum, expf(shares[s] - base) * inverse, loaded[k]);
      }
    }
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  const std::size_t state = place.state(a, row);
  if (threadIdx.x == 0) a.lse[state] = total == 0.0f ? kEmptyLse : base + logf(total);
  if (group > 0) return;
  for (unsigned g = 1; g < groups; ++g) sum = add_scaled(sum, 1.0f, sums[g * quads + threadIdx.x]);
  *reinterpret_cast<float4*>(a.out + state * value_dim + dim) = sum;
}

}  // namespace kvtier
