#include "memory/check.h"
#include "runtime/runtime.h"
#include "runtime/sequence_state.h"

#include <algorithm>
#include <utility>

namespace kvtier {

// --- The step as a whole.

Status Sequence::step(const StepRequest& request, StepReport* report) {
  State& s = *state_;
  Runtime::State& runtime = s.runtime;
  const Status checked = s.check_step(request);
  if (!checked.ok()) return s.refuse(request, report, checked);
  StepTiming timing;
  const Duration start = runtime.now();
  runtime.counters.waits = 0;
  ++runtime.steps;
  runtime.look_ahead->begin_step(runtime.steps);

  const std::uint32_t tokens = s.tokens[request.layer.value];
  Selector& selector = *s.selectors[request.layer.value];
  const Status chosen = selector.select(
      {.queries = request.queries,
       .query_stride = std::size_t{runtime.options.query_heads} * runtime.layout.head_dim(),
       .query_count = request.query_count,
       .first_position = tokens - request.query_count,
       .budget_tokens = request.budget_tokens,
       .band_tokens = runtime.look_ahead->enabled() ? request.budget_tokens : 0},
      s.selections, runtime.environment.device->workers());
  if (!chosen.ok()) return s.refuse(request, report, chosen);
  const Duration selected = runtime.now();
  timing.select = selected - start;
  runtime.record(Track::kSelect, "select", start, selected, 0);

  s.plan_work(request);
  timing.resolve += runtime.now() - selected;
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
  if (report != nullptr) report->metadata_bytes = selector.metadata_bytes();
  return status;
}

Status Sequence::State::refuse(const StepRequest& request, StepReport* report,
                               const Status& status) {
  fail_outputs(request);
  if (report != nullptr) *report = {};
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

// Sinks, selected units and window of one head group, in order of position; ranges of one block
// that touch become one.
void Sequence::State::append_group_work(Stream& stream, const GroupSelection& selection,
                                        std::uint32_t window_begin) {
  const std::uint32_t tokens_per_block = runtime.layout.tokens_per_block();
  const std::size_t first = work.size();
  const auto add_tokens = [&](std::uint32_t begin, std::uint32_t end) {
    while (begin < end) {
      const BlockIndex index{begin / tokens_per_block};
      const std::uint32_t stop = std::min(end, (index.value + 1) * tokens_per_block);
      work.push_back({.block = block_id(stream, index),
                      .head_group = stream.head_group,
                      .index = index,
                      .first_token = begin % tokens_per_block,
                      .tokens = stop - begin});
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

// The next layer will likely want what it wanted a token ago; this one, soon, what ranked just
// below the cut.
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
  for (Stream& stream : streams_of(next)) runtime.look_ahead->consider(stream.last_set);
  runtime.look_ahead->promote();
  for (Stream& stream : streams_of(layer)) {
    const GroupSelection& selection = selections[stream.head_group.value];
    wanted.clear();
    for (std::size_t i = selection.chosen; i < selection.ranked.size(); ++i) {
      wanted.push_back(block_id(stream, selection.ranked[i].block));
    }
    runtime.look_ahead->consider(wanted);
  }
  runtime.look_ahead->promote();
}

}  // namespace kvtier
