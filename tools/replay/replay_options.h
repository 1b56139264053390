#pragma once

#include "memory/status.h"
#include "runtime/options.h"
#include "selectors/selector.h"
#include "tools/cli/parse.h"
#include "transfer/fault_plan.h"
#include "transfer/open_file.h"

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace CLI {
class App;
}

namespace kvtier {

enum class ResultFormat : unsigned char { kTable, kJson, kCsv };

/// What `kvtier replay` was asked for: each value understood, none checked against the trace yet.
struct ReplayOptions {
  std::string trace_path;

  // What is run.
  std::vector<std::string> selectors;  ///< As typed; each is known to `make_selector_factory`.
  std::vector<Budget> budgets;
  std::vector<std::uint32_t> only_layers;  ///< Model layers; empty is all of the trace's.
  std::uint32_t block_tokens = 8;
  std::uint64_t extent_bytes = 128 * 1024;
  std::uint32_t sinks = 4;
  std::uint32_t window = 64;
  GroupReduction reduction = GroupReduction::kSum;
  EstimateRest estimate_rest = EstimateRest::kMeasured;

  // How it moves.
  std::string eviction;
  /// Four extents: about what the next layer misses when the band below the cut comes true.
  std::uint64_t look_ahead_bytes = 512 * 1024;
  std::uint64_t look_ahead_device_bytes = 0;
  /// Of the engine's other work that each layer's step is followed by; 0: none.
  std::uint32_t layer_compute_us = 0;
  /// The drive that the disk tier is slowed down to; 0: as fast as it is.
  double emulate_disk_gbps = 0;
  std::uint32_t emulate_disk_latency_us = 100;
  Capacity device_capacity;
  Capacity host_capacity;
  std::optional<Capacity> disk_capacity;  ///< None: what the trace needs.
  std::string disk_path;                  ///< Empty: a temporary directory.
  VerifyMode verify = VerifyMode::kArrivals;
  std::optional<FaultPlan> inject;
  bool deterministic = false;
  std::uint64_t seed = 0;
  FileBackend file_backend = FileBackend::kAuto;
  unsigned threads = 0;  ///< 0: all that the process may use.

  // What comes out.
  ResultFormat format = ResultFormat::kTable;
  std::string output_path;    ///< Empty: stdout.
  std::string timeline_path;  ///< Empty: none.

  ReplayOptions();
};

const char* to_string(GroupReduction reduction);
const char* to_string(VerifyMode mode);
const char* to_string(EstimateRest estimate);

/// What `--selector all` stands for: every selector that selects by itself, at its defaults.
inline constexpr std::string_view kAllSelectors = "all";

/// Adds the trace argument and every option to `verb`; parsing fills `options`. Values that cannot
/// be understood end parsing with a `CLI::ParseError` that names the option, what was found and
/// what is accepted.
void bind_replay_options(CLI::App& verb, ReplayOptions& options);

/// What the options contradict among themselves; `invalid_argument` names the option.
Status check_replay_options(const ReplayOptions& options);

}  // namespace kvtier
