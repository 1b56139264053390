#include "tools/cli/options.h"
#include "tools/cli/verbs.h"
#include "tools/replay/output_file.h"
#include "tools/replay/replay_report.h"
#include "tools/replay/timeline_json.h"

#include <CLI/CLI.hpp>
#include <fmt/format.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <utility>

namespace kvtier {
namespace {

/// Where results go, checked before anything runs.
struct Outputs {
  std::optional<OutputFile> result;
  std::optional<OutputFile> timeline;
};

Result<std::optional<OutputFile>> open_output(const char* option, const std::string& path) {
  if (path.empty()) return std::optional<OutputFile>();
  auto file = OutputFile::open(path);
  if (file.ok()) return std::optional<OutputFile>(std::move(*file));
  return invalid_argument(fmt::format("{}: {}", option, file.status().message()));
}

std::string render(const ReplayReport& report) {
  switch (report.options.format) {
    case ResultFormat::kJson: return report_json(report);
    case ResultFormat::kCsv: return report_csv(report);
    case ResultFormat::kTable: break;
  }
  return report_table(report);
}

bool is_verified(const ReplayReport& report) {
  for (std::size_t i = 0; i < report.runs.size(); ++i) {
    if (!verification_failures(report.runs[i], report.qualities[i]).empty()) return false;
  }
  return true;
}

/// What failed, for readers of a result that does not stand on the terminal in words.
void tell_failures(const ReplayReport& report) {
  for (std::size_t i = 0; i < report.runs.size(); ++i) {
    const RunRecord& run = report.runs[i];
    for (const std::string& failure : verification_failures(run, report.qualities[i])) {
      fmt::print(stderr, "kvtier: {} at {}: {}\n", run.selector, run.budget, failure);
    }
  }
}

/// Writes timeline and result, whatever the verdict is.
ExitCode write_outputs(const ReplayReport& report, const Outputs& outputs) {
  if (outputs.timeline) {
    const Status status = outputs.timeline->write(timeline_json(report.runs));
    if (!status.ok()) return fail(ExitCode::kFailed, status);
  }
  const ExitCode verdict = is_verified(report) ? ExitCode::kDone : ExitCode::kRequirementFailed;
  if (outputs.result || report.options.format != ResultFormat::kTable) tell_failures(report);
  if (!outputs.result) return print_result(render(report), verdict);
  const Status status = outputs.result->write(render(report));
  return status.ok() ? verdict : fail(ExitCode::kFailed, status);
}

/// What look-ahead hides is told against the same run without it, which must attend the same.
Status run_without_look_ahead(const ReplayReport& report, const PlannedRun& run, Device& device,
                              Progress& progress, RunRecord& record) {
  RunSetup setup{.plan = &report.plan,
                 .trace = report.trace,
                 .run = &run,
                 .device = &device,
                 .disk = nullptr,
                 .inject = report.options.inject,
                 .look_ahead = false};
  KVTIER_ASSIGN_OR_RETURN(setup.disk, open_disk(report.plan));
  KVTIER_ASSIGN_OR_RETURN(RunRecord without, replay_run(std::move(setup), progress));
  record.tokens_without = std::move(without.tokens);
  if (without.attended.digest() != record.attended.digest()) {
    record.problems.push_back("attended other tokens than the run without look-ahead");
  }
  return {};
}

Status run_all(ReplayReport& report, Device& device, std::unique_ptr<File> first_disk,
               Progress& progress) {
  for (const PlannedRun& run : report.plan.runs) {
    RunSetup setup{.plan = &report.plan,
                   .trace = report.trace,
                   .run = &run,
                   .device = &device,
                   .disk = std::move(first_disk),
                   .inject = report.options.inject,
                   .keep_timeline = !report.options.timeline_path.empty()};
    if (!setup.disk) {
      KVTIER_ASSIGN_OR_RETURN(setup.disk, open_disk(report.plan));
    }
    KVTIER_ASSIGN_OR_RETURN(RunRecord record, replay_run(std::move(setup), progress));
    if (report.plan.layer_compute > Duration::zero()) {
      KVTIER_RETURN_IF_ERROR(run_without_look_ahead(report, run, device, progress, record));
    }
    report.runs.push_back(std::move(record));
  }
  return {};
}

ExitCode replay(const ReplayOptions& options, const AttentionTrace& trace) {
  ReplayReport report;
  report.options = options;
  report.trace = &trace;
  auto plan = ReplayPlan::make(options, trace);
  if (!plan.ok()) {
    const bool is_usage = plan.status().code() == StatusCode::kInvalidArgument;
    return fail(is_usage ? ExitCode::kUsage : ExitCode::kBadInput, plan.status());
  }
  report.plan = std::move(*plan);
  Outputs outputs;
  auto result = open_output("--output", options.output_path);
  if (!result.ok()) return fail(ExitCode::kUsage, result.status());
  outputs.result = std::move(*result);
  auto timeline = open_output("--timeline", options.timeline_path);
  if (!timeline.ok()) return fail(ExitCode::kUsage, timeline.status());
  outputs.timeline = std::move(*timeline);
  // The first run's file: its bytes are reserved before anything starts.
  auto disk = open_disk(report.plan);
  if (!disk.ok()) {
    return fail(ExitCode::kUsage,
                invalid_argument("--disk-path, --disk-capacity: " + disk.status().message()));
  }

  HostDevice device(options.threads);
  report.machine = describe_machine(device.workers().threads());
  Progress progress;
  Status status = run_all(report, device, std::move(*disk), progress);
  if (!status.ok()) {
    progress.clear();
    // The options were checked: a step refuses what the trace makes it ask.
    if (status.code() == StatusCode::kInvalidArgument) {
      return fail(ExitCode::kBadInput,
                  invalid_argument(trace.manifest_path() + ": " + status.message()));
    }
    return fail(ExitCode::kFailed, status);
  }
  std::vector<Budget> budgets;
  for (const PlannedRun& run : report.plan.runs) budgets.push_back(run.budget);
  auto qualities = measure_runs(trace, report.plan.selector_shape(), report.runs, budgets,
                                device.workers(), progress);
  progress.clear();
  if (!qualities.ok()) return fail(ExitCode::kBadInput, qualities.status());
  report.qualities = std::move(*qualities);
  return write_outputs(report, outputs);
}

ExitCode open_and_replay(const ReplayOptions& options) {
  const Status consistent = check_replay_options(options);
  if (!consistent.ok()) return fail(ExitCode::kUsage, consistent);
  auto trace = AttentionTrace::open(
      options.trace_path,
      {.verify_sha256 = true, .only_layers = options.only_layers, .accept_unrotated_keys = false});
  if (trace.ok()) return replay(options, *trace);
  if (trace.status().code() == StatusCode::kNoSpace) return fail(ExitCode::kFailed, trace.status());
  if (trace.status().code() != StatusCode::kInvalidArgument) {
    return fail(ExitCode::kBadInput, trace.status());
  }
  return fail(ExitCode::kUsage, invalid_argument("--only-layers: " + trace.status().message()));
}

}  // namespace

void add_replay(CLI::App& app, ExitCode& exit_code) {
  CLI::App* verb = app.add_subcommand(
      "replay", "Decode a recorded attention trace over device, host and disk; verify and measure");
  auto options = std::make_shared<ReplayOptions>();
  bind_replay_options(*verb, *options);
  verb->callback([options, &exit_code] { exit_code = open_and_replay(*options); });
}

}  // namespace kvtier
