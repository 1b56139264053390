#include "tools/replay/replay_report.h"

#include <fmt/format.h>

namespace kvtier {

std::vector<std::string> verification_failures(const RunRecord& run, const RunQuality& quality) {
  std::vector<std::string> failures = run.failures;
  if (run.stats.verification.failed > failures.size()) {
    failures.push_back(fmt::format("{} blocks in all could not be had intact, {} steps failed",
                                   run.stats.verification.failed, run.failed_steps));
  }
  failures.insert(failures.end(), run.problems.begin(), run.problems.end());
  if (failures.empty() && run.failed_steps > 0) {
    failures.push_back(fmt::format("{} steps failed", run.failed_steps));
  }
  for (int index = 0; index < kTierCount; ++index) {
    const TierStats& tier = run.stats.tiers[static_cast<std::size_t>(index)];
    if (tier.peak_bytes <= tier.capacity_bytes) continue;
    failures.push_back(fmt::format("{} tier held {} B, its capacity is {} B",
                                   to_string(static_cast<Tier>(index)), tier.peak_bytes,
                                   tier.capacity_bytes));
  }
  const auto& error = quality.overall.attended_error;
  // Written so that a figure that is no number fails too.
  if (error && !(error->max <= kAttendedErrorMax)) {
    failures.push_back(fmt::format(
        "output differs from attention over the attended tokens by {:.3g}, expected at most {:.3g}",
        error->max, kAttendedErrorMax));
  }
  return failures;
}

}  // namespace kvtier
