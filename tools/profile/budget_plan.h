#pragma once

#include "memory/status.h"
#include "tools/profile/budget_options.h"
#include "tools/profile/machine_profile.h"
#include "tools/profile/memory_fit.h"
#include "tools/profile/model_description.h"
#include "tools/profile/reuse_curve.h"
#include "tools/profile/step_time.h"

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace kvtier {

/// Everything that is read or measured once, whatever is then asked of it.
struct BudgetInputs {
  ModelDescription model;
  std::optional<MachineProfile> machine;
  std::optional<ReuseCurve> measured_reuse;  ///< None: the standard curve of the question.
  SelectorTable selectors;
};

/// Milliseconds per token with other capacities; the rest as asked.
struct CurvePoint {
  double device_share = 0;  ///< Of the KV of all sequences.
  double device_bytes = 0;  ///< Slots on each GPU.
  double host_share = 0;
  double host_bytes = 0;
  double ms = 0;
};

/// From how many tokens on loading a prefix is faster than computing it.
struct BreakEven {
  /// 0: from the first block on. None: never within the context.
  std::optional<std::uint64_t> tokens;
  double load_s = 0;  ///< At the prefix that was asked for.
};

struct DiskWear {
  double tokens_per_day = 0;
  bool assumed = false;  ///< Decoding without a break, because no traffic was given.
  double bytes_per_day = 0;
  std::optional<double> drive_writes_per_day;
};

struct Requirement {
  std::string name;
  bool passed = false;
  std::string detail;
};

/// The answers. What could not be answered says why in `unanswered`.
struct BudgetPlan {
  SequenceBytes bytes;
  double weight_bytes = 0;
  Capacities capacities;
  bool capacities_known = false;
  MemoryFit fit;

  std::optional<StepTime> step;  ///< Of all sequences; each gets one token of it.
  std::optional<StepTime> full;
  std::vector<CurvePoint> curve;
  std::optional<double> ms_per_device_gib;  ///< What one more GiB on every GPU takes off a token.
  std::optional<double> ms_per_host_gib;

  std::uint64_t prefix_tokens = 0;
  std::optional<BreakEven> from_host;
  std::optional<BreakEven> from_disk;
  std::optional<double> recompute_s;
  std::optional<DiskWear> wear;

  std::vector<Requirement> requirements;
  std::vector<std::string> assumptions;
  std::vector<std::string> unanswered;

  double ms() const { return step ? step->total() * 1e3 : 0; }
  bool passed() const;
};

/// Reads and measures what the options name. Errors: `invalid_argument` names an option; anything
/// else is about an input.
Result<BudgetInputs> read_budget_inputs(const BudgetOptions& options);

/// Answers without reading anything. Deterministic; takes microseconds, so that suggestions can be
/// searched for. Fails with `unsupported` when a figure is missing that the question needs.
Result<BudgetPlan> plan_budget(const BudgetInputs& inputs, const BudgetOptions& options);

/// Another question, and what its answer is.
struct Suggestion {
  std::string command;
  std::string why;
};

/// What would pass where this fails; how much further one can go where it passes.
std::vector<Suggestion> suggest(const BudgetInputs& inputs, const BudgetOptions& options,
                                const BudgetPlan& plan);

}  // namespace kvtier
