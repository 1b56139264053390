#include "runtime/device_step.h"

#include "memory/check.h"

#include <utility>

namespace kvtier {

/// Hands out parts of one piece of memory; without memory it only counts, by the same code.
class DeviceStep::Carver {
 public:
  explicit Carver(std::byte* memory) : memory_(memory) {}

  template <typename T>
  void take(T*& target, std::size_t count) {
    constexpr std::size_t kAlignment = 256;
    target = reinterpret_cast<T*>(memory_ == nullptr ? nullptr : memory_ + used_);
    used_ += (count * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
  }
  std::size_t used() const { return used_; }

 private:
  std::byte* memory_;
  std::size_t used_ = 0;
};

namespace {

Status check_shape(const DeviceStepShape& shape) {
  const bool dims = (shape.head_dim == 64 || shape.head_dim == 128) &&
                    shape.value_dim == shape.head_dim && shape.dtype != DType::kF32;
  const bool heads = shape.queries_per_kv_head >= 1 && shape.queries_per_kv_head <= 8;
  const std::uint32_t block = shape.tokens_per_block;
  const bool blocks = block == 1 || block == 4 || block == 8;
  if (!dims || !heads || !blocks) {
    return unsupported(fmt::format(
        "a step on the GPU over {} with dims {} and {}, {} query heads per KV head and {} tokens a "
        "block; expected float16 or bfloat16, dims of 64 or 128, up to 8, and 1, 4 or 8",
        to_string(shape.dtype), shape.head_dim, shape.value_dim, shape.queries_per_kv_head, block));
  }
  if (shape.sinks > DeviceCodes::kRunTokens || shape.sinks % block != 0) {
    return unsupported(fmt::format("{} sinks, expected a multiple of {} up to {}", shape.sinks,
                                   block, DeviceCodes::kRunTokens));
  }
  return {};
}

}  // namespace

ScanParams DeviceStep::scan_of(const DeviceStepShape& shape) {
  ScanParams scan;
  scan.codes = {shape.head_dim, shape.dtype};
  scan.value_dim = shape.value_dim;
  scan.lists = shape.lists();
  scan.lists_per_sequence = shape.kv_heads;
  scan.runs_max = shape.runs_max;
  scan.sinks = shape.sinks;
  scan.tokens_per_cell = shape.tokens_per_block;
  scan.group = shape.queries_per_kv_head;
  scan.softmax = shape.softmax;
  return scan;
}

DeviceStep::DeviceStep(const Gpu& gpu, const DeviceStepShape& shape,
                       const DeviceStepOptions& options, GpuStream near, GpuStream hits,
                       GpuEvent event, DeviceBuffer scratch)
    : gpu_(gpu),
      shape_(shape),
      options_(options),
      near_(std::move(near)),
      hits_(std::move(hits)),
      event_(std::move(event)),
      scratch_(std::move(scratch)),
      scan_(scan_of(shape)) {
  Carver carver(scratch_.data());
  carve(carver);
}

Result<DeviceStep> DeviceStep::make(const Gpu& gpu, const DeviceStepShape& shape,
                                    const DeviceStepOptions& options, StreamRef stream,
                                    const DeviceAllocator& allocator) {
  KVTIER_RETURN_IF_ERROR(check_shape(shape));
  KVTIER_ASSIGN_OR_RETURN(GpuStream near, GpuStream::create(gpu));
  KVTIER_ASSIGN_OR_RETURN(GpuStream hits, GpuStream::create(gpu));
  KVTIER_ASSIGN_OR_RETURN(GpuEvent event, GpuEvent::create(gpu));
  KVTIER_ASSIGN_OR_RETURN(DeviceBuffer nothing, DeviceBuffer::allocate(gpu, 1, stream, allocator));
  DeviceStep step(gpu, shape, options, std::move(near), std::move(hits), std::move(event),
                  std::move(nothing));
  Carver counter(nullptr);
  step.carve(counter);
  KVTIER_ASSIGN_OR_RETURN(DeviceBuffer scratch,
                          DeviceBuffer::allocate(gpu, counter.used(), stream, allocator));
  return DeviceStep(gpu, shape, options, std::move(step.near_), std::move(step.hits_),
                    std::move(step.event_), std::move(scratch));
}

void DeviceStep::carve(Carver& carver) {
  const std::size_t lists = shape_.lists();
  const std::size_t group = shape_.queries_per_kv_head;
  const std::size_t choices = lists * shape_.chosen_max;
  const std::size_t cells = lists * scan_.cells_max();
  const std::size_t runs = lists * shape_.runs_max;
  ScanWeights& weights = scan_.weights;
  carver.take(weights.cells, cells * group);
  carver.take(weights.tops, runs * group);
  carver.take(weights.sums, runs * group);
  carver.take(weights.part_lse2, lists * scan_parts(gpu_, scan_) * group);
  carver.take(weights.lse2, lists * group);
  carver.take(weights.scores, cells);
  carver.take(weights.bins, lists * kScoreBins);
  carver.take(weights.touched, runs);
  carver.take(weights.rest,
              lists * rest_parts(gpu_, scan_) * group * (std::size_t{shape_.value_dim} + 4));
  choose_.k = shape_.chosen_max;
  carver.take(choose_.chosen, choices);
  carver.take(choose_.workspace, choose_cells_workspace_bytes(gpu_, scan_));

  resolve_.lists = shape_.lists();
  resolve_.k = shape_.chosen_max;
  resolve_.tokens_per_block = shape_.tokens_per_block;
  resolve_.chosen = choose_.chosen;
  carver.take(resolve_.ranges, choices);
  carver.take(resolve_.missing, choices);
  for (std::uint32_t** counts : {&resolve_.begins, &resolve_.hit_counts, &resolve_.miss_begins,
                                 &resolve_.miss_counts, &resolve_.all_counts}) {
    carver.take(*counts, lists);
  }
  carver.take(resolve_.moves, choices);
  carver.take(resolve_.move_count, 1);
  carver.take(resolve_.move_seeds, choices);
  carver.take(resolve_.move_sums, choices);
  carver.take(resolve_.moved_blocks, choices);
  carver.take(resolve_.moved_lists, choices);
  carver.take(resolve_.failed, choices);
  carver.take(resolve_.failed_count, 1);
  carver.take(states_, choices);
  for (unsigned part = 0; part < kPartCount; ++part) {
    carver.take(parts_[part].out, shape_.rows() * shape_.value_dim);
    carver.take(parts_[part].lse, shape_.rows());
    if (part == kRest) continue;
    const std::uint32_t ranges = part == kNear ? shape_.near_ranges_max : shape_.chosen_max;
    carver.take(attend_workspaces_[part],
                attend_slots_workspace_bytes(gpu_, attention(Part(part), ranges)));
  }
}

AttendSlotsParams DeviceStep::attention(Part part, std::uint32_t ranges_max) const {
  AttendSlotsParams params;
  params.slab.dtype = shape_.dtype;
  params.slab.head_dim = shape_.head_dim;
  params.slab.value_dim = shape_.value_dim;
  params.slab.tokens_per_block = shape_.tokens_per_block;
  params.softmax = shape_.softmax;
  params.sequences = shape_.sequences;
  params.head_groups = shape_.kv_heads;
  params.queries_per_kv_head = shape_.queries_per_kv_head;
  params.query_stride = std::size_t{shape_.kv_heads} * shape_.queries_per_kv_head * shape_.head_dim;
  params.sequence_stride = params.query_stride;
  params.list_ranges_max = ranges_max;
  params.out = parts_[part].out;
  params.lse = parts_[part].lse;
  params.workspace = attend_workspaces_[part];
  return params;
}

Status DeviceStep::attend(Part part, const DeviceStepTables& tables, StreamRef stream) const {
  AttendSlotsParams params =
      attention(part, part == kNear ? shape_.near_ranges_max : shape_.chosen_max);
  params.slab = tables.slab;
  params.queries = tables.queries;
  if (part == kNear) {
    params.ranges = tables.near_ranges;
    params.list_offsets = tables.near_offsets;
    return attend_slots(gpu_, params, stream);
  }
  params.ranges = resolve_.ranges;
  const bool before = options_.order == FetchOrder::kBefore;
  params.list_offsets = part == kHits ? resolve_.begins : resolve_.miss_begins;
  params.list_counts = part == kMisses ? resolve_.miss_counts
                       : before        ? resolve_.all_counts
                                       : resolve_.hit_counts;
  return attend_slots(gpu_, params, stream);
}

void DeviceStep::check(const DeviceStepTables& tables) const {
  const KvSlab& slab = tables.slab;
  KVTIER_CHECK(slab.dtype == shape_.dtype && slab.head_dim == shape_.head_dim &&
                   slab.value_dim == shape_.value_dim && slab.heads_per_block == 1 &&
                   slab.tokens_per_block == shape_.tokens_per_block && !slab.values_in_keys,
               "a slab of another shape than the step's");
  KVTIER_CHECK(slab.block_bytes == tables.places.block_bytes && slab.slots == tables.map.slots &&
                   tables.slab_bytes.size() >= slab.slots * slab.block_bytes,
               "{} slots of {} bytes, the map has {} and blocks have {}", slab.slots,
               slab.block_bytes, tables.map.slots, tables.places.block_bytes);
  KVTIER_CHECK(!options_.verify || tables.places.seeds != nullptr, "no sums to verify blocks by");
}

Status DeviceStep::enqueue(const DeviceStepTables& tables, StreamRef stream) const {
  check(tables);
  KVTIER_RETURN_IF_ERROR(select(tables, stream));
  return fetch_and_attend(tables, stream);
}

Status DeviceStep::enqueue_selection(const DeviceStepTables& tables, StreamRef stream) const {
  check(tables);
  return select(tables, stream);
}

ScanParams DeviceStep::scan_over(const DeviceStepTables& tables) const {
  ScanParams scan = scan_;
  scan.runs = tables.codes;
  scan.value_means = tables.value_means;
  scan.run_counts = tables.run_counts;
  scan.queries = tables.queries;
  scan.near_lse = parts_[kNear].lse;
  return scan;
}

Status DeviceStep::select(const DeviceStepTables& tables, StreamRef stream) const {
  const ScanParams scan = scan_over(tables);
  KVTIER_RETURN_IF_ERROR(event_.order(stream, near_.ref()));
  KVTIER_RETURN_IF_ERROR(attend(kNear, tables, near_.ref()));
  KVTIER_RETURN_IF_ERROR(scan_codes(gpu_, scan, stream));
  KVTIER_RETURN_IF_ERROR(event_.order(near_.ref(), stream));
  KVTIER_RETURN_IF_ERROR(pool_scan(gpu_, scan, stream));
  return choose_cells(gpu_, scan, choose_, stream);
}

MoveBlocksParams DeviceStep::moves(const DeviceStepTables& tables) const {
  MoveBlocksParams moves;
  moves.source = tables.host;
  moves.target = tables.slab_bytes;
  moves.block_bytes = tables.slab.block_bytes;
  moves.moves = resolve_.moves;
  moves.moves_max = resolve_.lists * resolve_.k;
  moves.move_count = resolve_.move_count;
  moves.check = options_.verify ? MoveCheck::kVerify : MoveCheck::kNone;
  moves.seeds = resolve_.move_seeds;
  moves.sums = resolve_.move_sums;
  moves.states = states_;
  return moves;
}

Status DeviceStep::fetch_and_attend(const DeviceStepTables& tables, StreamRef stream) const {
  ResolveParams resolve = resolve_;
  resolve.map = tables.map;
  resolve.places = tables.places;
  if (!options_.verify) resolve.places.seeds = resolve.places.sums = nullptr;
  const SettleParams settle = {states_, tables.report, tables.failed, tables.failed_max};
  const bool beside = options_.order == FetchOrder::kBeside;
  if (options_.estimate_rest) {
    KVTIER_RETURN_IF_ERROR(event_.order(stream, near_.ref()));
    KVTIER_RETURN_IF_ERROR(estimate_rest(gpu_, scan_over(tables),
                                         {tables.rest_rows, parts_[kRest].out, parts_[kRest].lse},
                                         near_.ref()));
  }
  KVTIER_RETURN_IF_ERROR(resolve_slots(gpu_, resolve, stream));
  if (beside) {
    KVTIER_RETURN_IF_ERROR(event_.order(stream, hits_.ref()));
    KVTIER_RETURN_IF_ERROR(attend(kHits, tables, hits_.ref()));
  }
  // What is waited for stays on one stream, where each kernel can start while the last one ends.
  KVTIER_RETURN_IF_ERROR(move_blocks(gpu_, moves(tables), stream));
  KVTIER_RETURN_IF_ERROR(event_.order(stream, hits_.ref()));
  KVTIER_RETURN_IF_ERROR(attend(beside ? kMisses : kHits, tables, stream));
  KVTIER_RETURN_IF_ERROR(settle_fetch(gpu_, resolve, settle, hits_.ref()));
  KVTIER_RETURN_IF_ERROR(event_.order(near_.ref(), stream));
  KVTIER_RETURN_IF_ERROR(event_.order(hits_.ref(), stream));
  return merge(tables, stream);
}

Status DeviceStep::merge(const DeviceStepTables& tables, StreamRef stream) const {
  MergeStatesParams merged;
  merged.parts[merged.part_count++] = parts_[kNear];
  merged.parts[merged.part_count++] = parts_[kHits];
  if (options_.order == FetchOrder::kBeside) merged.parts[merged.part_count++] = parts_[kMisses];
  if (options_.estimate_rest) merged.parts[merged.part_count++] = parts_[kRest];
  merged.rows = shape_.rows();
  merged.value_dim = shape_.value_dim;
  merged.sink_logits = tables.sink_logits;
  merged.sink_heads = shape_.kv_heads * shape_.queries_per_kv_head;
  merged.out = tables.out;
  merged.out_dtype = tables.out_dtype;
  merged.lse = tables.lse;
  return merge_states(gpu_, merged, stream);
}

}  // namespace kvtier
