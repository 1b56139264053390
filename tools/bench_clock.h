#pragma once

#include <algorithm>
#include <chrono>
#include <vector>

namespace kvtier {

/// Seconds that `body()` takes.
double seconds_of(const auto& body) {
  const auto begin = std::chrono::steady_clock::now();
  body();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

/// Of a number of measurements that is not 0.
inline double median(std::vector<double> values) {
  std::ranges::sort(values);
  return values[values.size() / 2];
}

}  // namespace kvtier
