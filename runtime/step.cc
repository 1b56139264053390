#include "memory/check.h"
#include "runtime/runtime.h"
#include "runtime/sequence_state.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace kvtier {

// --- The step as a whole.

Status Sequence::step(const StepRequest& request, StepReport* report) {
  State& s = *state_;
  Runtime::State& runtime = s.runtime;
  KVTIER_RETURN_IF_ERROR(s.check_step(request));
  StepTiming timing;
  const Duration start = runtime.now();
  runtime.counters.waits = 0;
  ++runtime.steps;
  runtime.look_ahead->begin_step(runtime.steps);

  const std::uint32_t tokens = s.tokens[request.layer.value];
  Selector& selector = *s.selectors[request.layer.value];
  KVTIER_RETURN_IF_ERROR(selector.select(
      {.queries = request.queries,
       .query_stride = std::size_t{runtime.options.query_heads} * runtime.layout.head_dim(),
       .query_count = request.query_count,
       .first_position = tokens - request.query_count,
       .budget_tokens = request.budget_tokens,
       .band_tokens = runtime.look_ahead->enabled() ? request.budget_tokens : 0},
      s.selections, runtime.environment.device->workers()));
  const Duration selected = runtime.now();
  timing.select = selected - start;
  runtime.record(Track::kSelect, "select", start, selected, 0);

  s.plan_work(request);
  const Status status = s.run_waves(request, timing);
  if (status.ok()) {
    const Duration before = runtime.now();
    s.hold_after_step(request.layer);
    s.predict(request.layer);
    timing.look_ahead = runtime.now() - before;
    runtime.record(Track::kLookAhead, "look_ahead", before, runtime.now(), 0);
  }

  std::uint64_t metadata = 0;
  for (const auto& each : s.selectors) metadata += each->metadata_bytes();
  runtime.metadata_bytes_peak = std::max(runtime.metadata_bytes_peak, metadata);
  timing.total = runtime.now() - start;
  timing.waits = runtime.counters.waits;
  s.fill_report(timing, report);
  return status;
}

Status Sequence::State::check_step(const StepRequest& request) const {
  KVTIER_CHECK(!closed && request.layer.value < runtime.options.layers, "layer {} of {}",
               request.layer.value, runtime.options.layers);
  const std::uint32_t present = tokens[request.layer.value];
  if (request.query_count == 0 || request.query_count > kMaxStepQueries ||
      request.query_count > present) {
    return invalid_argument(fmt::format("{} queries in one step over {} tokens, expected 1 to {}",
                                        request.query_count, present,
                                        std::min(present, kMaxStepQueries)));
  }
  return {};
}

void Sequence::State::fill_report(const StepTiming& timing, StepReport* report) const {
  if (report == nullptr) return;
  *report = {};
  report->attended = attended;
  report->failures = failures;
  report->timing = timing;
  std::uint32_t in_group = 0;
  HeadGroup group{0};
  for (const AttendedRange& range : attended) {
    if (range.head_group != group) in_group = 0;
    group = range.head_group;
    in_group += range.tokens;
    report->attended_tokens_total += range.tokens;
    report->attended_tokens_max = std::max(report->attended_tokens_max, in_group);
  }
}

// --- Planning: which tokens of which blocks.

void Sequence::State::plan_work(const StepRequest& request) {
  const Duration start = runtime.now();
  const std::uint32_t first_position = tokens[request.layer.value] - request.query_count;
  const std::uint32_t window_begin =
      first_position + 1 > runtime.options.window ? first_position + 1 - runtime.options.window : 0;
  work.clear();
  for (Stream& stream : streams_of(request.layer)) {
    append_group_work(stream, selections[stream.head_group.value], window_begin);
  }
  attended.clear();
  for (const WorkItem& item : work) {
    attended.push_back({item.head_group, item.index, item.first_token, item.tokens});
  }
  query_positions.clear();
  for (std::uint32_t query = 0; query < request.query_count; ++query) {
    query_positions.push_back(first_position + query);
  }
  runtime.record(Track::kResolve, "plan", start, runtime.now(), 0);
}

// Sinks, selected units and window of one head group, in order of position; ranges of one block that
// touch become one.
void Sequence::State::append_group_work(Stream& stream, const GroupSelection& selection,
                                        std::uint32_t window_begin) {
  const std::uint32_t tokens_per_block = runtime.layout.tokens_per_block();
  const std::size_t first = work.size();
  const auto add_tokens = [&](std::uint32_t begin, std::uint32_t end) {
    while (begin < end) {
      const BlockIndex index{begin / tokens_per_block};
      const std::uint32_t stop = std::min(end, (index.value + 1) * tokens_per_block);
      work.push_back({block_id(stream, index), stream.head_group, index, begin % tokens_per_block,
                      stop - begin});
      begin = stop;
    }
  };
  const std::uint32_t sinks = std::min(runtime.options.sinks, stream.tokens);
  add_tokens(0, sinks);
  for (std::uint32_t i = 0; i < selection.chosen; ++i) {
    const SelectedUnit& unit = selection.ranked[i];
    const std::uint32_t begin = runtime.layout.first_token(unit.block) + unit.first_token;
    add_tokens(begin, begin + unit.tokens);
  }
  add_tokens(std::max(sinks, window_begin), stream.tokens);
  std::sort(work.begin() + static_cast<std::ptrdiff_t>(first), work.end(),
            [](const WorkItem& a, const WorkItem& b) {
              return std::pair(a.index, a.first_token) < std::pair(b.index, b.first_token);
            });
  std::size_t last = first;
  for (std::size_t i = first + 1; i < work.size(); ++i) {
    WorkItem& previous = work[last];
    if (work[i].index == previous.index &&
        work[i].first_token == previous.first_token + previous.tokens) {
      previous.tokens += work[i].tokens;
    } else {
      work[++last] = work[i];
    }
  }
  if (work.size() > first) work.resize(last + 1);
}

// --- Waves: what fits on the device at once is fetched, attended, let go.

Status Sequence::State::run_waves(const StepRequest& request, StepTiming& timing) {
  const std::size_t rows = std::size_t{request.query_count} * runtime.options.query_heads;
  std::fill_n(request.out, rows * runtime.layout.value_dim(), 0.0f);
  std::fill_n(request.lse, rows, kEmptyLse);
  failures.clear();
  const Duration resolve_start = runtime.now();
  const auto items = static_cast<std::uint32_t>(work.size());
  const std::uint32_t hits = runtime.options.deterministic ? 0 : put_hits_first();
  // When not everything fits, half of the slots hold what is attended and half what arrives.
  const std::uint32_t available = runtime.map->available();
  const std::uint32_t slots_max = items <= available ? available : available / 2;
  timing.resolve += runtime.now() - resolve_start;

  Status status;
  int turn = 0;
  std::uint32_t begin = 0;
  std::uint32_t end = plan_wave(0, hits, slots_max, *runtime.waves[0]);
  runtime.waves[0]->begin();
  while (begin < items) {
    if (end == begin) return no_space("no device slot or host frame is left for a step's blocks");
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
    std::uint32_t next_end = plan_wave(end, hits, slots_max, next);
    next.begin();
    if (status.ok()) status = attend_wave(request, begin, end, timing);
    release_wave(begin, end);
    if (next_end == end && end < items) {
      // Nothing fitted beside the wave that has just ended.
      next_end = plan_wave(end, hits, slots_max, next);
      next.begin();
    }
    begin = end;
    end = next_end;
  }
  if (!status.ok()) {
    fail_outputs(request);
    return status;
  }
  finish_outputs(request);
  return {};
}

// Resident blocks come first: they are attended while the others are on their way.
std::uint32_t Sequence::State::put_hits_first() {
  const auto middle = std::stable_partition(work.begin(), work.end(), [this](const WorkItem& item) {
    return !runtime.map->find(item.block).is_none();
  });
  return static_cast<std::uint32_t>(middle - work.begin());
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
    if (stop > hits && !piece_fits(end, stop, fetch)) break;
    take_piece(end, stop, fetch);
    end = stop;
  }
  runtime.record(Track::kResolve, "resolve", start, runtime.now(), 0);
  return end;
}

bool Sequence::State::piece_fits(std::uint32_t begin, std::uint32_t end,
                                 const WaveFetch& fetch) const {
  std::uint32_t slots = 0;
  ExtentId last;
  std::uint32_t frames = 0;
  for (std::uint32_t i = begin; i < end; ++i) {
    const SlotId slot = runtime.map->find(work[i].block);
    if (slot.is_none() || !runtime.map->is_held(slot)) ++slots;
    if (!slot.is_none()) continue;
    const ExtentId extent = runtime.layout.extent_of(work[i].block);
    if (extent == last) continue;
    last = extent;
    if (!fetch.has_frame_for(extent, frames)) return false;
    ++frames;
  }
  return slots <= runtime.map->available();
}

// Holds what is resident, then reserves slots for what is not: in this order, so that no block of
// the piece is the victim of another.
void Sequence::State::take_piece(std::uint32_t begin, std::uint32_t end, WaveFetch& fetch) {
  for (std::uint32_t i = begin; i < end; ++i) {
    const SlotId slot = runtime.map->find(work[i].block);
    if (slot.is_none()) continue;
    if (runtime.map->is_held(slot)) {
      ++runtime.held_hits;
    } else {
      ++runtime.hits[static_cast<std::size_t>(Tier::kDevice)];
    }
    runtime.map->hold(slot);
    runtime.map->touch(slot);
  }
  for (std::uint32_t i = begin; i < end; ++i) {
    const BlockId block = work[i].block;
    if (!runtime.map->find(block).is_none()) continue;
    const std::optional<SlotId> slot = runtime.map->reserve(block);
    KVTIER_CHECK(slot.has_value(), "a slot was available and none is there");
    const Tier tier = fetch.add({block, *slot});
    ++runtime.hits[static_cast<std::size_t>(tier)];
    if (tier == Tier::kDisk) runtime.look_ahead->note_demand(runtime.layout.extent_of(block));
  }
}

void Sequence::State::release_wave(std::uint32_t begin, std::uint32_t end) {
  for (std::uint32_t i = begin; i < end; ++i) {
    const SlotId slot = runtime.map->find(work[i].block);
    if (!slot.is_none()) runtime.map->unhold(slot);
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
  if (partial_lse.size() < tasks.size() * state_rows) {
    partial_lse.resize(tasks.size() * state_rows);
    partial_out.resize(tasks.size() * state_rows * value_dim);
  }
  const std::size_t head_dim = runtime.layout.head_dim();
  for (std::size_t i = 0; i < tasks.size(); ++i) {
    AttentionTask& task = tasks[i];
    task.queries = request.queries + task_groups[i].value * heads * head_dim;
    task.query_stride = runtime.options.query_heads * head_dim;
    task.query_count = request.query_count;
    if (request.query_count > 1) task.query_positions = query_positions;
    task.out = partial_out.data() + i * state_rows * value_dim;
    task.out_stride = std::size_t{heads} * value_dim;
    task.lse = partial_lse.data() + i * state_rows;
    task.lse_stride = heads;
  }
  const AttentionParams params{.layout = &runtime.layout,
                               .queries_per_kv_head =
                                   runtime.options.query_heads / runtime.options.block.kv_heads,
                               .softmax = runtime.options.softmax};
  const Status attended_status = runtime.environment.device->attend(params, tasks);
  const Duration attended_at = runtime.now();
  timing.attend += attended_at - start;
  runtime.record(Track::kAttend, "attend", start, attended_at,
                 (end - begin) * runtime.layout.block_bytes());
  if (!attended_status.ok()) return attended_status;
  for (std::size_t i = 0; i < tasks.size(); ++i) merge_task(request, tasks[i], task_groups[i]);
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
  std::fill_n(request.out, rows * runtime.layout.value_dim(), kNan);
  std::fill_n(request.lse, rows, kNan);
}

// --- After the step: what stays, and what comes next.

void Sequence::State::hold_after_step(LayerIndex layer) {
  // Outliers may be held while at least a quarter of the slots is left to the cache.
  const std::uint32_t floor = runtime.map->slots() / 4 + runtime.blocks_per_chunk();
  for (Stream& stream : streams_of(layer)) {
    const GroupSelection& selection = selections[stream.head_group.value];
    for (BlockIndex index : stream.outliers) {
      runtime.map->unhold(runtime.map->find(block_id(stream, index)));
    }
    stream.outliers.clear();
    for (std::uint32_t i = 0; i < std::min(selection.held, selection.chosen); ++i) {
      const BlockIndex index = selection.ranked[i].block;
      const BlockId block = block_id(stream, index);
      if (runtime.map->state(block) != ResidencyState::kResident) continue;
      if (runtime.map->available() <= floor) break;
      runtime.map->hold(runtime.map->find(block));
      stream.outliers.push_back(index);
    }
    // After a truncation the window reaches back to blocks that were let go: held again from here.
    const std::uint32_t window_begin =
        stream.tokens > runtime.options.window ? stream.tokens - runtime.options.window : 0;
    const std::uint32_t first = window_begin / runtime.layout.tokens_per_block();
    while (stream.held_begin > first) {
      const BlockIndex index{stream.held_begin - 1};
      const BlockId block = block_id(stream, index);
      if (runtime.map->state(block) != ResidencyState::kResident) break;
      if (!is_held_by(stream, index)) runtime.map->hold(runtime.map->find(block));
      --stream.held_begin;
    }
  }
}

// The next layer will likely want what it wanted a token ago; this one, soon, what ranked just below
// the cut.
void Sequence::State::predict(LayerIndex layer) {
  if (!runtime.look_ahead->enabled()) return;
  const LayerIndex next{(layer.value + 1) % runtime.options.layers};
  for (Stream& stream : streams_of(layer)) {
    const GroupSelection& selection = selections[stream.head_group.value];
    stream.last_set.clear();
    for (std::uint32_t i = 0; i < selection.chosen; ++i) {
      stream.last_set.push_back(block_id(stream, selection.ranked[i].block));
    }
  }
  for (Stream& stream : streams_of(next)) runtime.look_ahead->promote(stream.last_set);
  for (Stream& stream : streams_of(layer)) {
    const GroupSelection& selection = selections[stream.head_group.value];
    predictions.clear();
    for (std::size_t i = selection.chosen; i < selection.ranked.size(); ++i) {
      predictions.push_back(block_id(stream, selection.ranked[i].block));
    }
    runtime.look_ahead->promote(predictions);
  }
}

}  // namespace kvtier
