#pragma once

#include "tools/replay/replay_run.h"

#include <span>
#include <string>

namespace kvtier {

/// Chrome trace events of several runs: one process per run, in it one track per link and stage;
/// times in microseconds from each run's first event. Opens in Perfetto (ui.perfetto.dev).
std::string timeline_json(std::span<const RunRecord> runs);

}  // namespace kvtier
