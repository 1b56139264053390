#pragma once

#include "memory/status.h"
#include "tools/simulate/simulation_plan.h"
#include "tools/simulate/simulation_result.h"

#include <cstddef>
#include <functional>
#include <optional>
#include <string>
#include <vector>

namespace kvtier {

/// Finished runs of a sweep on disk, so that one that was stopped goes on where it was. The file is
/// written whole or not at all; `key` says of which trace and options it is.
class SweepRecord {
 public:
  /// Without a path nothing is kept. Fails with `invalid_argument` when the file is of another
  /// sweep or cannot be written, and with `corrupt` when it is no such file.
  static Result<SweepRecord> open(const std::string& path, std::string key, std::size_t runs);

  const std::optional<SimulationRun>& run(std::size_t index) const { return runs_[index]; }
  std::size_t finished() const;
  void set(std::size_t index, SimulationRun run) { runs_[index] = std::move(run); }
  Status save() const;

  /// All runs, which must be finished.
  std::vector<SimulationRun> take() &&;

 private:
  SweepRecord(std::string path, std::string key, std::size_t runs)
      : path_(std::move(path)), key_(std::move(key)), runs_(runs) {}

  Status load();

  std::string path_;
  std::string key_;
  std::vector<std::optional<SimulationRun>> runs_;
};

/// Runs what the record lacks, a run at a time on each of `threads` threads, and saves it now and
/// then. `on_progress(finished)` is called from one thread at a time. The result does not depend on
/// the number of threads. Fails when saving does.
Status run_sweep(const Simulator& simulator, const std::vector<PlannedSimulation>& planned,
                 unsigned threads, SweepRecord& record,
                 const std::function<void(std::size_t)>& on_progress);

/// "1 min 20 s": time left when `done` of `total` took `elapsed_s`; empty at the start.
std::string time_left(std::size_t done, std::size_t total, double elapsed_s);

}  // namespace kvtier
