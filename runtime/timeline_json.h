#pragma once

#include "memory/timeline.h"

#include <cstdint>
#include <span>
#include <string>

namespace kvtier {

/// One run's events with the title that it is shown under.
struct TimelineProcess {
  std::string title;
  std::span<const TimelineEvent> events;
};

/// Chrome trace events of several runs: one process per run, in it one track per link and stage;
/// times in microseconds from each run's first event. Opens in Perfetto (ui.perfetto.dev).
std::string timeline_json(std::span<const TimelineProcess> runs);

}  // namespace kvtier
