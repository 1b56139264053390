#pragma once

#include "memory/status.h"
#include "runtime/options.h"
#include "selectors/selector.h"
#include "tools/replay/replay_options.h"
#include "tools/trace/attention_trace.h"
#include "transfer/open_file.h"
#include "transfer/paced_file.h"

#include <cstdint>
#include <string>
#include <vector>

namespace kvtier {

/// One selector at one budget.
struct PlannedRun {
  std::string selector;  ///< As typed.
  SelectorFactory factory;
  Budget budget;
};

/// A selector that `all` would have run, and what the trace lacks for it.
struct LeftOut {
  std::string selector;
  std::string lacks;
};

/// The options made concrete for one trace: every number is in bytes and tokens, and everything
/// that can be refused before a run has been.
struct ReplayPlan {
  RuntimeOptions runtime;  ///< All but the selector.
  RuntimeNeeds needs;
  FileOptions disk;           ///< `bytes` is 0 when there is no disk tier.
  PacedFile::Pace disk_pace;  ///< Of the drive to emulate; 0 bytes a second is none.
  Duration layer_compute{};   ///< What each layer's step is followed by.
  std::vector<PlannedRun> runs;
  std::vector<LeftOut> left_out;

  /// What selectors are told about a layer; also what the oracle's choice is measured with.
  SelectorShape selector_shape() const;

  /// `invalid_argument` names the option, what was found and the least that would do;
  /// `unsupported` when no option could make this trace run, or when it lacks what a selector
  /// that was asked for by name needs.
  static Result<ReplayPlan> make(const ReplayOptions& options, const AttentionTrace& trace);
};

}  // namespace kvtier
