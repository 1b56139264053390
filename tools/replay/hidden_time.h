#pragma once

#include "memory/clock.h"

#include <cstdint>
#include <optional>
#include <span>

namespace kvtier {

/// Where the time of one token (a step of every layer) went.
struct TokenTime {
  Duration disk_wait{};  ///< Waiting for the disk.
  Duration own{};        ///< Of the steps, without that wait.
  Duration stand_in{};   ///< The engine's other work that was stood in for.
  /// Extents that steps needed from disk: those that a source of look-ahead had named for the step
  /// (brought in time or late), and those that none had.
  std::uint64_t foreseen = 0;
  std::uint64_t unforeseen = 0;
};

/// How much of the disk's time look-ahead hid behind other work; sums over tokens, in seconds.
///
/// Without look-ahead a token waits for the disk for W. What can be hidden of it at most is the
/// time in which something else is done, C: its steps' own work and the stand-in, as measured in
/// the run with look-ahead. So the bound is min(W, C), token by token: `hideable` for a prediction
/// that knows every extent (an oracle), and `hideable_foreseen` for the one that is there, where W
/// counts only with the share of extents that it had foreseen. `hidden` is the wait without minus
/// the wait with look-ahead.
struct HiddenTime {
  double wait_without = 0;
  double wait_with = 0;
  double own = 0;
  double stand_in = 0;
  double hidden = 0;
  double hideable = 0;
  double hideable_foreseen = 0;
  std::uint64_t foreseen = 0;
  std::uint64_t unforeseen = 0;

  std::optional<double> share() const { return part(hidden, hideable); }
  std::optional<double> share_of_foreseen() const { return part(hidden, hideable_foreseen); }

 private:
  static std::optional<double> part(double some, double all) {
    return all > 0 ? std::optional(some / all) : std::nullopt;
  }
};

/// The same tokens twice.
HiddenTime measure_hidden_time(std::span<const TokenTime> without, std::span<const TokenTime> with);

}  // namespace kvtier
