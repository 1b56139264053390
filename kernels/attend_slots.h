#pragma once

#include "kernels/gpu.h"
#include "kernels/kv_view.h"
#include "memory/dtype.h"
#include "memory/status.h"
#include "memory/stream_ref.h"

#include <cstddef>
#include <cstdint>

namespace kvtier {

/// A slot that no block has: attending it gives NaN. For what could not be had.
inline constexpr std::uint32_t kNoSlot = 0xFFFFFFFFu;

/// Tokens of the block in one slot that are to be attended.
struct SlotRange {
  std::uint32_t slot = kNoSlot;
  /// Position in the sequence of `first_token`; read only where causality may cut the range.
  std::uint32_t position = 0;
  /// Tokens [first_token, first_token + tokens) of the block.
  std::uint16_t first_token = 0;
  std::uint16_t tokens = 0;
};

/// Blocks of one layout in device memory: `[K: heads, tokens, head_dim][V: heads, tokens,
/// value_dim]` from every multiple of `block_bytes`.
struct KvSlab {
  const std::byte* blocks = nullptr;  ///< 16-byte aligned.
  std::uint32_t slots = 0;
  std::size_t block_bytes = 0;  ///< From one slot to the next; a multiple of 16.
  DType dtype = DType::kBF16;
  std::uint32_t head_dim = 0;
  std::uint32_t value_dim = 0;
  /// Values are the first `value_dim` elements of the key rows, and no others are stored (MLA).
  bool values_in_keys = false;
  std::uint32_t heads_per_block = 1;   ///< H
  std::uint32_t tokens_per_block = 8;  ///< 1 to 64.
};

/// Attention of a batch of sequences, each KV head group over its own list of slot ranges.
///
/// `G = query heads per KV head`. A task is one (sequence, head group): number
/// `sequence * head_groups + group`. Log is natural. All pointers are device memory.
struct AttendSlotsParams {
  KvSlab slab;
  SoftmaxOptions softmax;
  std::uint32_t sequences = 0;
  std::uint32_t head_groups = 1;          ///< Of `heads_per_block` KV heads each.
  std::uint32_t queries_per_kv_head = 1;  ///< G, 1 to 16.
  std::uint32_t query_count = 1;          ///< Of one sequence, 1 to 8.

  /// [sequences, queries, head_groups * H * G, head_dim] of the slab's dtype, 16-byte aligned.
  const void* queries = nullptr;
  std::size_t sequence_stride = 0;  ///< Elements from one sequence to the next; of 8.
  std::size_t query_stride = 0;     ///< Elements from one query to the next; of 8.
  /// [sequences, queries]: tokens behind a query's position are masked. None: nothing is masked.
  const std::uint32_t* query_positions = nullptr;

  /// The list of task t is `ranges[list_offsets[t] .. list_offsets[t + 1])`.
  const SlotRange* ranges = nullptr;
  const std::uint32_t* list_offsets = nullptr;  ///< [sequences * head_groups + 1]
  /// [sequences * head_groups]: how many ranges each list has, when lists do not lie one behind the
  /// other. None: up to where the next one begins.
  const std::uint32_t* list_counts = nullptr;
  /// The longest list that can come: what the work is divided for. Longer ones are right, but slow.
  std::uint32_t list_ranges_max = 0;

  /// [sequences, queries, head_groups * H * G, value_dim], contiguous: the mean of the values by
  /// softmax weight, zeros when nothing is attended.
  float* out = nullptr;
  /// [sequences, queries, head_groups * H * G], contiguous: `kEmptyLse` when nothing is attended.
  float* lse = nullptr;

  /// `attend_slots_workspace_bytes` bytes, 256-byte aligned, of any content. Calls that may run at
  /// one time need one each.
  std::byte* workspace = nullptr;
};

/// Bytes that `attend_slots` needs for these shapes on this GPU.
std::size_t attend_slots_workspace_bytes(const Gpu& gpu, const AttendSlotsParams& params);

/// Enqueues the attention: one kernel, and one more where lists are split. Everything that `params`
/// points to stays alive until the stream is past it. Allocates nothing, waits for nothing; may be
/// captured in a graph, with the lists changing between replays.
///
/// A range that names a slot outside the slab, or tokens outside its block, makes the rows of its
/// task NaN, as does NaN in a key or value: what is wrong cannot be overlooked.
///
/// The bits of a result depend on the list, on `list_ranges_max` and the shapes, not on timing.
/// Products are exact and summed in float32; weights are carried in two 16-bit parts.
///
/// `unsupported`: float32; dims other than 64, 80, 96, 128, 256 (values as wide as keys) and
/// 576/512 with `values_in_keys`; more than 16 query heads per KV head or 8 queries.
Status attend_slots(const Gpu& gpu, const AttendSlotsParams& params, StreamRef stream);

}  // namespace kvtier
