#include "tools/profile/reuse_curve.h"

#include "runtime/device.h"
#include "tools/replay/replay_plan.h"
#include "tools/replay/replay_run.h"
#include "tools/trace/attention_trace.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <utility>

namespace kvtier {

ReuseCurve ReuseCurve::standard(double budget, double reuse) {
  ReuseCurve curve;
  curve.budget_ = budget;
  curve.reuse_ = reuse;
  curve.described_ = fmt::format(
      "standard: of what a step attends, {:.0f}% is found in a cache of {:.1f}% of the KV; missed "
      "falls with the square of ln(share)",
      100 * reuse, 100 * budget);
  return curve;
}

double ReuseCurve::missed(double share) const {
  if (share >= 1) return 0;
  if (share <= 0) return 1;
  if (points_.empty()) {
    // A budget of everything has no reuse to speak of: what is not resident is missed.
    if (budget_ >= 1) return 1 - share;
    // With less room than a step attends, what the next one wants is gone before it asks.
    if (share < budget_) return 1;
    const double ratio = std::log(share) / std::log(budget_);
    return std::min(1.0, (1 - reuse_) * ratio * ratio);
  }
  // Straight lines over ln(share), from everything missed at a hundredth of the first point.
  Point left{points_.front().share / 100, 1};
  for (const Point& right : points_) {
    if (share <= right.share) {
      const double at = std::log(share / left.share) / std::log(right.share / left.share);
      return std::clamp(left.missed + at * (right.missed - left.missed), 0.0, 1.0);
    }
    left = right;
  }
  const double at = std::log(share / left.share) / std::log(1 / left.share);
  return left.missed * (1 - at);
}

namespace {

/// What one replay missed on the device; none where the runtime cannot work in so little.
Result<std::optional<double>> replay_missed(const ReplayOptions& options,
                                            const AttentionTrace& trace, Progress& progress) {
  auto plan = ReplayPlan::make(options, trace);
  if (!plan.ok() && plan.status().code() == StatusCode::kInvalidArgument) {
    return std::optional<double>();
  }
  if (!plan.ok()) return plan.status();
  HostDevice device(options.threads);
  RunSetup setup{.plan = &*plan,
                 .trace = &trace,
                 .run = &plan->runs.front(),
                 .device = &device,
                 .disk = nullptr,
                 .inject = std::nullopt,
                 .keep_timeline = false};
  KVTIER_ASSIGN_OR_RETURN(setup.disk, open_disk(*plan));
  KVTIER_ASSIGN_OR_RETURN(const RunRecord record, replay_run(std::move(setup), progress));
  std::uint64_t found = 0;
  std::uint64_t all = 0;
  for (int tier = 0; tier < kTierCount; ++tier) {
    const std::uint64_t hits = record.stats.tiers[static_cast<std::size_t>(tier)].hits;
    if (tier == static_cast<int>(Tier::kDevice)) found = hits;
    all += hits;
  }
  if (all == 0) return std::optional<double>(0.0);
  return std::optional(1.0 - static_cast<double>(found) / static_cast<double>(all));
}

}  // namespace

Result<ReuseCurve> ReuseCurve::from_trace(const std::string& path, const std::string& selector,
                                          const Budget& budget, std::uint32_t block_tokens,
                                          Progress& progress) {
  KVTIER_ASSIGN_OR_RETURN(
      const AttentionTrace trace,
      AttentionTrace::open(
          path, {.verify_sha256 = true, .only_layers = {}, .accept_unrotated_keys = false}));
  ReplayOptions options;
  options.trace_path = path;
  options.selectors = {selector};
  options.budgets = {budget};
  options.block_tokens = block_tokens;
  options.deterministic = true;
  options.host_capacity = Capacity::parse("110%").value();
  ReuseCurve curve;
  for (const char* share : {"3%", "6%", "10%", "20%", "40%", "70%"}) {
    options.device_capacity = Capacity::parse(share).value();
    KVTIER_ASSIGN_OR_RETURN(const auto missed, replay_missed(options, trace, progress));
    if (!missed) continue;
    curve.points_.push_back({Share::parse(share).value().fraction(), *missed});
  }
  progress.clear();
  if (curve.points_.empty()) {
    return unsupported(fmt::format(
        "{}: no replay at 3% to 70% of its KV was possible with {} at {}; `kvtier replay` says why",
        path, selector, budget.text()));
  }
  curve.described_ = fmt::format("measured: {} replayed with {} at {} at {} capacities", path,
                                 selector, budget.text(), curve.points_.size());
  return curve;
}

}  // namespace kvtier
