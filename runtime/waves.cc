#include "memory/check.h"
#include "runtime/sequence_state.h"

#include <algorithm>
#include <limits>

namespace kvtier {
namespace {

/// Blocks of one wave of a stream: more would make nothing faster.
constexpr std::uint32_t kStreamBlocksMax = 1024;
/// Floats of partial results that are made before they are merged.
constexpr std::size_t kPartialFloatsMax = std::size_t{4} << 20;

}  // namespace

// --- Waves: what fits on the device at once is fetched, attended, let go.

Status Sequence::State::run_waves(const StepRequest& request, StepTiming& timing) {
  const std::size_t rows = std::size_t{request.query_count} * runtime.options.query_heads;
  std::fill_n(request.out, rows * runtime.layout.value_dim(), 0.0f);
  std::fill_n(request.lse, rows, kEmptyLse);
  const Duration resolve_start = runtime.now();
  const auto items = static_cast<std::uint32_t>(work.size());
  const std::uint32_t hits = runtime.options.deterministic ? 0 : put_hits_first();
  const std::uint32_t slots_max = wave_slots_max();
  timing.resolve += runtime.now() - resolve_start;
  const auto plan_and_begin = [&](std::uint32_t first, WaveFetch& fetch) {
    const Duration start = runtime.now();
    fetch.admit_as(admission());
    const std::uint32_t last = plan_wave(first, hits, slots_max, fetch);
    fetch.begin();
    timing.resolve += runtime.now() - start;
    return last;
  };

  Status status;
  int turn = 0;
  std::uint32_t begin = 0;
  std::uint32_t end = plan_and_begin(0, *runtime.waves[0]);
  while (begin < items) {
    if (end == begin) {
      fail_outputs(request);
      return no_room_for(begin, piece_end(begin, hits));
    }
    ++runtime.wave_count;
    const Duration fetch_start = runtime.now();
    runtime.waves[static_cast<std::size_t>(turn)]->finish(failures);
    timing.fetch += runtime.now() - fetch_start;
    runtime.record(Track::kFetch, "wait", fetch_start, runtime.now(), 0);
    if (!failures.empty()) {
      release_wave(begin, end);
      fail_outputs(request);
      return {failures.front().code, failures.front().message};
    }
    turn = 1 - turn;
    WaveFetch& next = *runtime.waves[static_cast<std::size_t>(turn)];
    std::uint32_t next_end = plan_and_begin(end, next);
    if (status.ok()) status = attend_wave(request, begin, end, timing);
    release_wave(begin, end);
    if (next_end == end && end < items) {
      // Nothing fitted beside the wave that has just ended.
      next_end = plan_and_begin(end, next);
    }
    begin = end;
    end = next_end;
  }
  if (!status.ok()) {
    fail_outputs(request);
    return status;
  }
  return {};
}

// What is only measured, or passes through, must not push out what is used.
Admission Sequence::State::admission() const {
  switch (purpose) {
    case Purpose::kStep: break;
    case Purpose::kMeasure: return Admission::kPredicted;
    case Purpose::kExact: return Admission::kStreamed;
  }
  return Admission::kUsed;
}

// When not everything fits, half of the slots hold what is attended and half what arrives. Of a
// stream these are a share of the slots together, so that it leaves the others to steps.
std::uint32_t Sequence::State::wave_slots_max() const {
  const std::uint32_t available = runtime.map->available();
  if (purpose == Purpose::kExact) {
    return std::clamp(available / (2 * kPredictedShare), 1u, kStreamBlocksMax);
  }
  return work.size() <= available ? available : available / 2;
}

// Of the items that must be attended together.
Status Sequence::State::no_room_for(std::uint32_t begin, std::uint32_t end) const {
  return no_space(fmt::format(
      "{} blocks are attended at once and need {} bytes of device slots, where {} are not held, "
      "and "
      "as many extents of {} bytes in host frames, where {} frames can be had; give the tiers more "
      "capacity",
      end - begin, (end - begin) * runtime.layout.block_bytes(),
      runtime.map->available() * runtime.layout.block_bytes(), runtime.layout.extent_bytes(),
      runtime.table->frames_available()));
}

// Resident blocks come first: they are attended while the others are on their way.
std::uint32_t Sequence::State::put_hits_first() {
  work_missing.clear();
  std::size_t hits = 0;
  for (const WorkItem& item : work) {
    if (is_ready(item)) {
      work[hits++] = item;
    } else {
      work_missing.push_back(item);
    }
  }
  std::ranges::copy(work_missing, work.begin() + static_cast<std::ptrdiff_t>(hits));
  return static_cast<std::uint32_t>(hits);
}

// Items that must be attended in one wave: all hits; one missing block; or, where results must not
// depend on residency, one chunk of fixed size.
std::uint32_t Sequence::State::piece_end(std::uint32_t begin, std::uint32_t hits) const {
  const auto items = static_cast<std::uint32_t>(work.size());
  if (begin < hits) return hits;
  if (!runtime.options.deterministic) return begin + 1;
  std::uint32_t group_begin = begin;
  while (group_begin > 0 && work[group_begin - 1].head_group == work[begin].head_group) {
    --group_begin;
  }
  const std::uint32_t chunk = runtime.blocks_per_chunk();
  std::uint32_t end = begin + chunk - (begin - group_begin) % chunk;
  end = std::min(end, items);
  while (work[end - 1].head_group != work[begin].head_group) --end;
  return end;
}

// Takes as many pieces as fit beside what is held already; returns where the wave ends.
std::uint32_t Sequence::State::plan_wave(std::uint32_t begin, std::uint32_t hits,
                                         std::uint32_t slots_max, WaveFetch& fetch) {
  const Duration start = runtime.now();
  const auto items = static_cast<std::uint32_t>(work.size());
  std::uint32_t end = begin;
  while (end < items) {
    const std::uint32_t stop = piece_end(end, hits);
    const bool first = end == begin;
    // Hits make a wave of their own, so that they can be attended before anything has arrived.
    if (!first && (end == hits || stop - begin > slots_max)) break;
    if (!first && purpose == Purpose::kExact && fetch.reads() >= stream_reads_max()) break;
    if (stop > hits && !piece_fits(end, stop, fetch)) break;
    take_piece(end, stop, fetch);
    end = stop;
  }
  runtime.record(Track::kResolve, "resolve", start, runtime.now(), 0);
  return end;
}

// Extents that a wave of a stream reads from disk.
std::uint32_t Sequence::State::stream_reads_max() const {
  return std::max(1u, runtime.table->frames() / (2 * kPredictedShare));
}

bool Sequence::State::piece_fits(std::uint32_t begin, std::uint32_t end,
                                 const WaveFetch& fetch) const {
  std::uint32_t slots = 0;
  ExtentId last;
  std::uint32_t frames = 0;
  for (std::uint32_t i = begin; i < end; ++i) {
    const SlotId slot = runtime.map->find(work[i].block);
    if (slot.is_none() || !runtime.map->is_held(slot)) ++slots;
    if (is_ready(work[i])) continue;
    const ExtentId extent = runtime.layout.extent_of(work[i].block);
    if (extent == last) continue;
    last = extent;
    if (!fetch.has_frame_for(extent, frames)) return false;
    ++frames;
  }
  return slots <= runtime.map->available();
}

// Holds what is resident, then reserves slots for what is not: in this order, so that no block of
// the piece is the victim of another. A block can stand in a piece twice, with two ranges, which
// want the same of it. Where only keys are missing the block's slot takes them.
void Sequence::State::take_piece(std::uint32_t begin, std::uint32_t end, WaveFetch& fetch) {
  for (WorkItem& item : std::span(work).subspan(begin, end - begin)) {
    const SlotId slot = runtime.map->find(item.block);
    if (slot.is_none()) continue;
    if (purpose == Purpose::kStep && is_ready(item)) {
      if (runtime.map->is_held(slot)) {
        ++runtime.held_hits;
      } else {
        ++runtime.hits[static_cast<std::size_t>(Tier::kDevice)];
      }
      runtime.map->touch(slot);
    }
    runtime.map->hold(slot);
    item.held = true;
  }
  for (WorkItem& item : std::span(work).subspan(begin, end - begin)) {
    const SlotId present = runtime.map->find(item.block);
    if (!present.is_none() && !item.held) runtime.map->hold(present);
    item.held = true;
    if (!present.is_none() && (is_ready(item) || fetch.ends_with(item.block))) continue;
    Miss miss{item.block, present, BlockPart::kKeys};
    if (present.is_none()) {
      miss.part = item.kept_keys ? BlockPart::kValues : BlockPart::kWhole;
      const std::optional<SlotId> slot = runtime.map->reserve(item.block, miss.part);
      KVTIER_CHECK(slot.has_value(), "a slot was available and none is there");
      miss.slot = *slot;
    }
    const std::uint32_t reads = fetch.reads();
    const Tier tier = fetch.add(miss);
    if (purpose != Purpose::kStep) continue;
    ++runtime.hits[static_cast<std::size_t>(tier)];
    const ExtentId extent = runtime.layout.extent_of(item.block);
    runtime.look_ahead->note_miss(extent);
    // Blocks of one extent are one read.
    if (tier == Tier::kDisk && fetch.reads() > reads) runtime.look_ahead->note_demand(extent);
  }
}

void Sequence::State::release_wave(std::uint32_t begin, std::uint32_t end) {
  for (WorkItem& item : std::span(work).subspan(begin, end - begin)) {
    // A block that could not be had has no slot any more.
    const SlotId slot = runtime.map->find(item.block);
    if (item.held && !slot.is_none()) runtime.map->unhold(slot);
    item.held = false;
  }
}

// --- Attending.

Status Sequence::State::attend_wave(const StepRequest& request, std::uint32_t begin,
                                    std::uint32_t end, StepTiming& timing) {
  const Duration start = runtime.now();
  const std::uint32_t heads = runtime.heads_per_group();
  const std::size_t state_rows = std::size_t{request.query_count} * heads;
  const std::uint32_t value_dim = runtime.layout.value_dim();
  ranges.clear();
  tasks.clear();
  task_groups.clear();
  for (std::uint32_t i = begin; i < end; ++i) {
    const WorkItem& item = work[i];
    ranges.push_back({.block = runtime.map->address(runtime.map->find(item.block)),
                      .first_token = item.first_token,
                      .tokens = item.tokens,
                      .position = runtime.layout.first_token(item.index) + item.first_token});
  }
  read_kept_keys(request.layer, begin, end);
  for (std::uint32_t first = begin; first < end;) {
    std::uint32_t last = first + 1;
    if (runtime.options.deterministic) {
      last = std::min(piece_end(first, 0), end);
    } else {
      while (last < end && work[last].head_group == work[first].head_group) ++last;
    }
    AttentionTask task;
    task.blocks = std::span<const BlockRange>(ranges).subspan(first - begin, last - first);
    tasks.push_back(task);
    task_groups.push_back(work[first].head_group);
    first = last;
  }
  const std::size_t together = std::clamp<std::size_t>(kPartialFloatsMax / (state_rows * value_dim),
                                                       1, std::max<std::size_t>(1, tasks.size()));
  if (partial_lse.size() < together * state_rows) {
    partial_lse.resize(together * state_rows);
    partial_out.resize(together * state_rows * value_dim);
  }
  timing.attend += runtime.now() - start;
  for (std::size_t first = 0; first < tasks.size(); first += together) {
    KVTIER_RETURN_IF_ERROR(
        attend_tasks(request, first, std::min(together, tasks.size() - first), timing));
  }
  runtime.record(Track::kAttend, "attend", start, runtime.now(),
                 (end - begin) * runtime.layout.block_bytes());
  return {};
}

// Attends tasks [first, first + count) and merges what they give, in their order.
Status Sequence::State::attend_tasks(const StepRequest& request, std::size_t first,
                                     std::size_t count, StepTiming& timing) {
  const Duration start = runtime.now();
  const std::uint32_t heads = runtime.heads_per_group();
  const std::size_t state_rows = std::size_t{request.query_count} * heads;
  const std::uint32_t value_dim = runtime.layout.value_dim();
  const std::size_t head_dim = runtime.layout.head_dim();
  const std::span<AttentionTask> some = std::span(tasks).subspan(first, count);
  for (std::size_t i = 0; i < count; ++i) {
    AttentionTask& task = some[i];
    task.queries = request.queries + task_groups[first + i].value * heads * head_dim;
    task.query_stride = runtime.options.query_heads * head_dim;
    task.query_count = request.query_count;
    if (request.query_count > 1) task.query_positions = query_positions;
    task.out = partial_out.data() + i * state_rows * value_dim;
    task.out_stride = std::size_t{heads} * value_dim;
    task.lse = partial_lse.data() + i * state_rows;
    task.lse_stride = heads;
  }
  const AttentionParams params{
      .layout = &runtime.layout,
      .queries_per_kv_head = runtime.options.query_heads / runtime.options.block.kv_heads,
      .softmax = runtime.options.softmax};
  KVTIER_RETURN_IF_ERROR(runtime.environment.device->attend(params, some));
  const Duration attended_at = runtime.now();
  timing.attend += attended_at - start;
  for (std::size_t i = 0; i < count; ++i) merge_task(request, some[i], task_groups[first + i]);
  timing.merge += runtime.now() - attended_at;
  runtime.record(Track::kMerge, "merge", attended_at, runtime.now(), 0);
  return {};
}

void Sequence::State::merge_task(const StepRequest& request, const AttentionTask& task,
                                 HeadGroup group) {
  const std::uint32_t heads = runtime.heads_per_group();
  const std::uint32_t value_dim = runtime.layout.value_dim();
  for (std::uint32_t query = 0; query < request.query_count; ++query) {
    const std::size_t row =
        std::size_t{query} * runtime.options.query_heads + std::size_t{group.value} * heads;
    merge_states({request.out + row * value_dim, request.lse + row},
                 {task.out + query * task.out_stride, task.lse + query * task.lse_stride}, heads,
                 value_dim);
  }
}

void Sequence::State::finish_outputs(const StepRequest& request) {
  if (runtime.options.sink_logits.empty()) return;
  const std::uint32_t heads = runtime.options.query_heads;
  const std::span<const float> logits =
      std::span<const float>(runtime.options.sink_logits)
          .subspan(std::size_t{request.layer.value} * heads, heads);
  for (std::uint32_t query = 0; query < request.query_count; ++query) {
    const std::size_t row = std::size_t{query} * heads;
    apply_sink_logits({request.out + row * runtime.layout.value_dim(), request.lse + row}, logits,
                      runtime.layout.value_dim());
  }
}

// What is not right must not be usable by accident.
void Sequence::State::fail_outputs(const StepRequest& request) {
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  const std::size_t rows = std::size_t{request.query_count} * runtime.options.query_heads;
  if (request.out != nullptr) std::fill_n(request.out, rows * runtime.layout.value_dim(), kNan);
  if (request.lse != nullptr) std::fill_n(request.lse, rows, kNan);
}

}  // namespace kvtier
