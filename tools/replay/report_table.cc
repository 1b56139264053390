#include "memory/block_layout.h"
#include "tools/cli/text_table.h"
#include "tools/replay/replay_report.h"
#include "tools/replay/samples.h"
#include "tools/trace/json_document.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>

namespace kvtier {
namespace {

std::string share(std::optional<double> value) {
  return value ? fmt::format("{:.3f}", *value) : "-";
}

std::string header(const ReplayReport& report) {
  const TraceManifest& manifest = report.trace->manifest();
  const RuntimeOptions& runtime = report.plan.runtime;
  std::vector<std::uint32_t> layers;
  for (const TraceLayer& layer : report.trace->layers()) layers.push_back(layer.number);
  std::string text = fmt::format(
      "trace    {}: {}, layers {}, {} tokens, {} steps, {} of KV in {}\n", printable(manifest.name),
      printable(manifest.model.name), fmt::join(layers, " "), manifest.tokens, manifest.steps,
      format_bytes(report.trace->kv_bytes()), to_string(manifest.dtype));
  text += fmt::format("machine  {}, {} threads, {}, {} build\n", report.machine.cpu,
                      report.machine.threads, report.machine.simd, report.machine.build);
  const auto layout = BlockLayout::make(runtime.block);
  if (layout.ok()) text += fmt::format("blocks   {}\n", layout->describe());
  const FileTraits& disk = report.runs.front().disk;
  text += fmt::format(
      "tiers    device {}, host {}, disk {}", format_bytes(runtime.device_capacity_bytes),
      format_bytes(runtime.host_capacity_bytes), format_bytes(runtime.disk_capacity_bytes));
  if (runtime.disk_capacity_bytes > 0) {
    text += fmt::format(" in {} through {}{}", report.plan.disk.directory, disk.backend,
                        disk.direct ? " (direct)" : " (page cache)");
    if (!disk.reason.empty()) text += fmt::format("\n         {}", disk.reason);
  }
  text +=
      fmt::format("\nmoves    {} eviction, look-ahead {} a step, verify {}{}{}\n", runtime.eviction,
                  format_bytes(runtime.look_ahead_bytes), to_string(runtime.verify),
                  runtime.deterministic ? ", deterministic" : "",
                  report.options.inject ? ", inject " + report.options.inject->to_string() : "");
  return text;
}

std::string quality_table(const ReplayReport& report) {
  TextTable table(2);
  table.add({"selector", "budget", "tokens", "recall", "p5", "min", "of best", "far", "of best",
             "evidence", "error mean", "max"});
  for (std::size_t i = 0; i < report.runs.size(); ++i) {
    const QualityFigures& figures = report.qualities[i].overall;
    const auto& recall = figures.recall;
    const auto& error = figures.output_error;
    table.add(
        {report.runs[i].selector, report.runs[i].budget,
         figures.tokens_attended_mean ? fmt::format("{:.0f}", *figures.tokens_attended_mean) : "-",
         share(recall ? std::optional(recall->mean) : std::nullopt),
         share(recall ? std::optional(recall->p5) : std::nullopt),
         share(recall ? std::optional(recall->min) : std::nullopt), share(figures.recall_ratio),
         share(figures.recall_long_range), share(figures.recall_long_range_ratio),
         share(figures.evidence_recall), error ? fmt::format("{:.2g}", error->mean) : "-",
         error ? fmt::format("{:.2g}", error->max) : "-"});
  }
  return table.text();
}

std::string hit_shares(const RuntimeStats& stats) {
  std::uint64_t total = 0;
  for (const TierStats& tier : stats.tiers) total += tier.hits;
  if (total == 0) return "-";
  std::vector<std::string> shares;
  for (const TierStats& tier : stats.tiers) {
    shares.push_back(
        fmt::format("{:.1f}", 100.0 * static_cast<double>(tier.hits) / static_cast<double>(total)));
  }
  return fmt::format("{}", fmt::join(shares, " / "));
}

std::string milliseconds(const RunRecord& run, double quantile) {
  std::vector<double> times;
  for (const StepTiming& timing : run.timings) {
    times.push_back(static_cast<double>(timing.total.count()) / 1e6);
  }
  std::ranges::sort(times);
  const auto value = quantile_of_sorted(times, quantile);
  return value ? fmt::format("{:.2f}", *value) : "-";
}

std::string traffic_table(const ReplayReport& report) {
  TextTable table(2);
  table.add({"selector", "budget", "hits % device / host / disk", "disk>host", "host>device",
             "look-ahead used / wasted", "verified", "bad", "recovered", "failed", "ms p50", "p99",
             "steps/s"});
  for (const RunRecord& run : report.runs) {
    const RuntimeStats& stats = run.stats;
    const auto moved = [&](Route route) {
      return format_bytes(stats.routes[static_cast<std::size_t>(route)].submitted_bytes);
    };
    const double seconds = static_cast<double>(run.step_time.count()) / 1e9;
    const double steps = static_cast<double>(report.trace->query_positions().size());
    table.add({run.selector, run.budget, hit_shares(stats), moved(Route::kDiskToHost),
               moved(Route::kHostToDevice),
               fmt::format("{} / {}", format_bytes(stats.prefetch.useful_bytes),
                           format_bytes(stats.prefetch.wasted_bytes)),
               fmt::format("{}", stats.verification.verified),
               fmt::format("{}", stats.verification.mismatched),
               fmt::format("{}", stats.verification.recovered),
               fmt::format("{}", stats.verification.failed), milliseconds(run, 0.5),
               milliseconds(run, 0.99),
               seconds > 0 ? fmt::format("{:.1f}", steps / seconds) : "-"});
  }
  return table.text();
}

constexpr const char* kHiddenLegend =
    "disk wait: time that steps stood still for the disk. could: the most that could be hidden, "
    "for\n"
    "each token the smaller of the wait without look-ahead and the work done meanwhile; known: "
    "the\n"
    "same for the extents that a source had named for the step, whatever its budget was.\n\n";

// What look-ahead hid behind a stand-in for the engine's other work.
std::string hidden_table(const ReplayReport& report) {
  TextTable table(2);
  table.add({"selector", "budget", "disk wait s without / with", "work s", "could s", "hidden %",
             "extents known %", "known could s", "hidden %", "used / wasted", "late",
             "unforeseen"});
  bool any = false;
  for (const RunRecord& run : report.runs) {
    if (run.tokens_without.empty()) continue;
    any = true;
    const HiddenTime hidden = measure_hidden_time(run.tokens_without, run.tokens);
    const auto percent = [](std::optional<double> part) {
      return part ? fmt::format("{:.1f}", 100 * *part) : "-";
    };
    const std::uint64_t extents = hidden.foreseen + hidden.unforeseen;
    const PrefetchStats& prefetch = run.stats.prefetch;
    table.add({run.selector, run.budget,
               fmt::format("{:.3f} / {:.3f}", hidden.wait_without, hidden.wait_with),
               fmt::format("{:.2f}", hidden.own + hidden.stand_in),
               fmt::format("{:.3f}", hidden.hideable), percent(hidden.share()),
               extents == 0 ? "-"
                            : fmt::format("{:.1f}", 100.0 * static_cast<double>(hidden.foreseen) /
                                                        static_cast<double>(extents)),
               fmt::format("{:.3f}", hidden.hideable_foreseen), percent(hidden.share_of_foreseen()),
               fmt::format("{} / {}", format_bytes(prefetch.useful_bytes),
                           format_bytes(prefetch.wasted_bytes)),
               fmt::format("{}", prefetch.late), fmt::format("{}", prefetch.unforeseen)});
  }
  return any ? table.text() + kHiddenLegend : "";
}

constexpr const char* kLegend =
    "tokens: attended per KV head and step, sinks and window included. recall: share of the exact\n"
    "attention mass on them, over steps and query heads; far: the same outside sinks and window;\n"
    "of best: divided by the best possible choice of such blocks (single tokens can find more).\n"
    "evidence: share of the mass on the facts that an answer rests on. error: distance of the "
    "output\n"
    "from exact attention, relative.\n"
    "hits: where attended blocks were found (without sinks and window). ms: one layer's step.\n";

/// The next number with one digit that is not below.
double one_digit_up(double value) {
  if (!(value > 0)) return 0;
  const double unit = std::pow(10.0, std::floor(std::log10(value)));
  return std::ceil(value / unit) * unit;
}

std::string verdict(const ReplayReport& report) {
  std::string text;
  std::uint64_t verified = 0;
  std::uint64_t estimated = 0;
  double error = 0;
  for (std::size_t i = 0; i < report.runs.size(); ++i) {
    for (const LayerTraffic& layer : report.runs[i].layers) estimated += layer.rows_estimated;
    verified += report.runs[i].stats.verification.verified;
    const auto& attended = report.qualities[i].overall.attended_error;
    if (attended) error = std::max(error, attended->max);
    for (const std::string& failure : verification_failures(report.runs[i], report.qualities[i])) {
      text += fmt::format("FAILED   {} at {}: {}\n", report.runs[i].selector, report.runs[i].budget,
                          failure);
    }
  }
  if (!text.empty()) return text;
  if (estimated > 0) {
    text = fmt::format(
        "{} outputs (of a query head at a step) also hold an estimate of the tokens left out\n",
        estimated);
  }
  return text +
         fmt::format(
             "verified {} blocks on arrival; every output is attention over exactly the attended "
             "tokens (within {:.1g})\n",
             verified, one_digit_up(error));
}

}  // namespace

std::string report_table(const ReplayReport& report) {
  std::string left_out;
  for (const LeftOut& each : report.plan.left_out) {
    left_out += fmt::format("left out: {}, since the trace lacks {}\n", each.selector, each.lacks);
  }
  if (!left_out.empty()) left_out += "\n";
  return header(report) + "\n" + quality_table(report) + "\n" + traffic_table(report) + "\n" +
         hidden_table(report) + left_out + kLegend + "\n" + verdict(report);
}

}  // namespace kvtier
