#include "memory/timeline.h"

#include "memory/check.h"

#include <algorithm>

namespace kvtier {

const char* to_string(Track track) {
  constexpr const char* kNames[kTrackCount] = {
      "append",     "select",       "resolve",        "fetch",          "attend",      "merge",
      "look_ahead", "disk_to_host", "host_to_device", "device_to_host", "host_to_disk"};
  const auto index = static_cast<int>(track);
  KVTIER_CHECK(index < kTrackCount, "track {}", index);
  return kNames[index];
}

Timeline::Timeline(std::size_t capacity_events) : events_(capacity_events) {}

void Timeline::record(const TimelineEvent& event) {
  // Each recorder gets a place of its own, so no two threads write one event; readers wait for the
  // end of the run, which orders them after every write.
  const std::size_t place = next_.fetch_add(1, std::memory_order_relaxed);
  if (place < events_.size()) events_[place] = event;
}

std::span<const TimelineEvent> Timeline::events() const {
  return {events_.data(), std::min(events_.size(), next_.load(std::memory_order_acquire))};
}

std::uint64_t Timeline::dropped() const {
  const std::size_t recorded = next_.load(std::memory_order_relaxed);
  return recorded > events_.size() ? recorded - events_.size() : 0;
}

}  // namespace kvtier
