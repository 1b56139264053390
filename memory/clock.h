#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

namespace kvtier {

using Duration = std::chrono::nanoseconds;

/// Time as the runtime sees it: injected, so that a simulator can own it. Thread-safe.
class Clock {
 public:
  virtual ~Clock() = default;
  /// Nanoseconds since some fixed point; never goes back.
  virtual Duration now() const = 0;
};

/// The machine's monotonic clock.
class SteadyClock final : public Clock {
 public:
  Duration now() const override;
};

/// Stands still until told otherwise.
class ManualClock final : public Clock {
 public:
  Duration now() const override { return Duration{ticks_.load(std::memory_order_relaxed)}; }
  void advance(Duration by) { ticks_.fetch_add(by.count(), std::memory_order_relaxed); }

 private:
  std::atomic<std::int64_t> ticks_{0};
};

}  // namespace kvtier
