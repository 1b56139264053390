#pragma once

#include <chrono>
#include <cstdint>
#include <string_view>

namespace kvtier {

/// One line on a terminal that says how far a run is; nothing at all where stderr is no terminal.
class Progress {
 public:
  Progress();
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  /// Redraws at most ten times a second, so call it as often as convenient.
  void show(std::string_view what, std::uint64_t done, std::uint64_t total);
  /// Removes the line.
  void clear();

 private:
  bool on_terminal_;
  bool drawn_ = false;
  std::chrono::steady_clock::time_point last_{};
};

}  // namespace kvtier
