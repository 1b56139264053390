#include "tools/cli/parse.h"
#include "tools/cli/text_table.h"
#include "tools/simulate/simulation_report.h"
#include "tools/trace/json_document.h"

#include <fmt/format.h>

#include <map>

namespace kvtier {
namespace {

std::string percent_of(std::uint64_t part, std::uint64_t whole) {
  if (whole == 0) return "-";
  return fmt::format("{:.2f}", 100 * static_cast<double>(part) / static_cast<double>(whole));
}

std::string blocks_text(const std::optional<std::uint64_t>& blocks) {
  return blocks ? fmt::format("{}", *blocks) : "no bound";
}

/// Tokens, or bytes where a token has some.
std::string amount_text(const std::optional<std::uint64_t>& tokens,
                        const SimulateOptions& options) {
  if (!tokens) return "-";
  return options.bytes_per_token == 0 ? fmt::format("{}", *tokens)
                                      : format_bytes(*tokens * options.bytes_per_token);
}

std::string capacity_text(const std::optional<std::uint64_t>& blocks,
                          const SimulationReport& report) {
  const std::uint64_t block_bytes = report.options->bytes_per_token * report.trace->block_tokens();
  if (!blocks || block_bytes == 0) return "-";
  return format_bytes(*blocks * block_bytes);
}

std::string quantiles_text(const Quantiles& quantiles) {
  if (!quantiles.p50) return "none";
  return fmt::format("{} / {} / {} / {}", *quantiles.p10, *quantiles.p50, *quantiles.p90,
                     *quantiles.p99);
}

constexpr const char* kLegend =
    "hit: tokens of each prompt's leading run of blocks that were resident at arrival, of all "
    "input\n"
    "tokens; 2nd half: the same of the last half of the requests. written: what was taken in.\n"
    "optimal: offline, with bypass. infinite: nothing is ever evicted.\n";

}  // namespace

std::string trace_header(const SimulationReport& report) {
  const RequestTrace& trace = *report.trace;
  const ReuseProfile& profile = *report.profile;
  const TraceRules& rules = report.options->rules;
  std::string text = fmt::format("trace    {}: {}, {} requests, {} input and {} output tokens\n",
                                 printable(trace.name()), trace.format(), trace.requests().size(),
                                 profile.input_tokens(), profile.output_tokens());
  text +=
      fmt::format("blocks   {} references to {} blocks of {} tokens, {} seen once; ids: {}\n",
                  trace.references().size(), trace.unique_blocks(),
                  trace.block_tokens() == 0 ? "different" : fmt::format("{}", trace.block_tokens()),
                  profile.blocks_seen_once(), to_string(trace.identity()));
  text += fmt::format("rules    requests by {}, blocks touched {}, partial blocks {}, models {}\n",
                      to_string(rules.order), to_string(report.options->touch_order),
                      rules.drop_partial_blocks ? "dropped" : "kept",
                      rules.separate_models ? "separate" : "merged");
  text += fmt::format("reuse    p10 / p50 / p90 / p99: distance {} blocks, time {} s\n",
                      quantiles_text(profile.stack_distance_blocks()),
                      quantiles_text(profile.reuse_time_s()));
  return text;
}

std::string simulation_table(const SimulationReport& report) {
  const ReuseProfile& profile = *report.profile;
  const SimulateOptions& options = *report.options;
  const bool is_hierarchy = !options.tiers.empty();
  TextTable table(2);
  table.add({"policy", is_hierarchy ? "tier" : "", "blocks", "capacity", "hit %", "2nd half %",
             "hit", "written", "evicted blocks"});
  for (const SimulationRun& run : report.runs) {
    const bool is_single = run.tiers.size() == 1;
    const TierResult& first = run.tiers.front();
    table.add({run.policy, is_hierarchy ? "all" : "", blocks_text(run.capacity_blocks),
               capacity_text(run.capacity_blocks, report),
               percent_of(run.hits.hit_tokens, profile.input_tokens()),
               percent_of(run.hits.second_half_hit_tokens, profile.second_half_input_tokens()),
               amount_text(run.hits.hit_tokens, options),
               is_single ? amount_text(first.inserted_tokens, options) : "",
               is_single && first.evicted_blocks ? fmt::format("{}", *first.evicted_blocks) : ""});
    if (is_single) continue;
    for (const TierResult& tier : run.tiers) {
      table.add({"", tier.name, blocks_text(tier.capacity_blocks),
                 capacity_text(tier.capacity_blocks, report),
                 percent_of(tier.hit_tokens, profile.input_tokens()), "",
                 amount_text(tier.hit_tokens, options), amount_text(tier.inserted_tokens, options),
                 tier.evicted_blocks ? fmt::format("{}", *tier.evicted_blocks) : "-"});
    }
  }
  return trace_header(report) +
         (is_hierarchy ? fmt::format("tiers    {}\n", to_string(options.hierarchy)) : "") + "\n" +
         table.text() + "\n" + kLegend;
}

std::string sweep_table(const SimulationReport& report) {
  // A row per capacity, a column per policy.
  std::vector<std::string> policies;
  std::map<std::uint64_t, std::map<std::string, std::uint64_t>> hits;
  std::optional<std::uint64_t> ceiling;
  for (const SimulationRun& run : report.runs) {
    if (!run.capacity_blocks) {
      ceiling = run.hits.hit_tokens;
      continue;
    }
    if (policies.empty() || policies.back() != run.policy) policies.push_back(run.policy);
    hits[*run.capacity_blocks][run.policy] = run.hits.hit_tokens;
  }
  TextTable table(0);
  std::vector<std::string> header = {"blocks", "capacity"};
  for (const std::string& policy : policies) header.push_back(policy + " %");
  table.add(header);
  const std::uint64_t input = report.profile->input_tokens();
  for (const auto& [capacity, by_policy] : hits) {
    std::vector<std::string> row = {fmt::format("{}", capacity), capacity_text(capacity, report)};
    for (const std::string& policy : policies) {
      row.push_back(percent_of(by_policy.at(policy), input));
    }
    table.add(std::move(row));
  }
  return trace_header(report) + "\nhit % of input tokens\n" + table.text() +
         (ceiling ? fmt::format("\ninfinite: {} %\n", percent_of(*ceiling, input)) : "");
}

}  // namespace kvtier
