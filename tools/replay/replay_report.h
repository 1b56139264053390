#pragma once

#include "tools/replay/machine.h"
#include "tools/replay/replay_measure.h"
#include "tools/replay/replay_options.h"
#include "tools/replay/replay_plan.h"
#include "tools/replay/replay_run.h"
#include "tools/trace/attention_trace.h"

#include <string>
#include <vector>

namespace kvtier {

/// A finished replay: what was asked, on what, and what came of it. Written as a table for people,
/// as JSON ("kvtier.replay-result", version 1) or as CSV. Borrows the trace.
struct ReplayReport {
  ReplayOptions options;
  ReplayPlan plan;
  const AttentionTrace* trace = nullptr;
  MachineDescription machine;
  std::vector<RunRecord> runs;
  std::vector<RunQuality> qualities;  ///< One per run.
};

/// Why a run is not verified, one line each; empty when it is: every wanted block was had intact,
/// every report was sound, no tier went over its capacity, and the output of every step is
/// attention over exactly the tokens that the report names.
std::vector<std::string> verification_failures(const RunRecord& run, const RunQuality& quality);

/// Apart from `machine` and each run's `timing`, equal input and options give equal bytes.
std::string report_json(const ReplayReport& report);
/// One row per run and layer, "all" first; empty cells where there is no figure.
std::string report_csv(const ReplayReport& report);
std::string report_table(const ReplayReport& report);

}  // namespace kvtier
