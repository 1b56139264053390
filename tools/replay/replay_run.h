#pragma once

#include "memory/timeline.h"
#include "runtime/runtime.h"
#include "tools/replay/attended_sets.h"
#include "tools/replay/hidden_time.h"
#include "tools/replay/progress.h"
#include "tools/replay/replay_plan.h"
#include "tools/trace/attention_trace.h"
#include "transfer/fault_plan.h"
#include "transfer/file.h"

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace kvtier {

/// What one layer's appends and steps found and moved.
struct LayerTraffic {
  std::array<std::uint64_t, kTierCount> hits{};
  std::array<std::uint64_t, kTierCount> held_hits{};
  /// Submitted, look-ahead for the next layer included.
  std::array<std::uint64_t, kRouteCount> bytes{};
  VerificationStats verification;
  PrefetchStats prefetch;
  std::uint64_t metadata_bytes = 0;  ///< Of its selector, at its peak.
  std::uint64_t rows_estimated = 0;  ///< Of its outputs (a query head at a step).
  std::uint64_t steps_measured = 0;
};

/// Everything that one run did and returned, kept until all runs are measured together.
struct RunRecord {
  /// Failures that are told in full; all are counted.
  static constexpr std::size_t kFailuresKept = 16;

  std::string selector;
  std::string budget;
  SelectorFactory factory;  ///< Of the selector.

  // In the order of stepping: step by step, layer by layer within a step.
  AttendedSets attended;    ///< [steps, layers, head groups]
  std::vector<float> outs;  ///< [steps, layers, query_heads, value_dim]
  /// The same without estimates of the rest; empty when there were none.
  std::vector<float> attended_outs;
  std::vector<std::uint8_t> failed;            ///< [steps, layers]
  std::vector<std::uint64_t> tokens_attended;  ///< [steps, layers], summed over head groups.
  std::vector<StepTiming> timings;             ///< [steps, layers]

  std::vector<LayerTraffic> layers;  ///< [layers]
  std::vector<TokenTime> tokens;     ///< [steps]
  /// The same run without look-ahead, where something stands in for the engine's other work.
  std::vector<TokenTime> tokens_without;

  std::uint64_t failed_steps = 0;
  std::vector<std::string> failures;  ///< The first blocks that were not to be had.
  std::vector<std::string> problems;  ///< Steps whose report was not sound.

  RuntimeStats stats;
  FileTraits disk;
  std::array<std::uint64_t, kFaultKindCount> faults_fired{};
  Duration append_time{};
  Duration step_time{};
  std::vector<TimelineEvent> events;
  std::uint64_t events_dropped = 0;
};

/// Opens the file of the disk tier, its bytes reserved; null when the plan has none.
Result<std::unique_ptr<File>> open_disk(const ReplayPlan& plan);

/// What runs share, and what belongs to one of them.
struct RunSetup {
  const ReplayPlan* plan = nullptr;
  const AttentionTrace* trace = nullptr;
  const PlannedRun* run = nullptr;
  Device* device = nullptr;
  std::unique_ptr<File> disk;
  std::optional<FaultPlan> inject;
  bool keep_timeline = false;
  bool look_ahead = true;  ///< False: whatever the plan says, without.
};

/// Replays the trace once: appends the tokens up to each query's own, and steps every layer.
/// A block that could not be had fails its step, which is recorded, and the run goes on. Fails when
/// the runtime does.
Result<RunRecord> replay_run(RunSetup setup, Progress& progress);

}  // namespace kvtier
