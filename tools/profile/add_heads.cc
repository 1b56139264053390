// kvtier profile heads: which KV heads look far back, from a recorded trace.

#include "tools/cli/options.h"
#include "tools/cli/text_table.h"
#include "tools/profile/head_profile.h"
#include "tools/profile/profile_verbs.h"
#include "tools/replay/output_file.h"

#include <CLI/CLI.hpp>
#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <limits>
#include <memory>
#include <optional>
#include <string>

namespace kvtier {
namespace {

using nlohmann::ordered_json;

struct HeadsOptions {
  std::string trace_path;
  HeadProfileOptions profile;
  std::string output_path;
  std::string format = "table";
  unsigned threads = 0;
};

Result<std::uint32_t> parse_tokens(std::string_view text) {
  KVTIER_ASSIGN_OR_RETURN(const std::uint64_t count, parse_count(text));
  if (count <= std::numeric_limits<std::int32_t>::max()) return static_cast<std::uint32_t>(count);
  return invalid_argument(fmt::format("found {}, expected at most {} tokens", text,
                                      std::numeric_limits<std::int32_t>::max()));
}

Result<double> parse_threshold(std::string_view text) {
  KVTIER_ASSIGN_OR_RETURN(const double value, parse_number(text));
  if (value >= 0.0 && value <= 1.0) return value;
  return invalid_argument(fmt::format("found {}, expected a part from 0 to 1", text));
}

Result<HeadProfileOptions::Rule> parse_rule(std::string_view text) {
  for (const auto rule :
       {HeadProfileOptions::Rule::kFarMass, HeadProfileOptions::Rule::kEvidence}) {
    if (text == rule_name(rule)) return rule;
  }
  return invalid_argument(fmt::format("found {}, expected far-mass or evidence", text));
}

Result<unsigned> parse_threads(std::string_view text) {
  KVTIER_ASSIGN_OR_RETURN(const std::uint64_t count, parse_count(text));
  if (count >= 1 && count <= 4096) return static_cast<unsigned>(count);
  return invalid_argument(fmt::format("found {}, expected 1 to 4096 threads", text));
}

struct Shares {
  std::size_t heads = 0;
  std::size_t retrieval = 0;
};

Shares count_heads(const HeadProfile& profile) {
  Shares shares;
  for (const std::vector<HeadFigures>& layer : profile.heads) {
    shares.heads += layer.size();
    for (const HeadFigures& head : layer) shares.retrieval += head.retrieval ? 1 : 0;
  }
  return shares;
}

std::string table(const HeadProfile& profile, const HeadsOptions& options,
                  const AttentionTrace& trace) {
  TextTable table(1);
  table.add({"layer", "KV head", "far mass", "p95", "evidence", "class"});
  for (std::size_t i = 0; i < profile.layers.size(); ++i) {
    for (std::size_t head = 0; head < profile.heads[i].size(); ++head) {
      const HeadFigures& figures = profile.heads[i][head];
      table.add({std::to_string(profile.layers[i]), std::to_string(head),
                 fmt::format("{:.3f}", figures.far_mass),
                 fmt::format("{:.3f}", figures.far_mass_high),
                 figures.evidence_mass ? fmt::format("{:.3f}", *figures.evidence_mass) : "-",
                 figures.retrieval ? "retrieval" : "streaming"});
    }
  }
  const Shares shares = count_heads(profile);
  std::string text = fmt::format(
      "trace     {}, {} steps over {} tokens\n"
      "held      {} sinks and a window of {}; retrieval from {} of {}\n\n{}\n"
      "{} of {} KV heads of these layers are retrieval heads\n",
      trace.manifest().name, trace.manifest().steps, trace.manifest().tokens, options.profile.sinks,
      options.profile.window, rule_name(options.profile.rule), options.profile.threshold,
      table.text(), shares.retrieval, shares.heads);
  text +=
      "far mass: attention between sinks and window, mean over the steps, of the query head "
      "with the most;\np95: exceeded at one step in twenty; evidence: attention on what an "
      "answer rests on\n";
  if (!options.output_path.empty()) {
    text += fmt::format("written   {}: head-class(file={})/SELECTOR reads it\n",
                        options.output_path, options.output_path);
  }
  return text;
}

std::string json(const HeadProfile& profile, const HeadsOptions& options,
                 const AttentionTrace& trace) {
  const Shares shares = count_heads(profile);
  ordered_json json = {{"schema", "kvtier.head-profile"},
                       {"version", 1},
                       {"options",
                        {{"trace", options.trace_path},
                         {"sinks", options.profile.sinks},
                         {"window", options.profile.window},
                         {"by", rule_name(options.profile.rule)},
                         {"threshold", options.profile.threshold},
                         {"output", options.output_path}}},
                       {"digest", trace.digest()},
                       {"steps", trace.manifest().steps},
                       {"kv_heads", shares.heads},
                       {"retrieval_heads", shares.retrieval},
                       {"heads", ordered_json::array()}};
  for (std::size_t i = 0; i < profile.layers.size(); ++i) {
    for (std::size_t head = 0; head < profile.heads[i].size(); ++head) {
      const HeadFigures& figures = profile.heads[i][head];
      json["heads"].push_back(
          {{"layer", profile.layers[i]},
           {"kv_head", head},
           {"far_mass", figures.far_mass},
           {"far_mass_p95", figures.far_mass_high},
           {"evidence_mass",
            figures.evidence_mass ? ordered_json(*figures.evidence_mass) : ordered_json(nullptr)},
           {"class", figures.retrieval ? "retrieval" : "streaming"}});
    }
  }
  return json.dump(1, ' ', false, ordered_json::error_handler_t::replace) + "\n";
}

ExitCode run_heads(const HeadsOptions& options) {
  std::optional<OutputFile> output;
  if (!options.output_path.empty()) {
    auto file = OutputFile::open(options.output_path);
    if (!file.ok()) {
      return fail(ExitCode::kUsage, invalid_argument("--output: " + file.status().message()));
    }
    output = std::move(*file);
  }
  const auto trace = AttentionTrace::open(options.trace_path);
  if (!trace.ok()) {
    // What this machine cannot do (memory) says nothing about the input.
    const bool machine_failed = trace.status().code() == StatusCode::kNoSpace;
    return fail(machine_failed ? ExitCode::kFailed : ExitCode::kBadInput, trace.status());
  }
  WorkerPool pool(options.threads);
  Progress progress;
  const auto profile = profile_heads(*trace, options.profile, pool, progress);
  progress.clear();
  if (!profile.ok()) return fail(ExitCode::kBadInput, profile.status());
  if (output) {
    const Status status = output->write(head_classes_json(*profile, options.profile, *trace));
    if (!status.ok()) return fail(ExitCode::kFailed, status);
  }
  return print_result(
      options.format == "json" ? json(*profile, options, *trace) : table(*profile, options, *trace),
      ExitCode::kDone);
}

}  // namespace

void add_profile_heads(CLI::App& profile, ExitCode& exit_code) {
  auto options = std::make_shared<HeadsOptions>();
  CLI::App* verb = profile.add_subcommand(
      "heads", "Tell retrieval heads from streaming ones by what they did in a recorded trace");
  verb->add_option("TRACE", options->trace_path,
                   "Folder of an attention trace, or its manifest.json")
      ->required()
      ->type_name("");
  add_value(*verb, "--sinks", options->profile.sinks, parse_tokens,
            "First tokens that a streaming head holds", "4");
  add_value(*verb, "--window", options->profile.window, parse_tokens,
            "Last tokens that a streaming head holds", "64");
  add_value(*verb, "--by", options->profile.rule, parse_rule,
            "What tells heads apart: far-mass (attention between sinks and window), or evidence "
            "(attention on what answers rest on)",
            "far-mass");
  add_value(*verb, "--threshold", options->profile.threshold, parse_threshold,
            "Part of a head's attention from which it is a retrieval head", "0.1");
  verb->add_option("--output", options->output_path,
                   "File for the classes, as head-class(file=...) reads them")
      ->type_name("");
  add_value(*verb, "--threads", options->threads, parse_threads, "Threads that attend", "all");
  verb->add_option("--format", options->format, "table or json (default: table)")
      ->check(CLI::IsMember({"table", "json"}))
      ->type_name("");
  verb->footer(
      "The classes are of the trace's layers in their order: replay the same layers with them.\n\n"
      "Examples:\n"
      "  kvtier profile heads tests/traces/smollm2-8k-demo --output heads.json\n"
      "  kvtier replay tests/traces/smollm2-8k-demo --selector "
      "\"head-class(file=heads.json)/scan\"");
  verb->callback([options, &exit_code] { exit_code = run_heads(*options); });
}

}  // namespace kvtier
