#pragma once

#include <chrono>

namespace kvtier {

/// Seconds that `body()` takes.
double seconds_of(const auto& body) {
  const auto begin = std::chrono::steady_clock::now();
  body();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

}  // namespace kvtier
