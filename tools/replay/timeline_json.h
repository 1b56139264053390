#pragma once

#include "tools/replay/replay_run.h"

#include <span>
#include <string>

namespace kvtier {

/// The timeline of several replays, one process each; see `runtime/timeline_json.h`.
std::string timeline_json(std::span<const RunRecord> runs);

}  // namespace kvtier
