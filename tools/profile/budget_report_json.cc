#include "tools/profile/budget_report.h"

#include <fmt/format.h>
#include <nlohmann/json.hpp>

namespace kvtier {

namespace {

using BudgetJson = nlohmann::ordered_json;

template <typename T>
BudgetJson or_null(const std::optional<T>& value) {
  return value ? BudgetJson(*value) : BudgetJson(nullptr);
}

BudgetJson options_json(const BudgetOptions& options) {
  return {{"context_tokens", options.context_tokens},
          {"sequences", options.sequences},
          {"target_ms", or_null(options.target_ms)},
          {"selector", options.selector},
          {"budget", options.budget.text()},
          {"block_tokens", options.block_tokens},
          {"extent_bytes", options.extent_bytes},
          {"kv_dtype", options.kv_type.name},
          {"tensor_parallel", options.gpus},
          {"reserve_share", options.reserve.fraction()},
          {"reuse", options.reuse},
          {"trace", options.trace_path},
          {"machine", options.machine_path}};
}

BudgetJson model_json(const BudgetReport& report) {
  const ModelDescription& model = report.inputs->model;
  const double kv = report.options->kv_type.bytes;
  const KvTypes types{.kv_bytes = kv, .index_bytes = kv};
  BudgetJson json;
  json["file"] = model.file;
  json["digest"] = model.digest;
  json["model_type"] = model.model_type;
  json["max_positions"] = or_null(model.max_positions);
  json["rope"] = {{"theta", model.rope.theta},
                  {"local_theta", model.rope.local_theta},
                  {"scaling", model.rope.scaling},
                  {"factor", model.rope.factor}};
  json["parameters"] = model.parameters ? BudgetJson(model.parameters->total) : nullptr;
  json["parameters_active"] = model.parameters ? BudgetJson(model.parameters->active()) : nullptr;
  json["layers"] = BudgetJson::array();
  for (const LayerDescription& layer : model.layers) {
    const LayerBytes bytes = layer_bytes(layer, types, 1);
    json["layers"].push_back(
        {{"kind", to_string(layer.kind)},
         {"kv_heads", layer.kv_heads},
         {"key_dim", layer.key_dim},
         {"value_dim", layer.value_dim},
         {"window_tokens", layer.window_tokens},
         {"index_dim", layer.index_dim},
         {"stores_kv", layer.stores_kv},
         {"bytes_per_token", bytes.per_token},
         {"index_bytes_per_token", bytes.index_per_token},
         {"fixed_bytes", bytes.fixed},
         {"bytes", layer_bytes_at(layer, types, 1, report.options->context_tokens)}});
  }
  return json;
}

BudgetJson memory_json(const BudgetReport& report) {
  const BudgetPlan& plan = *report.plan;
  BudgetJson json;
  json["kv_bytes_per_token"] = plan.bytes.home_per_token;
  json["gpu"] = {{"kv_bytes_per_token", plan.bytes.growing_per_token},
                 {"kv_bytes_per_sequence", plan.bytes.growing},
                 {"fixed_bytes_per_sequence", plan.bytes.fixed},
                 {"index_bytes_per_sequence", plan.bytes.index},
                 {"selector_bytes_per_sequence", plan.bytes.selector},
                 {"step_slot_bytes_per_sequence", plan.bytes.held},
                 {"weight_bytes", plan.weight_bytes / report.options->gpus}};
  if (!plan.capacities_known) return json;
  json["capacities"] = {{"device_bytes", plan.capacities.device},
                        {"host_bytes", plan.capacities.host},
                        {"disk_bytes", plan.capacities.disk}};
  json["shares"] = {{"device", plan.fit.device_share},
                    {"host", plan.fit.host_share},
                    {"disk", plan.fit.disk_share}};
  json["sequences"] = {{"device", plan.fit.sequences_on_device},
                       {"host", plan.fit.sequences_with_host},
                       {"disk", plan.fit.sequences_with_disk}};
  return json;
}

BudgetJson step_json(const std::optional<StepTime>& step) {
  if (!step) return nullptr;
  return {{"total_ms", step->total() * 1e3},
          {"weights_ms", step->weights * 1e3},
          {"state_ms", step->state * 1e3},
          {"select_ms", step->select * 1e3},
          {"attend_ms", step->attend * 1e3},
          {"link_ms", step->link * 1e3},
          {"disk_ms", step->disk * 1e3},
          {"launch_ms", step->launch * 1e3},
          {"link_beside_attention", step->overlaps}};
}

BudgetJson even_json(const std::optional<BreakEven>& even) {
  if (!even) return nullptr;
  return {{"load_s", even->load_s}, {"faster_from_tokens", or_null(even->tokens)}};
}

BudgetJson times_json(const BudgetPlan& plan) {
  BudgetJson json;
  json["step"] = step_json(plan.step);
  json["full_attention"] = step_json(plan.full);
  json["curve"] = BudgetJson::array();
  for (const CurvePoint& point : plan.curve) {
    json["curve"].push_back({{"device_share", point.device_share},
                             {"device_bytes", point.device_bytes},
                             {"host_share", point.host_share},
                             {"host_bytes", point.host_bytes},
                             {"ms_per_token", point.ms}});
  }
  json["ms_per_device_gib"] = or_null(plan.ms_per_device_gib);
  json["ms_per_host_gib"] = or_null(plan.ms_per_host_gib);
  json["prefix"] = {{"tokens", plan.prefix_tokens},
                    {"recompute_s", or_null(plan.recompute_s)},
                    {"from_host", even_json(plan.from_host)},
                    {"from_disk", even_json(plan.from_disk)}};
  return json;
}

}  // namespace

std::string budget_json(const BudgetReport& report) {
  const BudgetPlan& plan = *report.plan;
  BudgetJson json;
  json["schema"] = "kvtier.budget";
  json["version"] = 1;
  json["options"] = options_json(*report.options);
  json["model"] = model_json(report);
  json["memory"] = memory_json(report);
  json["times"] = report.inputs->machine ? times_json(plan) : BudgetJson(nullptr);
  json["disk_wear"] = nullptr;
  if (plan.wear) {
    json["disk_wear"] = {{"tokens_per_day", plan.wear->tokens_per_day},
                         {"assumed", plan.wear->assumed},
                         {"bytes_per_day", plan.wear->bytes_per_day},
                         {"drive_writes_per_day", or_null(plan.wear->drive_writes_per_day)}};
  }
  json["assumptions"] = plan.assumptions;
  json["unanswered"] = plan.unanswered;
  json["requirements"] = BudgetJson::array();
  for (const Requirement& each : plan.requirements) {
    json["requirements"].push_back(
        {{"name", each.name}, {"passed", each.passed}, {"detail", each.detail}});
  }
  json["verdict"] = plan.requirements.empty() ? "not judged" : plan.passed() ? "PASS" : "FAIL";
  json["suggestions"] = BudgetJson::array();
  for (const Suggestion& each : report.suggestions) {
    json["suggestions"].push_back({{"command", each.command}, {"why", each.why}});
  }
  return json.dump(1, ' ', false, BudgetJson::error_handler_t::replace) + "\n";
}

}  // namespace kvtier
