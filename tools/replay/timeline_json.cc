#include "tools/replay/timeline_json.h"

#include "runtime/timeline_json.h"

#include <fmt/format.h>

#include <vector>

namespace kvtier {

std::string timeline_json(std::span<const RunRecord> runs) {
  std::vector<TimelineProcess> processes;
  for (const RunRecord& run : runs) {
    std::string title = fmt::format("{} at {}", run.selector, run.budget);
    if (run.events_dropped > 0) {
      title += fmt::format(", {} later events left out", run.events_dropped);
    }
    processes.push_back({.title = std::move(title), .events = run.events});
  }
  return timeline_json(processes);
}

}  // namespace kvtier
