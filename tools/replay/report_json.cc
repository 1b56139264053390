#include "kernels/checksum.h"
#include "tools/cli/replay_result.h"
#include "tools/replay/replay_report.h"
#include "tools/replay/samples.h"

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <cmath>

namespace kvtier {
namespace {

using Json = nlohmann::ordered_json;

/// Null for what is absent or no number: JSON has neither NaN nor infinities.
Json number(std::optional<double> value) {
  if (!value || !std::isfinite(*value)) return nullptr;
  return *value;
}

std::string hexadecimal(std::uint64_t value) { return fmt::format("{:016x}", value); }

Json options_json(const ReplayReport& report) {
  const ReplayOptions& options = report.options;
  const RuntimeOptions& runtime = report.plan.runtime;
  Json json;
  json["selectors"] = options.selectors;
  json["budgets"] = Json::array();
  for (const Budget& budget : options.budgets) json["budgets"].push_back(budget.text());
  json["only_layers"] = Json::array();
  for (const TraceLayer& layer : report.trace->layers())
    json["only_layers"].push_back(layer.number);
  json["block_tokens"] = options.block_tokens;
  json["extent_bytes"] = options.extent_bytes;
  json["sinks"] = options.sinks;
  json["window"] = options.window;
  json["group_reduction"] = to_string(options.reduction);
  json["estimate_rest"] = to_string(options.estimate_rest);
  json["eviction"] = options.eviction;
  json["look_ahead_bytes"] = options.look_ahead_bytes;
  json["look_ahead_device_bytes"] = options.look_ahead_device_bytes;
  json["layer_compute_us"] = options.layer_compute_us;
  json["emulate_disk_gbps"] =
      options.emulate_disk_gbps > 0 ? Json(options.emulate_disk_gbps) : Json(nullptr);
  json["emulate_disk_latency_us"] = options.emulate_disk_latency_us;
  json["device_capacity_bytes"] = runtime.device_capacity_bytes;
  json["host_capacity_bytes"] = runtime.host_capacity_bytes;
  json["disk_capacity_bytes"] = runtime.disk_capacity_bytes;
  json["verify"] = to_string(options.verify);
  json["inject"] = options.inject ? Json(options.inject->to_string()) : Json(nullptr);
  json["deterministic"] = options.deterministic;
  json["seed"] = options.seed;
  return json;
}

Json trace_json(const AttentionTrace& trace) {
  const TraceManifest& manifest = trace.manifest();
  Json json;
  json["name"] = manifest.name;
  json["digest"] = trace.digest();
  json["model"] = {{"name", manifest.model.name},
                   {"query_heads", manifest.model.query_heads},
                   {"kv_heads", manifest.model.kv_heads},
                   {"head_dim", manifest.model.head_dim},
                   {"value_dim", manifest.model.value_dim}};
  json["dtype"] = to_string(manifest.dtype);
  json["tokens"] = manifest.tokens;
  json["steps"] = manifest.steps;
  json["layers"] = Json::array();
  for (const TraceLayer& layer : trace.layers()) json["layers"].push_back(layer.number);
  json["kv_bytes"] = trace.kv_bytes();
  return json;
}

Json region_json(const RegionStats& region) {
  Json json;
  json["bytes"] = region.bytes;
  json["numa_node"] = region.numa_node ? Json(*region.numa_node) : Json(nullptr);
  json["huge_page_bytes"] = region.huge_page_bytes;
  json["page_locked"] = region.page_locked;
  json["note"] = region.note;
  return json;
}

Json machine_json(const ReplayReport& report) {
  Json json;
  json["cpu"] = report.machine.cpu;
  json["threads"] = report.machine.threads;
  json["simd"] = report.machine.simd;
  json["build"] = report.machine.build;
  const FileTraits& disk = report.runs.front().disk;
  json["disk"] = {{"path", report.plan.disk.directory},
                  {"backend", disk.backend},
                  {"reason", disk.reason},
                  {"direct", disk.direct}};
  json["slab"] = region_json(report.runs.front().stats.slab);
  json["frames"] = region_json(report.runs.front().stats.frames);
  return json;
}

Json share_json(const std::optional<ShareSummary>& share) {
  Json json;
  json["mean"] = share ? number(share->mean) : Json(nullptr);
  json["p5"] = share ? number(share->p5) : Json(nullptr);
  json["min"] = share ? number(share->min) : Json(nullptr);
  return json;
}

Json error_json(const std::optional<ErrorSummary>& error) {
  Json json;
  json["mean"] = error ? number(error->mean) : Json(nullptr);
  json["max"] = error ? number(error->max) : Json(nullptr);
  return json;
}

void put_quality(const QualityFigures& figures, Json& json) {
  json["tokens_attended_mean"] = number(figures.tokens_attended_mean);
  json["recall"] = share_json(figures.recall);
  json["recall_ratio"] = number(figures.recall_ratio);
  json["recall_long_range"] = number(figures.recall_long_range);
  json["recall_long_range_ratio"] = number(figures.recall_long_range_ratio);
  json["evidence_recall"] = number(figures.evidence_recall);
  json["output_error"] = error_json(figures.output_error);
  json["attended_error"] = error_json(figures.attended_error);
  json["failed_steps"] = figures.failed_steps;
}

Json quantiles_json(const std::vector<StepTiming>& timings, Duration StepTiming::*stage) {
  std::vector<double> microseconds;
  for (const StepTiming& timing : timings) {
    microseconds.push_back(static_cast<double>((timing.*stage).count()) / 1e3);
  }
  std::ranges::sort(microseconds);
  return {{"p50", number(quantile_of_sorted(microseconds, 0.5))},
          {"p99", number(quantile_of_sorted(microseconds, 0.99))}};
}

void put_stages(const std::vector<StepTiming>& timings, Json& json) {
  json["select_us"] = quantiles_json(timings, &StepTiming::select);
  json["resolve_us"] = quantiles_json(timings, &StepTiming::resolve);
  json["fetch_us"] = quantiles_json(timings, &StepTiming::fetch);
  json["attend_us"] = quantiles_json(timings, &StepTiming::attend);
  json["merge_us"] = quantiles_json(timings, &StepTiming::merge);
  json["rest_us"] = quantiles_json(timings, &StepTiming::rest);
  json["look_ahead_us"] = quantiles_json(timings, &StepTiming::look_ahead);
  json["total_us"] = quantiles_json(timings, &StepTiming::total);
  std::uint64_t waits = 0;
  for (const StepTiming& timing : timings) waits += timing.waits;
  json["waits"] = waits;
}

Json hidden_json(const RunRecord& run) {
  const HiddenTime hidden = measure_hidden_time(run.tokens_without, run.tokens);
  return {{"disk_wait_without_seconds", hidden.wait_without},
          {"disk_wait_seconds", hidden.wait_with},
          {"hidden_seconds", hidden.hidden},
          {"own_seconds", hidden.own},
          {"stand_in_seconds", hidden.stand_in},
          {"hideable_seconds", hidden.hideable},
          {"hideable_foreseen_seconds", hidden.hideable_foreseen},
          {"foreseen_extents", hidden.foreseen},
          {"unforeseen_extents", hidden.unforeseen},
          {"share_of_hideable", number(hidden.share())},
          {"share_of_hideable_foreseen", number(hidden.share_of_foreseen())}};
}

Json timing_json(const ReplayReport& report, const RunRecord& run) {
  const std::size_t steps = report.trace->query_positions().size();
  const double seconds = static_cast<double>(run.step_time.count()) / 1e9;
  Json json;
  json["steps_per_second"] =
      seconds > 0 ? number(static_cast<double>(steps) / seconds) : Json(nullptr);
  json["append_seconds"] = static_cast<double>(run.append_time.count()) / 1e9;
  json["step_seconds"] = seconds;
  put_stages(run.timings, json);
  if (!run.tokens_without.empty()) json["hidden"] = hidden_json(run);
  // Here and not under `layers`, so that one key holds all that differs between equal runs.
  json["layers"] = Json::array();
  const std::size_t layers = report.trace->layers().size();
  for (std::size_t layer = 0; layer < layers; ++layer) {
    std::vector<StepTiming> timings;
    for (std::size_t i = layer; i < run.timings.size(); i += layers) {
      timings.push_back(run.timings[i]);
    }
    Json each;
    each["layer"] = report.trace->layers()[layer].number;
    put_stages(timings, each);
    json["layers"].push_back(each);
  }
  return json;
}

Json blocks_json(const VerificationStats& verification) {
  return {{"verified", verification.verified},
          {"mismatched", verification.mismatched},
          {"recovered", verification.recovered},
          {"failed", verification.failed}};
}

Json prefetch_json(const PrefetchStats& prefetch) {
  return {{"useful_bytes", prefetch.useful_bytes},
          {"wasted_bytes", prefetch.wasted_bytes},
          {"late", prefetch.late},
          {"unforeseen", prefetch.unforeseen}};
}

Json guesses_json(const GuessStats& guesses) {
  return {{"issued_bytes", guesses.issued_bytes},
          {"useful_bytes", guesses.useful_bytes},
          {"wasted_bytes", guesses.wasted_bytes}};
}

// Of a whole run: what each source of look-ahead came to on each link.
Json all_prefetch_json(const PrefetchStats& prefetch) {
  Json json = prefetch_json(prefetch);
  json["issued_bytes"] = prefetch.issued_bytes;
  json["to_device"] = guesses_json(prefetch.to_device);
  for (int index = 0; index < kGuessSourceCount; ++index) {
    const GuessSourceStats& source = prefetch.sources[static_cast<std::size_t>(index)];
    json["sources"][to_string(static_cast<GuessSource>(index))] = {
        {"to_host", guesses_json(source.to_host)},
        {"to_device", guesses_json(source.to_device)},
        {"to_host_budget_bytes", source.to_host_budget_bytes},
        {"to_device_budget_bytes", source.to_device_budget_bytes},
        {"halvings", source.halvings},
        {"doublings", source.doublings}};
  }
  return json;
}

void put_traffic(const RuntimeStats& stats, Json& json) {
  json["blocks"] = blocks_json(stats.verification);
  json["tiers"] = Json::object();
  for (int index = 0; index < kTierCount; ++index) {
    const TierStats& tier = stats.tiers[static_cast<std::size_t>(index)];
    json["tiers"][to_string(static_cast<Tier>(index))] = {{"capacity_bytes", tier.capacity_bytes},
                                                          {"peak_bytes", tier.peak_bytes},
                                                          {"hits", tier.hits},
                                                          {"held_hits", tier.held_hits},
                                                          {"evictions", tier.evictions}};
  }
  json["bytes"] = Json::object();
  for (int index = 0; index < kRouteCount; ++index) {
    json["bytes"][to_string(static_cast<Route>(index))] =
        stats.routes[static_cast<std::size_t>(index)].submitted_bytes;
  }
  json["prefetch"] = all_prefetch_json(stats.prefetch);
  json["metadata_bytes"] = stats.metadata_bytes;
  json["disk_writes_failed"] = stats.disk_writes_failed;
}

Json layer_json(const ReplayReport& report, std::size_t run, std::size_t layer) {
  Json json;
  json["layer"] = report.trace->layers()[layer].number;
  put_quality(report.qualities[run].layers[layer], json);
  const LayerTraffic& traffic = report.runs[run].layers[layer];
  json["hits"] = Json::object();
  json["held_hits"] = Json::object();
  for (int index = 0; index < kTierCount; ++index) {
    const char* const tier = to_string(static_cast<Tier>(index));
    json["hits"][tier] = traffic.hits[static_cast<std::size_t>(index)];
    json["held_hits"][tier] = traffic.held_hits[static_cast<std::size_t>(index)];
  }
  json["bytes"] = Json::object();
  for (int index = 0; index < kRouteCount; ++index) {
    json["bytes"][to_string(static_cast<Route>(index))] =
        traffic.bytes[static_cast<std::size_t>(index)];
  }
  json["blocks"] = blocks_json(traffic.verification);
  json["prefetch"] = prefetch_json(traffic.prefetch);
  json["metadata_bytes"] = traffic.metadata_bytes;
  json["estimated_rows"] = traffic.rows_estimated;
  json["steps_measured"] = traffic.steps_measured;
  return json;
}

Json faults_json(const RunRecord& run) {
  Json json = Json::object();
  for (int kind = 0; kind < kFaultKindCount; ++kind) {
    json[to_string(static_cast<FaultKind>(kind))] =
        run.faults_fired[static_cast<std::size_t>(kind)];
  }
  return json;
}

Json run_json(const ReplayReport& report, std::size_t index) {
  const RunRecord& run = report.runs[index];
  const RunQuality& quality = report.qualities[index];
  Json json;
  json["selector"] = run.selector;
  json["budget"] = run.budget;
  put_quality(quality.overall, json);
  put_traffic(run.stats, json);
  if (report.options.inject) json["faults_fired"] = faults_json(run);
  std::uint64_t rows_estimated = 0;
  for (const LayerTraffic& layer : run.layers) rows_estimated += layer.rows_estimated;
  json["estimated_rows"] = rows_estimated;
  json["steps_measured"] = run.stats.steps_measured;
  json["attended_digest"] = hexadecimal(run.attended.digest());
  json["output_digest"] = hexadecimal(checksum(std::as_bytes(std::span(run.outs))));
  const std::vector<std::string> failures = verification_failures(run, quality);
  json["verified"] = failures.empty();
  json["failures"] = failures;
  json["layers"] = Json::array();
  for (std::size_t layer = 0; layer < quality.layers.size(); ++layer) {
    json["layers"].push_back(layer_json(report, index, layer));
  }
  json["timing"] = timing_json(report, run);
  return json;
}

}  // namespace

std::string report_json(const ReplayReport& report) {
  Json json;
  json["schema"] = ReplayResultSummary::kSchema;
  json["version"] = ReplayResultSummary::kVersion;
  json["options"] = options_json(report);
  json["trace"] = trace_json(*report.trace);
  json["machine"] = machine_json(report);
  json["runs"] = Json::array();
  for (std::size_t run = 0; run < report.runs.size(); ++run) {
    json["runs"].push_back(run_json(report, run));
  }
  json["left_out"] = Json::array();
  for (const LeftOut& each : report.plan.left_out) {
    json["left_out"].push_back({{"selector", each.selector}, {"lacks", each.lacks}});
  }
  // Names come from files: a byte that is not UTF-8 must not end the program.
  return json.dump(1, ' ', false, Json::error_handler_t::replace) + "\n";
}

}  // namespace kvtier
