#include "tools/simulate/simulation_report.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

namespace kvtier {
namespace {

std::string csv_count(const std::optional<std::uint64_t>& value) {
  return value ? fmt::format("{}", *value) : "";
}

std::string csv_ratio(std::uint64_t part, std::uint64_t whole) {
  if (whole == 0) return "";
  return fmt::format("{}", static_cast<double>(part) / static_cast<double>(whole));
}

std::string csv_bytes(const std::optional<std::uint64_t>& count, std::uint64_t bytes_each) {
  return count && bytes_each > 0 ? fmt::format("{}", *count * bytes_each) : "";
}

std::uint64_t block_bytes(const SimulationReport& report) {
  return report.options->bytes_per_token * report.trace->block_tokens();
}

}  // namespace

std::string simulation_csv(const SimulationReport& report) {
  std::string text =
      "policy,tier,capacity_blocks,capacity_bytes,hit_blocks,hit_tokens,hit_bytes,token_hit_ratio,"
      "second_half_hit_tokens,second_half_token_hit_ratio,inserted_blocks,inserted_tokens,"
      "inserted_bytes,evicted_blocks\n";
  const std::uint64_t token_bytes = report.options->bytes_per_token;
  const ReuseProfile& profile = *report.profile;
  for (const SimulationRun& run : report.runs) {
    // What a hierarchy writes is said tier by tier.
    const bool is_single = run.tiers.size() == 1;
    const TierResult& first = run.tiers.front();
    const auto single = [&](const std::optional<std::uint64_t>& value) {
      return is_single ? value : std::nullopt;
    };
    const std::vector<std::string> cells = {
        run.policy,
        "all",
        csv_count(run.capacity_blocks),
        csv_bytes(run.capacity_blocks, block_bytes(report)),
        csv_count(run.hits.hit_blocks),
        csv_count(run.hits.hit_tokens),
        csv_bytes(run.hits.hit_tokens, token_bytes),
        csv_ratio(run.hits.hit_tokens, profile.input_tokens()),
        csv_count(run.hits.second_half_hit_tokens),
        csv_ratio(run.hits.second_half_hit_tokens, profile.second_half_input_tokens()),
        csv_count(single(first.inserted_blocks)),
        csv_count(single(first.inserted_tokens)),
        csv_bytes(single(first.inserted_tokens), token_bytes),
        csv_count(single(first.evicted_blocks))};
    text += fmt::format("{}\n", fmt::join(cells, ","));
    if (is_single) continue;
    for (const TierResult& tier : run.tiers) {
      const std::vector<std::string> row = {run.policy,
                                            tier.name,
                                            csv_count(tier.capacity_blocks),
                                            csv_bytes(tier.capacity_blocks, block_bytes(report)),
                                            csv_count(tier.hit_blocks),
                                            csv_count(tier.hit_tokens),
                                            csv_bytes(tier.hit_tokens, token_bytes),
                                            csv_ratio(tier.hit_tokens, profile.input_tokens()),
                                            "",
                                            "",
                                            csv_count(tier.inserted_blocks),
                                            csv_count(tier.inserted_tokens),
                                            csv_bytes(tier.inserted_tokens, token_bytes),
                                            csv_count(tier.evicted_blocks)};
      text += fmt::format("{}\n", fmt::join(row, ","));
    }
  }
  return text;
}

std::string sweep_csv(const SimulationReport& report) {
  std::string text =
      "policy,capacity_blocks,capacity_bytes,hit_blocks,hit_tokens,token_hit_ratio,"
      "token_miss_ratio,second_half_hit_tokens,second_half_token_hit_ratio,inserted_blocks\n";
  const ReuseProfile& profile = *report.profile;
  for (const SimulationRun& run : report.runs) {
    const std::vector<std::string> cells = {
        run.policy,
        csv_count(run.capacity_blocks),
        csv_bytes(run.capacity_blocks, block_bytes(report)),
        csv_count(run.hits.hit_blocks),
        csv_count(run.hits.hit_tokens),
        csv_ratio(run.hits.hit_tokens, profile.input_tokens()),
        csv_ratio(profile.input_tokens() - run.hits.hit_tokens, profile.input_tokens()),
        csv_count(run.hits.second_half_hit_tokens),
        csv_ratio(run.hits.second_half_hit_tokens, profile.second_half_input_tokens()),
        csv_count(run.tiers.front().inserted_blocks)};
    text += fmt::format("{}\n", fmt::join(cells, ","));
  }
  return text;
}

}  // namespace kvtier
