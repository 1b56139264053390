#include "tools/cli/text_table.h"
#include "tools/profile/budget_report.h"

#include <fmt/format.h>

#include <algorithm>

namespace kvtier {

namespace {

std::string bytes_text(double bytes) {
  return bytes < 0 ? "-" + format_bytes(static_cast<std::uint64_t>(-bytes))
                   : format_bytes(static_cast<std::uint64_t>(bytes));
}

std::string shape_text(const LayerDescription& layer) {
  switch (layer.kind) {
    case LayerKind::kLinear:
      return fmt::format("state of {} + {} elements", layer.recurrent_elements,
                         layer.convolution_elements);
    case LayerKind::kMla: return fmt::format("1 x {}", layer.key_dim);
    case LayerKind::kMlaIndexed:
      return layer.index_dim > 0 ? fmt::format("1 x {}, indexer {}", layer.key_dim, layer.index_dim)
                                 : fmt::format("1 x {}, indexer of a layer before", layer.key_dim);
    case LayerKind::kFull: break;
    case LayerKind::kSliding: break;
  }
  std::string text = fmt::format("{} x ({} + {})", layer.kv_heads, layer.key_dim, layer.value_dim);
  if (layer.kind == LayerKind::kSliding) text += fmt::format(", window {}", layer.window_tokens);
  if (!layer.stores_kv) text += ", kept by an earlier layer";
  return text;
}

std::string layers_text(const BudgetReport& report) {
  const BudgetOptions& options = *report.options;
  const KvTypes types{.kv_bytes = options.kv_type.bytes, .index_bytes = options.kv_type.bytes};
  TextTable table(3);
  table.add({"layers", "kind", "KV heads x (key + value)", "B/token each", "B/token all",
             "at this context"});
  for (const LayerGroup& group : group_layers(report.inputs->model)) {
    const LayerBytes one = layer_bytes(group.layer, types, 1);
    const double each = one.per_token + one.index_per_token;
    table.add(
        {fmt::format("{}", group.count), to_string(group.layer.kind), shape_text(group.layer),
         group.layer.grows() ? fmt::format("{:g}", each) : "-",
         group.layer.grows() ? fmt::format("{:g}", each * group.count) : "-",
         bytes_text(group.count * layer_bytes_at(group.layer, types, 1, options.context_tokens))});
  }
  return table.text();
}

std::string memory_text(const BudgetReport& report) {
  const BudgetOptions& options = *report.options;
  const BudgetPlan& plan = *report.plan;
  const SequenceBytes& bytes = plan.bytes;
  const auto sequences = static_cast<double>(options.sequences);
  TextTable table(1);
  table.add({"on each GPU", "per token", "per sequence", "all sequences"});
  const auto row = [&](const char* name, double per_token, double each) {
    table.add({name, per_token > 0 ? fmt::format("{:g} B", per_token) : "-", bytes_text(each),
               bytes_text(sequences * each)});
  };
  row("KV that grows", bytes.growing_per_token, bytes.growing);
  row("windows and states", 0, bytes.fixed);
  const auto context = static_cast<double>(options.context_tokens);
  if (bytes.index > 0) row("the model's indexer", bytes.index / context, bytes.index);
  if (bytes.selector > 0) {
    row(fmt::format("selector {}", options.selector).c_str(), bytes.selector / context,
        bytes.selector);
  }
  row("slots a step needs", 0, bytes.held);
  std::string text = table.text();
  text += fmt::format("\nweights            {} on each of {} GPU(s)\n",
                      bytes_text(plan.weight_bytes / options.gpus), options.gpus);
  if (!plan.capacities_known) return text;
  const MemoryFit& fit = plan.fit;
  text += fmt::format(
      "what lies where    device {:.1f}% of the KV in {} of slots; at home in host memory {:.1f}%, "
      "on disk {:.1f}%\n"
      "sequences          {} with everything on the device, {} with KV in host memory, {} with "
      "disk\n",
      100 * fit.device_share, bytes_text(std::max(0.0, fit.device_cache)), 100 * fit.host_share,
      100 * fit.disk_share, fit.sequences_on_device, fit.sequences_with_host,
      fit.sequences_with_disk);
  return text;
}

std::string step_text(const char* name, const StepTime& step) {
  return fmt::format(
      "{:<18} {:.3g} ms per token: weights {:.3g}, states {:.3g}, choosing {:.3g}, attention "
      "{:.3g}, link {:.3g}, disk {:.3g}, launches {:.3g}{}\n",
      name, step.total() * 1e3, step.weights * 1e3, step.state * 1e3, step.select * 1e3,
      step.attend * 1e3, step.link * 1e3, step.disk * 1e3, step.launch * 1e3,
      step.overlaps ? " (link beside attention)" : "");
}

std::string curve_text(const BudgetPlan& plan) {
  if (plan.curve.empty()) return "";
  std::vector<double> hosts;
  for (const CurvePoint& point : plan.curve) {
    if (std::ranges::find(hosts, point.host_share) == hosts.end()) {
      hosts.push_back(point.host_share);
    }
  }
  TextTable table(1);
  std::vector<std::string> head = {"ms per token", "slots on each GPU"};
  for (const double share : hosts) {
    const auto found = std::ranges::find(plan.curve, share, &CurvePoint::host_share);
    head.push_back(fmt::format("host {:.0f}% = {}", 100 * share, bytes_text(found->host_bytes)));
  }
  table.add(head);
  for (std::size_t i = 0; i < plan.curve.size(); i += hosts.size()) {
    const CurvePoint& first = plan.curve[i];
    std::vector<std::string> row = {fmt::format("device {:.0f}%", 100 * first.device_share),
                                    bytes_text(first.device_bytes)};
    for (std::size_t h = 0; h < hosts.size(); ++h) {
      row.push_back(fmt::format("{:.3g}", plan.curve[i + h].ms));
    }
    table.add(row);
  }
  return "\n" + table.text();
}

std::string even_text(const char* name, const std::optional<BreakEven>& even,
                      const BudgetPlan& plan) {
  if (!even) return "";
  std::string text =
      fmt::format("{:<18} {:.3g} s for {} tokens", name, even->load_s, plan.prefix_tokens);
  if (!plan.recompute_s) return text + "\n";
  text += fmt::format("; computing {:.3g} s; loading is faster ", *plan.recompute_s);
  if (!even->tokens) return text + "at no length up to the context\n";
  return text + (*even->tokens == 0 ? "from the first block on\n"
                                    : fmt::format("from {} tokens on\n", *even->tokens));
}

std::string times_text(const BudgetReport& report) {
  const BudgetPlan& plan = *report.plan;
  std::string text;
  if (plan.step) text += step_text("a step", *plan.step);
  if (plan.full) text += step_text("full attention", *plan.full);
  if (plan.ms_per_device_gib) {
    text +=
        fmt::format("one more GiB       of GPU memory {:.3g} ms per token, of host memory {:.3g}\n",
                    *plan.ms_per_device_gib, *plan.ms_per_host_gib);
  }
  text += even_text("prefix from host", plan.from_host, plan);
  text += even_text("prefix from disk", plan.from_disk, plan);
  if (plan.wear) {
    text += fmt::format("disk wear          {} a day for {:.4g} new tokens{}{}\n",
                        bytes_text(plan.wear->bytes_per_day), plan.wear->tokens_per_day,
                        plan.wear->assumed ? " (decoding without a break)" : "",
                        plan.wear->drive_writes_per_day
                            ? fmt::format("; {:.3g} of the disk", *plan.wear->drive_writes_per_day)
                            : "");
  }
  return text + curve_text(plan);
}

}  // namespace

std::vector<LayerGroup> group_layers(const ModelDescription& model) {
  std::vector<LayerGroup> groups;
  for (const LayerDescription& layer : model.layers) {
    const auto found = std::ranges::find(groups, layer, &LayerGroup::layer);
    if (found == groups.end()) {
      groups.push_back({layer, 1});
    } else {
      ++found->count;
    }
  }
  return groups;
}

std::string budget_table(const BudgetReport& report) {
  const BudgetOptions& options = *report.options;
  const BudgetPlan& plan = *report.plan;
  const ModelDescription& model = report.inputs->model;
  std::string text = fmt::format("model    {} ({}, {} layers", options.model_path, model.model_type,
                                 model.layers.size());
  if (model.parameters) {
    text += fmt::format(", about {:.3g} parameters, {:.3g} active", model.parameters->total,
                        model.parameters->active());
  }
  text += fmt::format(")\nasked    {} sequence(s) of {} tokens, {} attended, KV in {}\n",
                      options.sequences, options.context_tokens, options.budget.text(),
                      options.kv_type.name);
  if (report.inputs->machine) {
    text += fmt::format("machine  {} ({})\n", report.inputs->machine->name,
                        report.inputs->machine->source);
  }
  text += "\n" + layers_text(report) + "\n" + memory_text(report) + times_text(report);
  text += "\nassumed\n";
  for (const std::string& line : plan.assumptions) text += "  " + line + "\n";
  if (!plan.unanswered.empty()) text += "\nnot answered\n";
  for (const std::string& line : plan.unanswered) text += "  " + line + "\n";
  text += "\n";
  for (const Requirement& each : plan.requirements) {
    text += fmt::format("{}  {:<8} {}\n", each.passed ? "pass" : "FAIL", each.name, each.detail);
  }
  text += plan.requirements.empty() ? "not judged: no capacities\n"
          : plan.passed()           ? "PASS\n"
                                    : "FAIL\n";
  if (!report.suggestions.empty()) text += "\ntry\n";
  for (const Suggestion& each : report.suggestions) {
    text += fmt::format("  {}\n    # {}\n", each.command, each.why);
  }
  return text;
}

}  // namespace kvtier
