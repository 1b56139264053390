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
  runtime.begin_call();
  Status checked = s.check_step(request);
  if (checked.ok() && (request.out == nullptr || request.lse == nullptr)) {
    checked = invalid_argument("a step without out or lse");
  }
  if (!checked.ok()) return s.refuse(request, report, checked);
  StepTiming timing;
  const Duration start = runtime.now();
  runtime.begin_waits();
  ++runtime.steps;
  runtime.look_ahead->begin_step(runtime.steps);
  s.attended.clear();
  s.failures.clear();
  s.report_estimates = {};

  Status status;
  if (request.selection == QuerySelection::kShared) {
    status = s.step_queries(request, 0, timing);
  } else {
    for (std::uint32_t query = 0; query < request.query_count && status.ok(); ++query) {
      status = s.step_queries(s.one_query_of(request, query), query, timing);
    }
  }
  if (!status.ok()) {
    s.fail_outputs(request);
    if (s.failures.empty()) return s.refuse(request, report, status);
  }

  std::uint64_t metadata = 0;
  for (const auto& each : s.selectors) metadata += each->metadata_bytes();
  runtime.metadata_bytes_peak = std::max(runtime.metadata_bytes_peak, metadata);
  timing.total = runtime.now() - start;
  runtime.end_waits(timing);
  s.fill_report(request, timing, report);
  return status;
}

StepRequest Sequence::State::one_query_of(const StepRequest& request, std::uint32_t query) const {
  const std::size_t heads = runtime.options.query_heads;
  StepRequest one = request;
  one.query_count = 1;
  one.queries += query * heads * runtime.layout.head_dim();
  one.out += query * heads * runtime.layout.value_dim();
  one.lse += query * heads;
  return one;
}

// One selection, for the queries from `first_query` of the step on: as many as `request` has.
// Fills `question` and plans the work.
Status Sequence::State::plan_queries(const StepRequest& request, std::uint32_t first_query,
                                     StepTiming& timing, SelectRequest& question) {
  const Duration start = runtime.now();
  const std::uint32_t layer = request.layer.value;
  // Of a step with its own selections, the queries behind this one are still to come.
  const std::uint32_t queries_left = request.selection == QuerySelection::kShared
                                         ? request.query_count
                                         : queries_of_step - first_query;
  pass = {.first_query = first_query,
          .first_position = tokens[layer] - queries_left,
          .end = tokens[layer] - queries_left + request.query_count,
          .first_range = attended.size()};
  question = {.queries = request.queries,
              .query_stride = std::size_t{runtime.options.query_heads} * runtime.layout.head_dim(),
              .query_count = request.query_count,
              .first_position = pass.first_position,
              .budget_tokens = request.budget_tokens,
              .band_tokens = runtime.look_ahead->band_tokens(request.budget_tokens),
              .external = request.external,
              .layer_demands = layer_demands(),
              .layer = layer};
  Selector& selector = *selectors[layer];
  // One set of demands for all layers of a token: otherwise their shares would not add up.
  if (layer == 0) std::ranges::copy(demands, shared_demands.begin());
  KVTIER_RETURN_IF_ERROR(
      selector.select(question, selections, runtime.environment.device->workers()));
  demands[layer] = selector.demand();
  const Duration selected = runtime.now();
  timing.select += selected - start;
  runtime.record(Track::kSelect, "select", start, selected, 0);

  plan_work(request);
  timing.resolve += runtime.now() - selected;
  return {};
}

Status Sequence::State::step_queries(const StepRequest& request, std::uint32_t first_query,
                                     StepTiming& timing) {
  SelectRequest question;
  KVTIER_RETURN_IF_ERROR(plan_queries(request, first_query, timing, question));
  KVTIER_RETURN_IF_ERROR(run_waves(request, timing));
  const Duration before_rest = runtime.now();
  if (may_estimate(request.layer)) KVTIER_RETURN_IF_ERROR(add_rest(request, question));
  finish_outputs(request);
  timing.rest += runtime.now() - before_rest;
  hold_after_step(request.layer);
  timing.look_ahead += predict(request.layer);
  return {};
}

Status Sequence::State::refuse(const StepRequest& request, StepReport* report,
                               const Status& status) {
  fail_outputs(request);
  if (report != nullptr) *report = {};
  return status;
}

Status Sequence::State::check_step(const StepRequest& request) {
  KVTIER_RETURN_IF_ERROR(check_call(request.layer));
  if (request.queries == nullptr) return invalid_argument("a step without queries");
  const std::uint32_t present = tokens[request.layer.value];
  queries_of_step = request.query_count;
  if (request.query_count == 0 || request.query_count > kMaxStepQueries ||
      request.query_count > present) {
    return invalid_argument(fmt::format("{} queries in one step over {} tokens, expected 1 to {}",
                                        request.query_count, present,
                                        std::min(present, kMaxStepQueries)));
  }
  return {};
}

void Sequence::State::fill_report(const StepRequest& request, const StepTiming& timing,
                                  StepReport* report) const {
  if (report == nullptr) return;
  *report = {};
  report->metadata_bytes = selectors[request.layer.value]->metadata_bytes();
  report->rows_estimated = report_estimates.rows;
  report->measured_rest = report_estimates.measured;
  report->attended_out = report_estimates.rows > 0 ? attended_out.data() : request.out;
  report->attended = attended;
  report->failures = failures;
  report->timing = timing;
  std::uint32_t in_group = 0;
  const AttendedRange* previous = nullptr;
  for (const AttendedRange& range : attended) {
    if (previous != nullptr &&
        (range.head_group != previous->head_group || range.query != previous->query)) {
      in_group = 0;
    }
    previous = &range;
    in_group += range.tokens;
    report->attended_tokens_total += range.tokens;
    report->attended_tokens_max = std::max(report->attended_tokens_max, in_group);
  }
}

// --- Planning: which tokens of which blocks.

void Sequence::State::plan_work(const StepRequest& request) {
  const Duration start = runtime.now();
  const std::uint32_t visible = pass.first_position + 1;
  const std::uint32_t window_begin = visible - std::min(visible, runtime.options.window);
  work.clear();
  for (Stream& stream : streams_of(request.layer)) {
    append_group_work(stream, selections[stream.head_group.value], window_begin);
  }
  const std::uint32_t query =
      request.selection == QuerySelection::kShared ? AttendedRange::kEveryQuery : pass.first_query;
  for (WorkItem& item : work) {
    item.range = static_cast<std::uint32_t>(attended.size());
    attended.push_back({.head_group = item.head_group,
                        .block = item.index,
                        .first_token = item.first_token,
                        .tokens = item.tokens,
                        .query = query});
  }
  query_positions.clear();
  for (std::uint32_t i = 0; i < request.query_count; ++i) {
    query_positions.push_back(pass.first_position + i);
  }
  runtime.record(Track::kResolve, "plan", start, runtime.now(), 0);
}

// Tokens [begin, end) of one head group, block by block.
void Sequence::State::add_tokens(const Stream& stream, std::uint32_t begin, std::uint32_t end,
                                 bool kept_keys) {
  const std::uint32_t tokens_per_block = runtime.layout.tokens_per_block();
  while (begin < end) {
    const BlockIndex index{begin / tokens_per_block};
    const std::uint32_t stop = std::min(end, (index.value + 1) * tokens_per_block);
    work.push_back({.block = block_id(stream, index),
                    .head_group = stream.head_group,
                    .index = index,
                    .first_token = begin % tokens_per_block,
                    .tokens = stop - begin,
                    .kept_keys = kept_keys});
    begin = stop;
  }
}

// Sinks, selected units and window of one head group, in order of position; ranges of one block
// that touch become one. What is in sinks or window, or in one block with it, is attended whole.
void Sequence::State::append_group_work(Stream& stream, const GroupSelection& selection,
                                        std::uint32_t window_begin) {
  const std::size_t first = work.size();
  const bool kept_keys = selectors[stream.layer.value]->keeps_keys();
  const std::uint32_t sinks = std::min(runtime.options.sinks, pass.end);
  add_tokens(stream, 0, sinks);
  for (std::uint32_t i = 0; i < selection.chosen; ++i) {
    const SelectedUnit& unit = selection.ranked[i];
    const std::uint32_t begin = runtime.layout.first_token(unit.block) + unit.first_token;
    add_tokens(stream, begin, begin + unit.tokens, kept_keys);
  }
  add_tokens(stream, std::max(sinks, window_begin), pass.end);
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
      previous.kept_keys = previous.kept_keys && work[i].kept_keys;
    } else {
      work[++last] = work[i];
    }
  }
  if (work.size() > first) work.resize(last + 1);
  if (kept_keys) want_blocks_one_way(first);
}

// --- After the step: what stays.

void Sequence::State::hold_after_step(LayerIndex layer) {
  // Outliers may be held while at least a quarter of the slots is left to the cache, and never in
  // the room that sinks, windows and tails of all streams can come to need: after a truncation
  // they hold less for a while.
  const std::uint32_t floor = runtime.map->slots() / 4 + runtime.blocks_per_chunk();
  for (Stream& stream : streams_of(layer)) {
    const GroupSelection& selection = selections[stream.head_group.value];
    for (BlockIndex index : stream.outliers) {
      runtime.map->unhold(runtime.map->find(block_id(stream, index)));
    }
    runtime.outliers_held -= static_cast<std::uint32_t>(stream.outliers.size());
    stream.outliers.clear();
    for (std::uint32_t i = 0; i < std::min(selection.held, selection.chosen); ++i) {
      const BlockIndex index = selection.ranked[i].block;
      const BlockId block = block_id(stream, index);
      if (!runtime.map->has_whole(block)) continue;
      if (runtime.map->available() <= floor) break;
      if (runtime.outliers_held >= runtime.outliers_held_max) break;
      runtime.map->hold(runtime.map->find(block));
      stream.outliers.push_back(index);
      ++runtime.outliers_held;
    }
    // After a truncation the window reaches back to blocks that were let go: held again from here.
    const std::uint32_t window_begin =
        stream.tokens > runtime.options.window ? stream.tokens - runtime.options.window : 0;
    const std::uint32_t first = window_begin / runtime.layout.tokens_per_block();
    while (stream.held_begin > first) {
      const BlockIndex index{stream.held_begin - 1};
      const BlockId block = block_id(stream, index);
      if (!runtime.map->has_whole(block)) break;
      if (!is_held_by(stream, index)) runtime.map->hold(runtime.map->find(block));
      --stream.held_begin;
    }
  }
}

}  // namespace kvtier
