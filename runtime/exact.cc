#include "runtime/runtime.h"
#include "runtime/sequence_state.h"

#include <algorithm>
#include <cmath>

// Exact attention: the waves of a step over every block, as a stream that passes through.

namespace kvtier {

Status Sequence::attend(const ExactRequest& request, StepReport* report) {
  State& s = *state_;
  Runtime::State& runtime = s.runtime;
  runtime.begin_call();
  const StepRequest question{.layer = request.layer,
                             .queries = request.queries,
                             .query_count = request.query_count,
                             .out = request.out,
                             .lse = request.lse};
  const Status checked = s.check_exact(request);
  if (!checked.ok()) return s.refuse(question, report, checked);
  const Duration start = runtime.now();
  const std::uint32_t tokens = s.tokens[request.layer.value];
  StepTiming timing;
  runtime.begin_waits();
  ++runtime.attends;
  s.attended.clear();
  s.failures.clear();
  s.report_estimates = {};
  s.pass = {.first_position = tokens - request.query_count, .end = tokens};
  s.work.clear();
  for (const Stream& stream : s.streams_of(request.layer)) s.add_tokens(stream, 0, tokens);
  s.query_positions.clear();
  for (std::uint32_t position = s.pass.first_position; position < tokens; ++position) {
    s.query_positions.push_back(position);
  }
  s.purpose = State::Purpose::kExact;
  const Status status = s.run_waves(question, timing);
  s.purpose = State::Purpose::kStep;
  if (!status.ok() && s.failures.empty()) return s.refuse(question, report, status);
  if (status.ok()) s.finish_outputs(question);
  timing.total = runtime.now() - start;
  runtime.end_waits(timing);
  s.fill_report(question, timing, report);
  if (report != nullptr && status.ok()) {
    report->attended_tokens_max = tokens;
    report->attended_tokens_total = std::uint64_t{tokens} * runtime.layout.head_groups();
  }
  return status;
}

Status Sequence::State::check_exact(const ExactRequest& request) const {
  KVTIER_RETURN_IF_ERROR(check_call(request.layer));
  if (request.queries == nullptr || request.out == nullptr || request.lse == nullptr) {
    return invalid_argument("exact attention without queries, out or lse");
  }
  const std::uint32_t present = tokens[request.layer.value];
  if (request.query_count == 0 || request.query_count > present) {
    return invalid_argument(fmt::format("{} queries over {} tokens, expected 1 to {}",
                                        request.query_count, present, present));
  }
  const std::size_t row = std::size_t{runtime.options.query_heads} * runtime.layout.head_dim();
  for (std::uint32_t i = 0; i < request.query_count; ++i) {
    const float* query = request.queries + i * row;
    if (!std::all_of(query, query + row, [](float x) { return std::isfinite(x); })) {
      return invalid_argument(fmt::format("query {} is not finite", i));
    }
  }
  return {};
}

}  // namespace kvtier
