#pragma once

#include "kernels/attend_slots.h"
#include "kernels/choose_cells.h"
#include "kernels/gpu.h"
#include "kernels/gpu_memory.h"
#include "kernels/merge_states.h"
#include "kernels/move_blocks.h"
#include "kernels/resolve_slots.h"
#include "kernels/scan_codes.h"
#include "memory/status.h"
#include "memory/stream_ref.h"

#include <cstddef>
#include <cstdint>
#include <span>

namespace kvtier {

/// Shapes and bounds of one layer's step; everything that a captured step cannot change.
struct DeviceStepShape {
  std::uint32_t sequences = 1;
  std::uint32_t kv_heads = 8;
  std::uint32_t queries_per_kv_head = 4;  ///< 1 to 8.
  DType dtype = DType::kBF16;             ///< f16 or bf16; of queries, keys and values.
  std::uint32_t head_dim = 128;           ///< 64 or 128, as is value_dim.
  std::uint32_t value_dim = 128;
  std::uint32_t tokens_per_block = 8;  ///< 1, 4 or 8.
  SoftmaxOptions softmax;
  std::uint32_t sinks = 0;       ///< Up to 64 and a multiple of tokens_per_block.
  std::uint32_t runs_max = 0;    ///< The longest context, in runs of 64 tokens.
  std::uint32_t chosen_max = 0;  ///< Far blocks that a KV head attends: up to 4,096.
  /// Ranges of a KV head that are near, at most: sinks, window, and what is not coded yet.
  std::uint32_t near_ranges_max = 0;

  std::uint32_t lists() const { return sequences * kv_heads; }
  std::size_t rows() const { return std::size_t{lists()} * queries_per_kv_head; }
};

/// When what is resident is attended.
enum class FetchOrder : unsigned char {
  kBeside,  ///< While the misses are on their way, on a stream of its own.
  kBefore,  ///< Together with them when they are in: one attention, and nothing to overlap.
};

struct DeviceStepOptions {
  FetchOrder order = FetchOrder::kBeside;
  bool verify = true;         ///< Every fetched block against its sum, inside the gather.
  bool estimate_rest = true;  ///< Attention over what is not chosen, from the scan's weights.
};

/// What a step reads and writes. Device memory, but for what is said to be the host's. Addresses
/// are fixed in a captured step, contents are not.
struct DeviceStepTables {
  KvSlab slab;                      ///< `layout.block_bytes()` from slot to slot.
  std::span<std::byte> slab_bytes;  ///< The same memory, to be written.
  /// Page-locked frames that `places` counts.
  std::span<const std::byte> host;
  BlockPlaces places;
  SlotMap map;

  const std::byte* codes = nullptr;             ///< `code_runs`, as is the next.
  const std::byte* value_means = nullptr;       ///< [lists, runs_max, value_dim]
  const std::uint32_t* run_counts = nullptr;    ///< [sequences]: runs that are coded and not near.
  const SlotRange* near_ranges = nullptr;       ///< Slots that the map holds.
  const std::uint32_t* near_offsets = nullptr;  ///< [lists + 1]

  const void* queries = nullptr;  ///< [sequences, query heads, head_dim], 16-byte aligned.
  /// [sequences, query heads]: 0 where the rest is not estimated; none: everywhere.
  const std::uint8_t* rest_rows = nullptr;
  const float* sink_logits = nullptr;  ///< [query heads]; optional.
  void* out = nullptr;                 ///< [sequences, query heads, value_dim]
  DType out_dtype = DType::kBF16;
  float* lse = nullptr;  ///< [sequences, query heads]; optional.

  /// Page-locked host memory: read it when the step is done, before the next one.
  FetchReport* report = nullptr;
  FailedBlock* failed = nullptr;  ///< [failed_max]
  std::uint32_t failed_max = 0;
};

/// One layer's decode step on the GPU: select, resolve, fetch, attend, merge, as a fixed sequence
/// of launches that asks the CPU nothing.
///
///   main  scan ─► pool ─► choose ─► resolve ─► move misses ─► attend misses ─► merge
///   near  attend near ─┘      └─► estimate the rest ───────────────────────────┘
///   hits                               └─► attend hits ─► (moved) settle ──────┘
///
/// The selector is `scan` (selectors/scan.cc) with 4-bit codes and value groups of 64 tokens; what
/// is near ends where a run ends, so up to 63 tokens more than the window are attended exactly.
///
/// Fails closed: a block that cannot be had (its extent is not in host memory, its sum is wrong, no
/// slot is left) makes the rows of its KV head NaN and is named in the report, which is complete
/// when the stream has passed the step; the next step asks for it again. So does anything that is
/// not a number on the way.
///
/// Owns its scratch memory, two streams and the events between them; move-only. One step at a time:
/// a second `enqueue` goes on the same stream, or waits for the first. Not thread-safe.
class DeviceStep {
 public:
  /// `unsupported` for shapes that the kernels do not take, `no_space` without memory. Allocates on
  /// `stream`, which outlives the step.
  static Result<DeviceStep> make(const Gpu& gpu, const DeviceStepShape& shape,
                                 const DeviceStepOptions& options, StreamRef stream,
                                 const DeviceAllocator& allocator = {});

  /// Enqueues the whole step on `stream`, other streams included; may be captured (gpu_memory.h).
  /// Allocates nothing and waits for nothing. After an error parts of the step may still run, and
  /// its output is not to be used.
  Status enqueue(const DeviceStepTables& tables, StreamRef stream) const;
  /// Its first part alone: near attention, scan and choice.
  Status enqueue_selection(const DeviceStepTables& tables, StreamRef stream) const;

  const DeviceStepShape& shape() const { return shape_; }
  std::size_t scratch_bytes() const { return scratch_.size(); }
  /// [lists, chosen_max]: blocks that the last step chose, ascending; for look-ahead and tests.
  const std::uint32_t* chosen() const { return resolve_.chosen; }
  /// [lists, blocks]: scores of the last step, negative for the chosen ones.
  const float* scores() const { return scan_.weights.scores; }
  /// Bytes that selecting reads at least: codes and scales of `runs` runs in every list.
  std::size_t selection_bytes(std::size_t runs) const {
    return shape_.lists() * runs * scan_.codes.run_bytes();
  }

 private:
  class Carver;
  enum Part : unsigned { kNear, kHits, kMisses, kRest, kPartCount };
  static_assert(kPartCount == kMaxMergeParts);

  DeviceStep(const Gpu& gpu, const DeviceStepShape& shape, const DeviceStepOptions& options,
             GpuStream near, GpuStream hits, GpuEvent event, DeviceBuffer scratch);
  ScanParams scan_over(const DeviceStepTables& tables) const;
  static ScanParams scan_of(const DeviceStepShape& shape);
  void carve(Carver& carver);
  AttendSlotsParams attention(Part part, std::uint32_t ranges_max) const;
  MoveBlocksParams moves(const DeviceStepTables& tables) const;
  Status attend(Part part, const DeviceStepTables& tables, StreamRef stream) const;
  Status select(const DeviceStepTables& tables, StreamRef stream) const;
  void check(const DeviceStepTables& tables) const;
  Status fetch_and_attend(const DeviceStepTables& tables, StreamRef stream) const;
  Status merge(const DeviceStepTables& tables, StreamRef stream) const;

  Gpu gpu_;
  DeviceStepShape shape_;
  DeviceStepOptions options_;
  GpuStream near_;
  GpuStream hits_;
  GpuEvent event_;
  DeviceBuffer scratch_;
  // Pointers into scratch_; what the tables name is filled in by each step.
  ScanParams scan_;
  ChooseCellsParams choose_;
  ResolveParams resolve_;
  MoveState* states_ = nullptr;
  StatesView parts_[kPartCount];
  std::byte* attend_workspaces_[kPartCount] = {};
};

}  // namespace kvtier
