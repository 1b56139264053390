#include "kernels/merge_states.h"
#include "runtime/runtime.h"
#include "runtime/sequence_state.h"

#include <algorithm>
#include <cmath>

// What a step does about the tokens that it does not attend: estimate them where that has been
// measured to help, and measure it now and then.

namespace kvtier {
namespace {

double squared_length(std::span<const float> row) {
  double sum = 0;
  for (float value : row) sum += double{value} * double{value};
  return sum;
}

/// Of what was not chosen, a measurement attends so many tokens per head group at least, if there
/// are as many: evenly spread blocks that stand for the others.
constexpr std::uint32_t kMeasuredTokens = 2048;

/// Squared distance relative to the squared length of `exact`.
double squared_error(std::span<const float> row, std::span<const float> exact) {
  double sum = 0;
  for (std::size_t i = 0; i < row.size(); ++i) {
    const double difference = double{row[i]} - double{exact[i]};
    sum += difference * difference;
  }
  const double length = squared_length(exact);
  if (length > 0) return sum / length;
  return sum > 0 ? 1.0 : 0.0;
}

}  // namespace

bool Sequence::State::may_estimate(LayerIndex layer) const {
  return runtime.options.estimate_rest != EstimateRest::kNever &&
         selectors[layer.value]->estimates_rest();
}

void Sequence::State::grow_rest(std::size_t rows) {
  const std::size_t values = rows * runtime.layout.value_dim();
  if (rest_lse.size() >= rows) return;
  rest_out.resize(values);
  rest_lse.resize(rows);
  exact_out.resize(values);
  exact_lse.resize(rows);
  attended_out.resize(values);
  attended_lse.resize(rows);
}

// `request.out` and `request.lse` hold attention over what was chosen. Afterwards they hold the
// step's answer, and attended_* what they held before.
Status Sequence::State::add_rest(const StepRequest& request, const SelectRequest& question) {
  const std::size_t heads = runtime.options.query_heads;
  const std::size_t rows = request.query_count * heads;
  const std::uint32_t dim = runtime.layout.value_dim();
  if (attends_everything()) return {};
  grow_rest(queries_of_step * heads);
  RestChoice& choice = rest_choices[request.layer.value];
  const bool measured = runtime.options.estimate_rest == EstimateRest::kMeasured;
  KVTIER_RETURN_IF_ERROR(selectors[request.layer.value]->estimate_rest(
      question, selections, {rest_out.data(), rest_lse.data()},
      runtime.environment.device->workers()));
  const StatesView before = attended_states();
  std::copy_n(request.out, rows * dim, before.out);
  std::copy_n(request.lse, rows, before.lse);
  if (measured && choice.begin_step()) measure_rest(request);
  for (std::size_t row = 0; row < rows; ++row) {
    if (measured && !choice.takes_estimate(static_cast<std::uint32_t>(row % heads))) continue;
    ++report_estimates.rows;
    merge_states({request.out + row * dim, request.lse + row},
                 {rest_out.data() + row * dim, rest_lse.data() + row}, 1, dim);
  }
  if (!runtime.options.sink_logits.empty()) {
    StepRequest attended_alone = request;
    attended_alone.out = before.out;
    attended_alone.lse = before.lse;
    finish_outputs(attended_alone);
  }
  return {};
}

bool Sequence::State::attends_everything() const {
  std::uint64_t tokens = 0;
  for (std::size_t i = pass.first_range; i < attended.size(); ++i) tokens += attended[i].tokens;
  return tokens == std::uint64_t{pass.end} * runtime.layout.head_groups();
}

StatesView Sequence::State::attended_states() {
  const std::size_t row = std::size_t{pass.first_query} * runtime.options.query_heads;
  return {attended_out.data() + row * runtime.layout.value_dim(), attended_lse.data() + row};
}

// Attends a sample of what was not chosen, into exact_*, lets it stand for all of that, and
// compares. Sampling adds the same error to both ways in the mean, so it does not favour one. A
// block that cannot be had spoils the measurement, not the step, which did not ask for it.
void Sequence::State::measure_rest(const StepRequest& request) {
  const std::size_t heads = runtime.options.query_heads;
  const std::size_t rows = request.query_count * heads;
  const std::uint32_t dim = runtime.layout.value_dim();
  plan_complement(request);
  StepRequest others = request;
  others.out = exact_out.data();
  others.lse = exact_lse.data();
  purpose = Purpose::kMeasure;
  StepTiming timing;
  const std::uint64_t failed = runtime.counters.verification.failed;
  const Status status = run_waves(others, timing);
  purpose = Purpose::kStep;
  if (!status.ok()) {
    // Nobody was refused a block that was wanted: it is found, and named, by the step that wants
    // it.
    runtime.counters.verification.failed = failed;
    failures.clear();
    return;
  }
  ++runtime.steps_measured;
  report_estimates.measured = true;
  for (std::size_t row = 0; row < rows; ++row) {
    const std::size_t group = row % heads / runtime.heads_per_group();
    exact_lse[row] += stands_for_log[group];
  }
  const StatesView before = attended_states();
  merge_states({exact_out.data(), exact_lse.data()}, before, rows, dim);
  error_without.assign(heads, 0.0);
  error_with.assign(heads, 0.0);
  for (std::size_t row = 0; row < rows; ++row) {
    const std::span<const float> exact(exact_out.data() + row * dim, dim);
    const std::span<const float> without(before.out + row * dim, dim);
    error_without[row % heads] += squared_error(without, exact);
    // Merged where the answer will stand, which is then put back.
    const std::span<float> with(request.out + row * dim, dim);
    merge_states({with.data(), request.lse + row},
                 {rest_out.data() + row * dim, rest_lse.data() + row}, 1, dim);
    error_with[row % heads] += squared_error(with, exact);
    std::ranges::copy(without, with.begin());
    request.lse[row] = before.lse[row];
  }
  rest_choices[request.layer.value].learn(error_without, error_with);
}

// Blocks of the tokens that this pass does not attend, every so many of them and others each time;
// `stands_for_log` becomes the logarithm of how many tokens each of them stands for.
void Sequence::State::plan_complement(const StepRequest& request) {
  work.clear();
  stands_for_log.clear();
  const std::uint32_t turn = rest_choices[request.layer.value].measurements();
  std::size_t next = pass.first_range;
  for (Stream& stream : streams_of(request.layer)) {
    const std::size_t first = work.size();
    std::uint32_t position = 0;
    for (; next < attended.size() && attended[next].head_group == stream.head_group; ++next) {
      const AttendedRange& range = attended[next];
      const std::uint32_t begin = runtime.layout.first_token(range.block) + range.first_token;
      add_tokens(stream, position, begin);
      position = begin + range.tokens;
    }
    add_tokens(stream, position, pass.end);
    stands_for_log.push_back(thin_out(first, turn));
  }
}

// Keeps every so many of the items from `first` on; returns the logarithm of all tokens over those
// that are kept.
float Sequence::State::thin_out(std::size_t first, std::uint32_t turn) {
  std::uint64_t tokens = 0;
  for (std::size_t i = first; i < work.size(); ++i) tokens += work[i].tokens;
  const std::uint64_t stride = std::max<std::uint64_t>(1, tokens / kMeasuredTokens);
  std::uint64_t kept_tokens = 0;
  std::size_t kept = first;
  for (std::size_t i = first; i < work.size(); ++i) {
    if ((i - first + turn) % stride != 0) continue;
    kept_tokens += work[i].tokens;
    work[kept++] = work[i];
  }
  work.resize(kept);
  if (kept_tokens == 0) return 0.0f;
  return static_cast<float>(
      std::log(static_cast<double>(tokens) / static_cast<double>(kept_tokens)));
}

}  // namespace kvtier
