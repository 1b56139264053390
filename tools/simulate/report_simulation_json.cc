#include "tools/simulate/simulation_report.h"

namespace kvtier {
namespace {

using ReportJson = nlohmann::ordered_json;

constexpr double kPicosecondsPerMicrosecond = 1e6;

template <typename T>
ReportJson or_null(const std::optional<T>& value) {
  return value ? ReportJson(*value) : ReportJson(nullptr);
}

ReportJson ratio_json(std::uint64_t part, std::uint64_t whole) {
  if (whole == 0) return nullptr;
  return static_cast<double>(part) / static_cast<double>(whole);
}

ReportJson quantiles_to_json(const Quantiles& quantiles, bool is_whole) {
  const auto figure = [is_whole](const std::optional<double>& value) -> ReportJson {
    if (!value) return nullptr;
    return is_whole ? ReportJson(static_cast<std::uint64_t>(*value)) : ReportJson(*value);
  };
  return {{"p10", figure(quantiles.p10)},
          {"p50", figure(quantiles.p50)},
          {"p90", figure(quantiles.p90)},
          {"p99", figure(quantiles.p99)}};
}

/// Bytes of KV, where the options say how many a token has.
ReportJson kv_bytes(const std::optional<std::uint64_t>& tokens, const SimulateOptions& options) {
  if (!tokens || options.bytes_per_token == 0) return nullptr;
  return *tokens * options.bytes_per_token;
}

ReportJson tier_to_json(const TierResult& tier, const SimulateOptions& options) {
  ReportJson json;
  json["capacity_blocks"] = or_null(tier.capacity_blocks);
  json["hit_blocks"] = tier.hit_blocks;
  json["hit_tokens"] = tier.hit_tokens;
  json["hit_bytes"] = kv_bytes(tier.hit_tokens, options);
  json["inserted_blocks"] = or_null(tier.inserted_blocks);
  json["inserted_tokens"] = or_null(tier.inserted_tokens);
  json["inserted_bytes"] = kv_bytes(tier.inserted_tokens, options);
  json["evicted_blocks"] = or_null(tier.evicted_blocks);
  return json;
}

void put_hits(const SimulationRun& run, const ReuseProfile& profile, ReportJson& json) {
  json["hit_tokens"] = run.hits.hit_tokens;
  json["hit_blocks"] = run.hits.hit_blocks;
  json["second_half_hit_tokens"] = run.hits.second_half_hit_tokens;
  json["token_hit_ratio"] = ratio_json(run.hits.hit_tokens, profile.input_tokens());
  json["second_half_token_hit_ratio"] =
      ratio_json(run.hits.second_half_hit_tokens, profile.second_half_input_tokens());
}

std::string dump(const ReportJson& json) {
  return json.dump(2, ' ', false, ReportJson::error_handler_t::replace) + "\n";
}

}  // namespace

nlohmann::ordered_json options_to_json(const SimulateOptions& options) {
  ReportJson json;
  json["policies"] = options.policies;
  json["capacities"] = ReportJson::array();
  for (const BlockAmount& capacity : options.capacities) {
    json["capacities"].push_back(capacity.text());
  }
  json["tiers"] = ReportJson::object();
  for (const TierAmount& tier : options.tiers) json["tiers"][tier.name] = tier.amount.text();
  json["hierarchy"] = to_string(options.hierarchy);
  json["bytes_per_token"] =
      options.bytes_per_token == 0 ? ReportJson(nullptr) : ReportJson(options.bytes_per_token);
  json["input_format"] = options.input_format ? to_string(*options.input_format) : "auto";
  json["identity"] = options.rules.identity ? to_string(*options.rules.identity) : "auto";
  json["order"] = to_string(options.rules.order);
  json["touch_order"] = to_string(options.touch_order);
  json["partial_blocks"] = options.rules.drop_partial_blocks ? "drop" : "keep";
  json["models"] = options.rules.separate_models ? "separate" : "merge";
  json["session_start_gap_s"] = static_cast<double>(options.rules.session_start_gap_us) / 1e6;
  json["block_tokens"] = options.rules.block_tokens == 0 ? ReportJson(nullptr)
                                                         : ReportJson(options.rules.block_tokens);
  const auto microseconds = [](std::uint64_t picoseconds) {
    return static_cast<double>(picoseconds) / kPicosecondsPerMicrosecond;
  };
  json["recompute_us"] = microseconds(options.costs.recompute_ps_per_token);
  json["recompute_us_per_token_before"] = microseconds(options.costs.recompute_ps_per_token_before);
  json["load_us"] = microseconds(options.costs.load_ps_per_token);
  return json;
}

nlohmann::ordered_json trace_to_json(const RequestTrace& trace, const ReuseProfile& profile) {
  ReportJson json;
  json["name"] = trace.name();
  json["format"] = trace.format();
  json["identity"] = to_string(trace.identity());
  json["digest"] = trace.digest();
  json["block_size"] =
      trace.block_tokens() == 0 ? ReportJson(nullptr) : ReportJson(trace.block_tokens());
  json["requests"] = trace.requests().size();
  json["input_tokens"] = profile.input_tokens();
  json["second_half_input_tokens"] = profile.second_half_input_tokens();
  json["output_tokens"] = profile.output_tokens();
  json["block_references"] = trace.references().size();
  json["unique_blocks"] = trace.unique_blocks();
  json["blocks_seen_once"] = profile.blocks_seen_once();
  json["any_position_hit_tokens"] = profile.any_position_hit_tokens();
  json["stack_distance_blocks"] = quantiles_to_json(profile.stack_distance_blocks(), true);
  json["reuse_time_s"] = quantiles_to_json(profile.reuse_time_s(), false);
  return json;
}

std::string simulation_json(const SimulationReport& report) {
  ReportJson json = {{"schema", "kvtier.simulation-result"},
                     {"version", 1},
                     {"options", options_to_json(*report.options)},
                     {"trace", trace_to_json(*report.trace, *report.profile)},
                     {"runs", ReportJson::array()}};
  for (const SimulationRun& run : report.runs) {
    ReportJson entry = {{"policy", run.policy}, {"capacity_blocks", or_null(run.capacity_blocks)}};
    put_hits(run, *report.profile, entry);
    entry["tiers"] = ReportJson::object();
    for (const TierResult& tier : run.tiers) {
      entry["tiers"][tier.name] = tier_to_json(tier, *report.options);
    }
    json["runs"].push_back(std::move(entry));
  }
  return dump(json);
}

std::string sweep_json(const SimulationReport& report) {
  ReportJson json = {{"schema", "kvtier.sweep-result"},
                     {"version", 1},
                     {"options", options_to_json(*report.options)},
                     {"trace", trace_to_json(*report.trace, *report.profile)},
                     {"curves", ReportJson::array()}};
  json["options"]["points"] = report.options->points;
  for (const SimulationRun& run : report.runs) {
    ReportJson& curves = json["curves"];
    if (curves.empty() || curves.back()["policy"] != run.policy) {
      curves.push_back({{"policy", run.policy}, {"points", ReportJson::array()}});
    }
    ReportJson point = {{"capacity_blocks", or_null(run.capacity_blocks)}};
    put_hits(run, *report.profile, point);
    point["token_miss_ratio"] = ratio_json(report.profile->input_tokens() - run.hits.hit_tokens,
                                           report.profile->input_tokens());
    const TierResult& tier = run.tiers.front();
    point["hit_bytes"] = kv_bytes(tier.hit_tokens, *report.options);
    point["inserted_blocks"] = or_null(tier.inserted_blocks);
    point["inserted_tokens"] = or_null(tier.inserted_tokens);
    point["inserted_bytes"] = kv_bytes(tier.inserted_tokens, *report.options);
    curves.back()["points"].push_back(std::move(point));
  }
  return dump(json);
}

}  // namespace kvtier
