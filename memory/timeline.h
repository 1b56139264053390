#pragma once

#include "memory/clock.h"

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace kvtier {

/// One row of a timeline: a stage of the step, or a link.
enum class Track : unsigned char {
  kAppend,
  kSelect,
  kResolve,
  kFetch,
  kAttend,
  kMerge,
  kLookAhead,
  kDiskToHost,
  kHostToDevice,
  kDeviceToHost,
  kHostToDisk,
};
inline constexpr int kTrackCount = 11;
/// "append", "disk_to_host", ...
const char* to_string(Track track);

/// Something that took time on a track.
struct TimelineEvent {
  Track track;
  /// A string literal.
  const char* name;
  Duration start;
  Duration duration;
  /// Bytes moved or read; 0 where that says nothing.
  std::uint64_t bytes;
};

/// Collects events of a run up to a fixed number; later ones are counted, not kept.
///
/// Recording is thread-safe, lock-free and allocates nothing. Reading is for after the run.
class Timeline {
 public:
  explicit Timeline(std::size_t capacity_events);

  void record(const TimelineEvent& event);
  /// Events in order of recording. Call when no thread records any more.
  std::span<const TimelineEvent> events() const;
  std::uint64_t dropped() const;

 private:
  std::vector<TimelineEvent> events_;
  std::atomic<std::size_t> next_{0};
};

}  // namespace kvtier
