#include "runtime/look_ahead.h"

#include <algorithm>
#include <cmath>

namespace kvtier {
namespace {

GuessBudget budget_of(std::uint64_t bytes_per_step, std::uint64_t extent_bytes) {
  return GuessBudget(bytes_per_step / extent_bytes);
}

}  // namespace

LookAhead::LookAhead(const Parts& parts, const Limits& limits)
    : layout_(*parts.layout),
      table_(*parts.table),
      map_(*parts.map),
      host_(*parts.host),
      device_(*parts.device),
      counters_(*parts.counters),
      limits_(limits),
      budgets_{budget_of(limits.bytes_per_step, layout_.extent_bytes()),
               budget_of(limits.bytes_per_step, layout_.extent_bytes()),
               budget_of(limits.bytes_per_step, layout_.extent_bytes())},
      expected_(limits_.bytes_per_step > 0 ? table_.rows() : 0) {
  considered_.reserve(expected_.size());
}

float LookAhead::weight_of(std::size_t rank, std::uint32_t chosen) {
  if (rank < chosen) return 1.0f;
  // By how often blocks there were attended by the next step, on recorded traces.
  struct Class {
    float ends_at;  ///< As a multiple of what was chosen.
    float weight;
  };
  constexpr Class kClasses[] = {{1.25f, 0.5f}, {1.5f, 0.35f}, {2.0f, 0.2f}, {3.0f, 0.08f}};
  constexpr float kBehind = 0.04f;
  const float place = static_cast<float>(rank) / static_cast<float>(std::max(1u, chosen));
  for (const Class& each : kClasses) {
    if (place < each.ends_at) return each.weight;
  }
  return kBehind;
}

void LookAhead::begin_step(std::uint64_t step) {
  step_ = step;
  device_.begin_step();
  bytes_left_ = limits_.bytes_per_step;
  table_.let_go_before(step);
  // A quarter is left to what steps read on demand.
  frames_max_ = std::max(1u, table_.frames_available() / 4 * 3);
  const std::uint64_t extent = layout_.extent_bytes();
  for (std::size_t i = 0; i < budgets_.size(); ++i) {
    GuessSourceStats& source = counters_.prefetch.sources[i];
    budgets_[i].begin_step(source.to_host.useful_bytes / extent,
                           source.to_host.wasted_bytes / extent);
    source.to_host_budget_bytes = budgets_[i].allowance() * extent / GuessBudget::kProbeSteps;
    const GuessBudget& device_budget = device_.budget(static_cast<GuessSource>(i));
    source.halvings = budgets_[i].halvings() + device_budget.halvings();
    source.doublings = budgets_[i].doublings() + device_budget.doublings();
  }
}

// --- What is expected.

void LookAhead::consider(const Forecast& forecast) {
  for (std::size_t rank = 0; rank < forecast.ranked.size(); ++rank) {
    const bool is_band = rank >= forecast.chosen && forecast.source != GuessSource::kHint;
    add(forecast.ranked[rank], weight_of(rank, forecast.chosen),
        is_band ? GuessSource::kBand : forecast.source);
  }
}

void LookAhead::add(BlockId block, float weight, GuessSource source) {
  if (!map_.find(block).is_none()) return;
  const ExtentId id = layout_.extent_of(block);
  const Extent& extent = table_.row(id);
  if (is_in_frame(extent.state)) device_.consider(block, weight, source);
  // Where it is a guess already it may have to stay for longer.
  if (expected_.empty() || (extent.state != HomeState::kDisk && !extent.prefetched)) return;
  Expectation& expected = expected_[id.value];
  if (expected.weight == 0.0f) considered_.push_back(id);
  expected.weight += weight;
  if (weight <= expected.heaviest) return;
  expected.heaviest = weight;
  expected.source = source;
}

// Halved as often as a half-life has passed: exact, and the same on every machine.
float LookAhead::misses(const Extent& extent) const {
  const std::uint64_t half_life =
      std::uint64_t{kMissesHalfLifeTokens} * std::max(1u, limits_.steps_per_token);
  const std::uint64_t halvings =
      std::min<std::uint64_t>(64, (step_ - extent.misses_step) / half_life);
  return std::ldexp(extent.misses, -static_cast<int>(halvings));
}

void LookAhead::note_miss(ExtentId extent) {
  if (expected_.empty()) return;
  Extent& row = table_.row(extent);
  const std::uint64_t half_life =
      std::uint64_t{kMissesHalfLifeTokens} * std::max(1u, limits_.steps_per_token);
  row.misses = misses(row) + 1.0f;
  row.misses_step = step_ - (step_ - row.misses_step) % half_life;
}

// --- What is promoted.

std::uint64_t LookAhead::promote(std::uint64_t until) {
  for (ExtentId id : considered_) expected_[id.value].weight *= 1.0f + misses(table_.row(id));
  std::ranges::sort(considered_, [this](ExtentId a, ExtentId b) {
    const float of_a = expected_[a.value].weight;
    const float of_b = expected_[b.value].weight;
    return of_a != of_b ? of_a > of_b : a < b;
  });
  const std::uint64_t before = bytes_left_;
  // Guesses that are there already cost nothing to keep, and first, lest one leaves for another.
  for (ExtentId id : considered_) retain(id, until);
  Outcome outcome = Outcome::kGoOn;
  for (ExtentId id : considered_) {
    if (outcome == Outcome::kGoOn) outcome = promote_extent(id, until);
    expected_[id.value] = {};
  }
  considered_.clear();
  device_.promote();
  return before - bytes_left_;
}

void LookAhead::retain(ExtentId id, std::uint64_t until) {
  const Extent& extent = table_.row(id);
  if (extent.state == HomeState::kDisk || table_.is_held(id)) return;
  if (extent.retained_until == 0 && table_.frames_retained() >= frames_max_) return;
  table_.retain(id, until);
}

// Best effort: an engine that is busy, or a tier that is full, leaves this extent and the rest
// where they are.
LookAhead::Outcome LookAhead::promote_extent(ExtentId id, std::uint64_t until) {
  Extent& extent = table_.row(id);
  if (extent.state != HomeState::kDisk) return Outcome::kGoOn;
  const bool has_frame = table_.frames_retained() < frames_max_;
  GuessBudget& budget = budgets_[static_cast<std::size_t>(expected_[id.value].source)];
  if (!has_budget() || !has_frame || !budget.spend()) {
    extent.predicted_until = until;
    return Outcome::kGoOn;
  }
  if (!host_.start_read(id, Priority::kPrefetch, Admission::kPredicted).ok()) {
    return Outcome::kStop;
  }
  table_.retain(id, until);
  extent.prefetched = true;
  extent.guess = expected_[id.value].source;
  extent.predicted_until = 0;
  const std::uint64_t bytes = layout_.extent_bytes();
  counters_.prefetch.issued_bytes += bytes;
  counters_.prefetch.sources[static_cast<std::size_t>(extent.guess)].to_host.issued_bytes += bytes;
  bytes_left_ -= bytes;
  return Outcome::kGoOn;
}

void LookAhead::note_demand(ExtentId extent) {
  Extent& row = table_.row(extent);
  ++(row.predicted_until >= step_ ? counters_.prefetch.late : counters_.prefetch.unforeseen);
  row.predicted_until = 0;
}

}  // namespace kvtier
