#include "tools/cli/verbs.h"
#include "tools/replay/output_file.h"
#include "tools/replay/progress.h"
#include "tools/simulate/open_request_trace.h"
#include "tools/simulate/simulation_plan.h"
#include "tools/simulate/simulation_report.h"
#include "tools/simulate/sweep_run.h"
#include "tools/trace/json_document.h"
#include "transfer/sha256.h"

#include <CLI/CLI.hpp>
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <thread>

namespace kvtier {
namespace {

ExitCode code_of(const Status& status) {
  switch (status.code()) {
    case StatusCode::kInvalidArgument: return ExitCode::kUsage;
    case StatusCode::kNoSpace:
    case StatusCode::kIoError: return ExitCode::kFailed;
    default: return ExitCode::kBadInput;
  }
}

/// Lengths alone must never become a hit ratio.
Status require_identity(const RequestTrace& trace, const std::string& path) {
  if (trace.identity() != TraceIdentity::kNone) return {};
  const bool has_prefix_lengths = trace.format().starts_with("tracelab");
  return input_error(
      path, "identity", fmt::format("{} requests with lengths only", trace.requests().size()),
      "ids of blocks: without them there is no hit ratio",
      has_prefix_lengths
          ? "--identity prefix-lengths takes what the provider's cache held for all that is shared"
          : "");
}

/// What both verbs share: the trace, where the result goes, and the options made concrete.
struct Session {
  std::optional<RequestTrace> trace;
  std::optional<OutputFile> output;
  std::vector<PlannedSimulation> planned;
  bool with_optimal = false;
};

Status open_session(SimulateOptions& options, bool is_sweep, Session& session) {
  KVTIER_RETURN_IF_ERROR(check_simulate_options(options));
  if (!options.output_path.empty()) {
    auto output = OutputFile::open(options.output_path);
    if (!output.ok()) return invalid_argument("--output: " + output.status().message());
    session.output = std::move(*output);
  }
  auto trace = open_request_trace(options.trace_path, options.input_format, options.rules);
  if (!trace.ok() && trace.status().code() == StatusCode::kInvalidArgument) {
    return invalid_argument("--identity: " + trace.status().message());
  }
  if (!trace.ok()) return trace.status();
  KVTIER_RETURN_IF_ERROR(require_identity(*trace, options.trace_path));
  if (options.capacities.empty() && options.tiers.empty()) {
    if (is_sweep) {
      for (const std::uint64_t blocks : sweep_capacities(trace->unique_blocks(), options.points)) {
        options.capacities.push_back(BlockAmount::parse(fmt::format("{}", blocks)).value());
      }
    } else {
      for (const char* share : {"1%", "10%", "50%"}) {
        options.capacities.push_back(BlockAmount::parse(share).value());
      }
    }
  }
  KVTIER_ASSIGN_OR_RETURN(session.planned, plan_simulations(options, *trace));
  session.with_optimal = std::ranges::find(session.planned, "optimal",
                                           &PlannedSimulation::policy) != session.planned.end();
  session.trace = std::move(*trace);
  return {};
}

ExitCode write_report(const Session& session, const std::string& text) {
  if (!session.output) return print_result(text, ExitCode::kDone);
  const Status status = session.output->write(text);
  return status.ok() ? ExitCode::kDone : fail(ExitCode::kFailed, status);
}

ExitCode simulate_requests(SimulateOptions options) {
  Session session;
  const Status opened = open_session(options, false, session);
  if (!opened.ok()) return fail(code_of(opened), opened);
  Progress progress;
  progress.show("reuse of blocks", 0, session.planned.size());
  const Simulator simulator(*session.trace, options, session.with_optimal);
  SimulationReport report{&options, &*session.trace, &simulator.profile(), {}};
  for (const PlannedSimulation& planned : session.planned) {
    progress.show(planned.policy, report.runs.size(), session.planned.size());
    report.runs.push_back(simulator.run(planned));
  }
  progress.clear();
  return write_report(session, options.format == "json"  ? simulation_json(report)
                               : options.format == "csv" ? simulation_csv(report)
                                                         : simulation_table(report));
}

/// What finished runs depend on, and the order in which they are numbered.
std::string sweep_key(const SimulateOptions& options, const Session& session) {
  nlohmann::ordered_json key = options_to_json(options);
  key["digest"] = session.trace->digest();
  key["identity"] = to_string(session.trace->identity());
  for (const PlannedSimulation& planned : session.planned) {
    key["planned"].push_back(
        {planned.policy, planned.tiers.empty() ? 0 : planned.tiers.front().capacity_blocks});
  }
  const std::string text = key.dump();
  return "sha256:" + sha256_hex(std::as_bytes(std::span(text)));
}

ExitCode sweep_requests(SimulateOptions options) {
  Session session;
  const Status opened = open_session(options, true, session);
  if (!opened.ok()) return fail(code_of(opened), opened);
  const std::size_t total = session.planned.size();
  auto record = SweepRecord::open(options.resume_path, sweep_key(options, session), total);
  if (!record.ok()) return fail(code_of(record.status()), record.status());
  Progress progress;
  progress.show("reuse of blocks", 0, total);
  const Simulator simulator(*session.trace, options, session.with_optimal);
  const auto start = std::chrono::steady_clock::now();
  const std::size_t before = record->finished();
  const Status status = run_sweep(
      simulator, session.planned,
      options.threads > 0 ? options.threads : std::max(1u, std::thread::hardware_concurrency()),
      *record, [&](std::size_t finished) {
        const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
        const std::string left = time_left(finished - before, total - before, elapsed.count());
        progress.show(fmt::format("{} of {} runs{}{}", finished, total,
                                  left.empty() ? "" : ", time left ", left),
                      finished, total);
      });
  progress.clear();
  if (!status.ok()) return fail(ExitCode::kFailed, status);
  SimulationReport report{&options, &*session.trace, &simulator.profile(),
                          std::move(*record).take()};
  return write_report(session, options.format == "json"  ? sweep_json(report)
                               : options.format == "csv" ? sweep_csv(report)
                                                         : sweep_table(report));
}

}  // namespace

void add_simulate(CLI::App& app, ExitCode& exit_code) {
  CLI::App* verb = app.add_subcommand(
      "simulate", "Prefix reuse across the requests of a trace: policies, optimum and ceiling");
  auto options = std::make_shared<SimulateOptions>();
  bind_simulate_options(*verb, *options);
  verb->footer(
      "Exit code 3 where a trace has lengths only: there is no hit ratio without ids.\n\n"
      "Examples:\n"
      "  kvtier simulate tests/traces/agent-sessions --capacity-blocks 1024,10%\n"
      "  kvtier simulate tests/traces/mooncake/conversation-2000.jsonl.zst \\\n"
      "    --bytes-per-token 128KiB --tiers device=8GiB,host=64GiB,disk=512GiB --policy lru,arc");
  verb->callback([options, &exit_code] { exit_code = simulate_requests(*options); });
}

void add_sweep(CLI::App& app, ExitCode& exit_code) {
  CLI::App* verb = app.add_subcommand(
      "sweep", "Miss-ratio curves of a request trace: capacities times policies, on all cores");
  auto options = std::make_shared<SimulateOptions>();
  bind_sweep_options(*verb, *options);
  verb->footer(
      "Examples:\n"
      "  kvtier sweep tests/traces/agent-sessions --policy lru,sieve,optimal\n"
      "  kvtier sweep tests/traces/mooncake/conversation-2000.jsonl.zst --points 50 --format csv");
  verb->callback([options, &exit_code] { exit_code = sweep_requests(*options); });
}

}  // namespace kvtier
