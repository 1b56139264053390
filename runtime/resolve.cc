#include "memory/check.h"
#include "runtime/runtime.h"
#include "runtime/sequence_state.h"

#include <algorithm>
#include <tuple>

// A step whose blocks are attended by somebody else: planned and fetched as ever, then held.

namespace kvtier {

Status Sequence::resolve(const StepRequest& request, ResolvedBlocks* resolved) {
  State& s = *state_;
  Runtime::State& runtime = s.runtime;
  runtime.begin_call();
  if (resolved == nullptr) return invalid_argument("nowhere to put what is resolved");
  *resolved = {};
  KVTIER_RETURN_IF_ERROR(s.check_step(request));
  if (request.selection == QuerySelection::kOwn && request.query_count > 1) {
    return unsupported(fmt::format(
        "{} queries that each select for themselves cannot be resolved at once; let them share a "
        "selection, or resolve one query after its token was appended",
        request.query_count));
  }
  const Duration start = runtime.now();
  runtime.begin_waits();
  ++runtime.steps;
  runtime.look_ahead->begin_step(runtime.steps);
  s.attended.clear();
  s.failures.clear();
  SelectRequest question;
  Status status = s.plan_queries(request, 0, resolved->timing, question);
  s.want_whole_blocks();
  if (status.ok()) status = s.hold_work(resolved->timing);
  resolved->failures = s.failures;
  if (!status.ok()) return status;
  s.hold_after_step(request.layer);
  resolved->timing.look_ahead += s.predict(request.layer);
  s.fill_resolved(resolved);
  resolved->timing.total = runtime.now() - start;
  runtime.end_waits(resolved->timing);
  return {};
}

// Has every block of the work on the device, held once for each of its ranges.
Status Sequence::State::hold_work(StepTiming& timing) {
  const auto items = static_cast<std::uint32_t>(work.size());
  const std::uint32_t hits = put_hits_first();
  const std::uint32_t wanted = count_slots_wanted();
  if (wanted > runtime.map->available()) {
    const std::uint64_t missing = wanted - runtime.map->available();
    return no_space(fmt::format(
        "the selection needs {} bytes of device slots at once, {} more than are not held; give the "
        "device tier as many more, or the step a smaller budget",
        wanted * runtime.layout.block_bytes(), missing * runtime.layout.block_bytes()));
  }
  WaveFetch& fetch = *runtime.waves[0];
  fetch.admit_as(Admission::kUsed);
  take_piece(0, hits, fetch);
  Status status;
  for (std::uint32_t begin = hits; begin < items && status.ok();) {
    const Duration start = runtime.now();
    const std::uint32_t end = plan_wave(begin, hits, items, fetch);
    fetch.begin();
    ++runtime.wave_count;
    const Duration planned = runtime.now();
    timing.resolve += planned - start;
    fetch.finish(failures);
    timing.fetch += runtime.now() - planned;
    if (!failures.empty()) status = {failures.front().code, failures.front().message};
    if (end == begin) status = no_room_for(begin, piece_end(begin, hits));
    begin = end;
  }
  if (!status.ok()) {
    release_wave(0, items);
    return status;
  }
  for (WorkItem& item : work) {
    runtime.resolved_slots.push_back(runtime.map->find(item.block));
    item.held = false;
  }
  return {};
}

// Blocks that are not held yet; two ranges of one block are neighbours.
std::uint32_t Sequence::State::count_slots_wanted() const {
  std::uint32_t wanted = 0;
  BlockId last;
  for (const WorkItem& item : work) {
    if (item.block == last) continue;
    last = item.block;
    const SlotId slot = runtime.map->find(item.block);
    if (slot.is_none() || !runtime.map->is_held(slot)) ++wanted;
  }
  return wanted;
}

void Sequence::State::fill_resolved(ResolvedBlocks* resolved) {
  std::ranges::sort(work, {}, [](const WorkItem& item) {
    return std::tuple(item.head_group, item.index, item.first_token);
  });
  resolved_ranges.clear();
  resolved_begins.assign(1, 0);
  std::uint32_t tokens_of_group = 0;
  for (const WorkItem& item : work) {
    while (resolved_begins.size() <= item.head_group.value) {
      resolved_begins.push_back(static_cast<std::uint32_t>(resolved_ranges.size()));
      tokens_of_group = 0;
    }
    tokens_of_group += item.tokens;
    resolved->tokens_max = std::max(resolved->tokens_max, tokens_of_group);
    resolved_ranges.push_back(
        {.head_group = item.head_group,
         .slot = runtime.map->find(item.block),
         .block = item.index,
         .first_token = item.first_token,
         .tokens = item.tokens,
         .position = runtime.layout.first_token(item.index) + item.first_token});
  }
  resolved_begins.resize(runtime.layout.head_groups() + 1,
                         static_cast<std::uint32_t>(resolved_ranges.size()));
  resolved->slab = runtime.slab.bytes().data();
  resolved->slot_stride_bytes = runtime.layout.block_bytes();
  resolved->ranges = resolved_ranges;
  resolved->group_begins = resolved_begins;
}

SequenceStats Sequence::stats() const {
  const State& s = *state_;
  const Runtime::State& runtime = s.runtime;
  SequenceStats stats;
  for (const Stream& stream : s.streams) {
    const std::uint32_t sealed = stream.tokens / runtime.layout.tokens_per_block();
    const std::uint32_t blocks = sealed + (stream.tail.is_none() ? 0 : 1);
    stats.blocks += blocks;
    for (std::uint32_t i = 0; i < blocks; ++i) {
      const ResidencyState state = runtime.map->state(s.block_id(stream, BlockIndex{i}));
      if (state == ResidencyState::kResident || state == ResidencyState::kOpen) {
        ++stats.blocks_resident;
      }
    }
    for (const ExtentId id : stream.extents) {
      const Extent& extent = runtime.table->row(id);
      const std::uint64_t bytes = runtime.layout.extent_bytes();
      if (!extent.frame.is_none()) stats.host_bytes += bytes;
      if (!extent.place.is_none()) stats.disk_bytes += bytes;
      if (runtime.table->is_shared(id)) stats.shared_bytes += bytes;
    }
  }
  stats.device_bytes = stats.blocks_resident * runtime.layout.block_bytes();
  for (const auto& selector : s.selectors) stats.metadata_bytes += selector->metadata_bytes();
  return stats;
}

}  // namespace kvtier
