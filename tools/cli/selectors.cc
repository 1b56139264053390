#include "selectors/registry.h"
#include "tools/cli/options.h"
#include "tools/cli/verbs.h"

#include <CLI/CLI.hpp>
#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <memory>
#include <string>

namespace kvtier {
namespace {

SelectorNeeds nothing() { return {}; }

std::string table(const std::vector<SelectorListing>& selectors) {
  std::string text;
  for (const SelectorListing& each : selectors) {
    std::string name = each.decorates ? each.name + "/..." : each.name;
    if (!each.alias.empty()) name += fmt::format(" ({})", each.alias);
    text += fmt::format("{}\n    {}\n", name, each.summary);
    const auto line = [&text](const char* label, const std::string& value) {
      if (!value.empty()) text += fmt::format("    {:<11} {}\n", label, value);
    };
    line("source", each.source);
    line("parameters", each.parameters);
    line("needs", missing_needs(each.needs, nothing()));
    line("keeps", each.metadata);
    line("building", each.build_cost);
    line("step", each.step_cost);
  }
  text +=
      "\nkeeps: bytes per token and KV head; building: work per appended token and KV head;\n"
      "step: work per step and KV head. name/... decorates the selector that follows it:\n"
      "refresh(interval=4)/mean. Every selector but decorators takes reduction=max|sum|mean.\n";
  return text;
}

std::string json(const std::vector<SelectorListing>& selectors) {
  nlohmann::ordered_json json;
  json["schema"] = "kvtier.selectors";
  json["version"] = 1;
  json["selectors"] = nlohmann::ordered_json::array();
  for (const SelectorListing& each : selectors) {
    json["selectors"].push_back({{"name", each.name},
                                 {"alias", each.alias},
                                 {"decorates", each.decorates},
                                 {"summary", each.summary},
                                 {"source", each.source},
                                 {"parameters", each.parameters},
                                 {"needs", missing_needs(each.needs, nothing())},
                                 {"metadata_bytes_per_token", each.metadata},
                                 {"build_cost_per_token", each.build_cost},
                                 {"step_cost", each.step_cost}});
  }
  return json.dump(1) + "\n";
}

}  // namespace

void add_selectors(CLI::App& app, ExitCode& exit_code) {
  CLI::App* verb = app.add_subcommand(
      "selectors", "List selectors: source, parameters, needs, and what they keep and cost");
  auto format = std::make_shared<std::string>("table");
  verb->add_option("--format", *format, "table or json")
      ->check(CLI::IsMember({"table", "json"}))
      ->capture_default_str();
  verb->callback([format, &exit_code] {
    const std::vector<SelectorListing> selectors = known_selectors();
    exit_code =
        print_result(*format == "json" ? json(selectors) : table(selectors), ExitCode::kDone);
  });
}

}  // namespace kvtier
