#pragma once

#include "kernels/attend_slots.h"

#include <cstddef>
#include <cstdint>

// Private to attend_slots: how a batch is divided over the GPU.

namespace kvtier {

/// Rows of queries that one CTA attends: the height of a tensor core's tile.
inline constexpr std::uint32_t kAttendRows = 16;
/// Tokens that are loaded, scored and summed together.
inline constexpr std::uint32_t kAttendTileTokens = 16;
inline constexpr unsigned kAttendThreads = 128;
inline constexpr std::uint32_t kMaxSplits = 512;

/// A unit is one KV head of one task and up to 16 of its rows of queries; a CTA attends one split
/// of one unit.
struct AttendPlan {
  std::uint32_t rows = 0;        ///< Rows of one KV head: query * G + query head.
  std::uint32_t row_groups = 0;  ///< Of 16 rows.
  std::uint32_t units = 0;
  std::uint32_t splits = 1;
  /// In the workspace: lse [units, splits, 16], and from here on out [units, splits, 16,
  /// value_dim].
  std::size_t partial_out_offset = 0;
  std::size_t workspace_bytes = 0;
};

/// `teams` are the tiles that one CTA works on at a time.
AttendPlan plan_attend(const GpuTraits& gpu, const AttendSlotsParams& params, std::uint32_t teams);

/// What the kernel is launched with.
struct AttendArguments {
  const std::byte* blocks;
  std::uint64_t block_bytes;
  std::uint64_t head_bytes;     ///< Keys of one head in a block.
  std::uint64_t values_offset;  ///< From a key row to its value row.
  const std::byte* queries;
  std::uint64_t sequence_stride_bytes;
  std::uint64_t query_stride_bytes;
  const std::uint32_t* query_positions;
  const SlotRange* ranges;
  const std::uint32_t* list_offsets;
  const std::uint32_t* list_counts;
  float* out;
  float* lse;
  float* partial_lse;
  float* partial_out;
  std::uint32_t slots;
  std::uint32_t tokens_per_block;
  std::uint32_t heads_per_block;
  std::uint32_t head_groups;
  std::uint32_t group;  ///< G
  std::uint32_t query_count;
  std::uint32_t rows;
  std::uint32_t row_groups;
  std::uint32_t splits;
  float scale;      ///< Of q.k, to a logit.
  float logit_cap;  ///< 0 is off.
};

}  // namespace kvtier
