#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <optional>
#include <vector>

namespace kvtier {

/// Mean over samples in the order they were added, so that equal input gives equal bits; none
/// without samples, since the mean of nothing is no number.
inline std::optional<double> mean_of(const std::vector<double>& samples) {
  if (samples.empty()) return std::nullopt;
  double sum = 0;
  for (const double sample : samples) sum += sample;
  return sum / static_cast<double>(samples.size());
}

/// The smallest sample that at least `share` of all samples do not exceed (nearest rank); none
/// without samples. `samples` is sorted.
inline std::optional<double> quantile_of_sorted(const std::vector<double>& samples, double share) {
  if (samples.empty()) return std::nullopt;
  const double rank = std::ceil(share * static_cast<double>(samples.size()));
  const std::size_t index = static_cast<std::size_t>(std::max(rank, 1.0)) - 1;
  return samples[std::min(index, samples.size() - 1)];
}

}  // namespace kvtier
