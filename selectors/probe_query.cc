#include "selectors/probe_query.h"

#include "kernels/partial_attention.h"

#include <algorithm>
#include <cmath>

namespace kvtier {
namespace {

/// ActQKV's prefill window: prompt queries whose statistics are taken together.
constexpr std::uint32_t kProbeWindow = 256;
/// Steps that a cut can go back by: more than the queries of a draft.
constexpr std::uint32_t kProbeSteps = 9;

}  // namespace

ProbeQuery::ProbeQuery(std::size_t channels)
    : channels_(channels),
      prompt_(channels),
      window_(channels),
      stats_(channels),
      steps_(kProbeSteps, 2 * channels),
      turned_(channels),
      probe_(channels),
      mean_(channels),
      variance_(channels) {}

void ProbeQuery::observe(const PromptQueries& queries, KeyFrame& frame) {
  if (!steps_.empty() && !queries.positions.empty()) {
    // Another turn: what the steps have taught is where it starts from.
    load_stats();
    std::ranges::copy(stats_.mean, prompt_.mean.begin());
    std::ranges::copy(stats_.variance, prompt_.variance.begin());
    prompt_.windows = stats_.windows;
    window_.clear();
    steps_.drop_from(0);
  }
  for (std::size_t n = 0; n < queries.positions.size(); ++n) {
    const std::uint32_t index = queries.positions[n] / kProbeWindow;
    if (index != window_index_) {
      window_.add_to(prompt_, mean_, variance_);
      window_.clear();
      window_index_ = index;
    }
    frame.turn_query(queries.queries + n * queries.query_stride, queries.positions[n],
                     turned_.data());
    window_.add(turned_);
  }
}

/// What is known before a step into `stats_`: the last step's, or the prompt's.
void ProbeQuery::load_stats() {
  if (steps_.empty()) {
    // Assigned element by element: these vectors never change their size.
    std::ranges::copy(prompt_.mean, stats_.mean.begin());
    std::ranges::copy(prompt_.variance, stats_.variance.begin());
    stats_.windows = prompt_.windows;
  } else {
    std::copy_n(steps_.row().data(), channels_, stats_.mean.begin());
    std::copy_n(steps_.row().data() + channels_, channels_, stats_.variance.begin());
    stats_.windows = steps_.number();
  }
  window_.add_to(stats_, mean_, variance_);
}

std::span<const float> ProbeQuery::make(const SelectRequest& request, KeyFrame& frame,
                                        bool learns) {
  if (learns) steps_.drop_from(request.first_position);
  load_stats();
  if (learns && window_.queries > 0) {
    window_.add_to(prompt_, mean_, variance_);
    window_.clear();
  }
  std::ranges::fill(probe_, 0.0f);
  std::ranges::fill(mean_, 0.0f);
  std::ranges::fill(variance_, 0.0f);
  const std::uint32_t count = request.query_count;
  double all = 0.0;
  double deviations[kMaxStepQueries] = {};
  for (std::uint32_t q = 0; q < count; ++q) {
    frame.turn_query(request.queries + q * request.query_stride, request.first_position + q,
                     turned_.data());
    deviations[q] = stats_.deviation(turned_);
    all += deviations[q];
    for (std::size_t i = 0; i < turned_.size(); ++i) {
      mean_[i] += turned_[i] / static_cast<float>(count);
    }
  }
  for (std::uint32_t q = 0; q < count; ++q) {
    frame.turn_query(request.queries + q * request.query_stride, request.first_position + q,
                     turned_.data());
    const bool told_apart = count > 1 && all > 0.0 && std::isfinite(all);
    const auto weight =
        static_cast<float>(told_apart ? deviations[q] / all : 1.0 / static_cast<double>(count));
    for (std::size_t i = 0; i < turned_.size(); ++i) {
      probe_[i] += turned_[i] * weight;
      const float gap = turned_[i] - mean_[i];
      variance_[i] += gap * gap / static_cast<float>(count);
    }
  }
  if (!learns) return probe_;
  stats_.add_window(mean_, variance_, count);
  const std::span<float> row = steps_.add(request.first_position, stats_.windows);
  std::ranges::copy(stats_.mean, row.begin());
  std::ranges::copy(stats_.variance, row.begin() + static_cast<std::ptrdiff_t>(channels_));
  return probe_;
}

void ProbeQuery::save(StateWriter& writer) const {
  writer.put_array(std::span(prompt_.mean));
  writer.put_array(std::span(prompt_.variance));
  writer.put(prompt_.windows);
  writer.put_array(std::span(window_.sum));
  writer.put_array(std::span(window_.squares));
  writer.put(window_.queries);
  writer.put(window_index_);
  steps_.save(writer);
}

Status ProbeQuery::restore(StateReader& reader) {
  KVTIER_RETURN_IF_ERROR(reader.get_exactly(std::span(prompt_.mean)));
  KVTIER_RETURN_IF_ERROR(reader.get_exactly(std::span(prompt_.variance)));
  KVTIER_RETURN_IF_ERROR(reader.get(prompt_.windows));
  KVTIER_RETURN_IF_ERROR(reader.get_exactly(std::span(window_.sum)));
  KVTIER_RETURN_IF_ERROR(reader.get_exactly(std::span(window_.squares)));
  KVTIER_RETURN_IF_ERROR(reader.get(window_.queries));
  KVTIER_RETURN_IF_ERROR(reader.get(window_index_));
  return steps_.restore(reader);
}

}  // namespace kvtier
