#pragma once

#include "kernels/worker_pool.h"
#include "memory/status.h"
#include "selectors/selector.h"
#include "tools/replay/exact_attention.h"
#include "tools/replay/progress.h"
#include "tools/replay/replay_run.h"
#include "tools/trace/attention_trace.h"

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

namespace kvtier {

/// Mean, the value that 5 % of the samples do not exceed, and the smallest.
struct ShareSummary {
  double mean = 0;
  double p5 = 0;
  double min = 0;
};

struct ErrorSummary {
  double mean = 0;
  double max = 0;
};

/// How near a run came to exact attention, in one layer or in all. A sample is one query head at
/// one step; steps that failed give none. None where there is nothing to measure.
struct QualityFigures {
  std::uint64_t failed_steps = 0;
  /// Per head group and step.
  std::optional<double> tokens_attended_mean;
  /// Share of the exact attention mass that lies on attended tokens.
  std::optional<ShareSummary> recall;
  /// Its mean, divided by that of the best possible choice (see `measure_runs`).
  std::optional<double> recall_ratio;
  /// The same share over tokens outside sinks and window: mass found there / mass there, summed
  /// over all samples; and divided by the best possible choice's.
  std::optional<double> recall_long_range;
  std::optional<double> recall_long_range_ratio;
  /// Attended share of the mass on a turn's evidence, summed over the steps that predict a token of
  /// its answer: those at positions answer_start - 1 to end - 2. Questions do not look for evidence
  /// yet, and the query of the last token predicts what comes after the answer.
  std::optional<double> evidence_recall;
  /// Against exact attention over everything: what the selection costs.
  std::optional<ErrorSummary> output_error;
  /// Against exact attention over the attended tokens, from the trace's own bytes (and, where the
  /// step attended keys that its selector keeps, with those): what the runtime got wrong. Rounding
  /// alone unless a block was lost, swapped or used twice.
  std::optional<ErrorSummary> attended_error;
};

struct RunQuality {
  QualityFigures overall;
  std::vector<QualityFigures> layers;
};

/// Most that rounding explains of `attended_error`. float32 logits of a hundred carry 1e-5 each.
inline constexpr double kAttendedErrorMax = 1e-3;

/// Measures runs of one trace together: exact attention is computed once per step and layer.
///
/// The best possible choice is the oracle's: blocks of `shape.tokens_per_block` ranked by their
/// true mass under `shape.reduction`, at the same budget, with the same sinks and window. `runs[i]`
/// used `budgets[i]`. The result does not depend on the number of workers.
Result<std::vector<RunQuality>> measure_runs(const AttentionTrace& trace,
                                             const SelectorShape& shape,
                                             std::span<const RunRecord> runs,
                                             std::span<const Budget> budgets, WorkerPool& pool,
                                             Progress& progress);

}  // namespace kvtier
