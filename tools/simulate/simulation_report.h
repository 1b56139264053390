#pragma once

#include "tools/simulate/request_trace.h"
#include "tools/simulate/reuse_profile.h"
#include "tools/simulate/simulate_options.h"
#include "tools/simulate/simulation_result.h"

#include <nlohmann/json.hpp>

#include <string>
#include <vector>

namespace kvtier {

/// Finished runs over one trace: what was asked, on what, and what came of it. Borrows all but the
/// runs. Equal input and options give equal bytes, whatever the machine and the number of threads.
struct SimulationReport {
  const SimulateOptions* options = nullptr;
  const RequestTrace* trace = nullptr;
  const ReuseProfile* profile = nullptr;
  std::vector<SimulationRun> runs;
};

// `kvtier simulate`: a result per run. JSON is "kvtier.simulation-result", version 1; CSV has a row
// per run, and one per tier of a hierarchy.
std::string simulation_json(const SimulationReport& report);
std::string simulation_csv(const SimulationReport& report);
std::string simulation_table(const SimulationReport& report);

// `kvtier sweep`: a curve per policy over ascending capacities. JSON is "kvtier.sweep-result",
// version 1; CSV has a row per point.
std::string sweep_json(const SimulationReport& report);
std::string sweep_csv(const SimulationReport& report);
std::string sweep_table(const SimulationReport& report);

// Parts of them.
nlohmann::ordered_json options_to_json(const SimulateOptions& options);
nlohmann::ordered_json trace_to_json(const RequestTrace& trace, const ReuseProfile& profile);
/// The conventions and the trace, for people.
std::string trace_header(const SimulationReport& report);

}  // namespace kvtier
