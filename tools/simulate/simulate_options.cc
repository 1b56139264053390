#include "tools/simulate/simulate_options.h"

#include "tools/cli/options.h"

#include <CLI/CLI.hpp>
#include <fmt/ranges.h>

#include <algorithm>
#include <cctype>
#include <cmath>
#include <limits>
#include <set>

namespace kvtier {
namespace {

template <typename T>
auto count_from(T least, T most) {
  return [least, most](std::string_view text) -> Result<T> {
    const Result<std::uint64_t> value = parse_count(text);
    if (value.ok() && *value >= least && *value <= most) return static_cast<T>(*value);
    return invalid_argument(
        fmt::format("found '{}', expected a whole number from {} to {}", text, least, most));
  };
}

/// One of a few words.
template <typename T>
struct Word {
  std::string_view text;
  T value;
};
template <typename T, std::size_t kCount>
auto one_word_of(const Word<T> (&words)[kCount]) {
  return [&words](std::string_view text) -> Result<T> {
    std::vector<std::string_view> known;
    for (const Word<T>& word : words) {
      if (text == word.text) return word.value;
      known.push_back(word.text);
    }
    return invalid_argument(
        fmt::format("found '{}', expected one of {}", text, fmt::join(known, ", ")));
  };
}

constexpr Word<std::optional<TraceIdentity>> kIdentities[] = {
    {"auto", std::nullopt},
    {"trie", TraceIdentity::kTrie},
    {"raw", TraceIdentity::kRaw},
    {"prefix-lengths", TraceIdentity::kPrefixLengths},
};
constexpr Word<TouchOrder> kTouchOrders[] = {{"last-first", TouchOrder::kLastFirst},
                                             {"first-first", TouchOrder::kFirstFirst}};
constexpr Word<RequestOrder> kRequestOrders[] = {{"time", RequestOrder::kTime},
                                                 {"file", RequestOrder::kFile}};
constexpr Word<Hierarchy> kHierarchies[] = {{"inclusive", Hierarchy::kInclusive},
                                            {"exclusive", Hierarchy::kExclusive}};
constexpr Word<bool> kPartialBlocks[] = {{"keep", false}, {"drop", true}};
constexpr Word<bool> kModels[] = {{"merge", false}, {"separate", true}};

Result<std::optional<TraceFormat>> parse_format_option(std::string_view text) {
  if (text == "auto") return std::optional<TraceFormat>();
  KVTIER_ASSIGN_OR_RETURN(const TraceFormat format, parse_trace_format(text));
  return std::optional<TraceFormat>(format);
}

Result<std::string> parse_policy(std::string_view text) {
  const auto known = known_simulation_policies();
  if (std::ranges::find(known, text) != known.end()) return std::string(text);
  return invalid_argument(
      fmt::format("found '{}', expected one of {}", text, fmt::join(known, ", ")));
}

Result<BlockAmount> parse_blocks_or_share(std::string_view text) {
  const auto amount = BlockAmount::parse(text);
  if (amount.ok() && !amount->is_bytes()) return *amount;
  return invalid_argument(fmt::format(
      "found '{}', expected blocks such as 512 or a share of the distinct ones such as 10%", text));
}

Result<std::uint64_t> parse_gap(std::string_view text) {
  const Result<double> seconds = parse_number(text);
  if (seconds.ok() && *seconds >= 0 && *seconds <= 1e6) {
    return static_cast<std::uint64_t>(std::llround(*seconds * 1e6));
  }
  return invalid_argument(fmt::format("found '{}', expected seconds such as 60", text));
}

/// Times per token are asked for in microseconds.
Result<std::uint64_t> parse_microseconds(std::string_view text) {
  const Result<double> value = parse_number(text);
  if (value.ok() && *value >= 0 && *value <= 1e6) {
    return static_cast<std::uint64_t>(std::llround(*value * 1e6));
  }
  return invalid_argument(fmt::format("found '{}', expected microseconds such as 40", text));
}

Result<std::string> parse_file_path(std::string_view text) {
  if (text.empty()) return invalid_argument("found nothing, expected a path");
  return std::string(text);
}

void bind_trace(CLI::App& verb, SimulateOptions& options) {
  verb.add_option("TRACE", options.trace_path, "Request trace: a file, plain or .zst, or a folder")
      ->required()
      ->type_name("");
  add_value(verb, "--input-format", options.input_format, parse_format_option,
            fmt::format("auto, {}", fmt::join(known_trace_formats(), ", ")), "auto");
  add_value(verb, "--identity", options.rules.identity, one_word_of(kIdentities),
            "What ids stand for: auto, trie (re-keyed by what is before), raw, prefix-lengths",
            "auto");
  add_value(verb, "--order", options.rules.order, one_word_of(kRequestOrders),
            "Of requests: time (arrival) or file", "time");
  add_value(verb, "--touch-order", options.touch_order, one_word_of(kTouchOrders),
            "Of a request's blocks: last-first or first-first", "last-first");
  add_value(verb, "--partial-blocks", options.rules.drop_partial_blocks,
            one_word_of(kPartialBlocks), "Last blocks that are not full: keep or drop", "keep");
  add_value(verb, "--models", options.rules.separate_models, one_word_of(kModels),
            "Blocks of different models: merge (ignore the model) or separate", "merge");
  add_value(verb, "--session-start-gap", options.rules.session_start_gap_us, parse_gap,
            "Seconds between the starts of sessions without a common clock", "60");
  add_value(verb, "--block-tokens", options.rules.block_tokens,
            count_from<std::uint32_t>(1, 1u << 20), "Tokens of a block where the trace is silent",
            "the format's");
}

void bind_caches(CLI::App& verb, SimulateOptions& options, const char* usual_capacities) {
  add_values(verb, "--policy", options.policies, parse_policy,
             fmt::format("{}", fmt::join(known_simulation_policies(), ", ")),
             "lru,optimal,infinite");
  // Two spellings of one list.
  add_values(verb, "--capacity-blocks", options.capacities, parse_blocks_or_share,
             "Capacities, a run each: blocks, or a share of the distinct ones", usual_capacities)
      ->excludes(add_values(verb, "--capacity-bytes", options.capacities,
                            BlockAmount::parse_as_bytes, "The same in bytes: 64GiB", ""));
  add_value(
      verb, "--bytes-per-token", options.bytes_per_token,
      [](std::string_view text) -> Result<std::uint64_t> { return parse_bytes(text); },
      "Bytes of KV per token, such as 128KiB; for capacities and results in bytes", "");
}

void bind_costs(CLI::App& verb, BlockCosts& costs) {
  add_value(verb, "--recompute-us", costs.recompute_ps_per_token, parse_microseconds,
            "gdsf: microseconds to compute a token", "40");
  add_value(verb, "--recompute-us-per-token-before", costs.recompute_ps_per_token_before,
            parse_microseconds, "gdsf: more for each token before it", "0.0013");
  add_value(verb, "--load-us", costs.load_ps_per_token, parse_microseconds,
            "gdsf: microseconds to load a token", "2.6");
}

void bind_result(CLI::App& verb, SimulateOptions& options) {
  verb.add_option("--format", options.format, "Of the result: table, json, csv (default: table)")
      ->check(CLI::IsMember({"table", "json", "csv"}))
      ->type_name("");
  add_value(verb, "--output", options.output_path, parse_file_path,
            "File for the result; written whole or not at all", "stdout");
}

}  // namespace

Result<BlockAmount> BlockAmount::parse(std::string_view text) {
  if (text.ends_with('%')) {
    KVTIER_ASSIGN_OR_RETURN(const Share share, Share::parse(text));
    if (!share.is_zero()) return BlockAmount(text, share);
  } else if (const auto blocks = parse_count(text); blocks.ok() && *blocks > 0) {
    return BlockAmount(text, *blocks);
  } else if (const auto bytes = parse_bytes(text); bytes.ok() && *bytes > 0) {
    return BlockAmount(text, Bytes{*bytes});
  }
  return invalid_argument(fmt::format(
      "found '{}', expected blocks such as 512, a share such as 10% or bytes such as 64GiB", text));
}

Result<BlockAmount> BlockAmount::parse_as_bytes(std::string_view text) {
  KVTIER_ASSIGN_OR_RETURN(const std::uint64_t bytes, parse_bytes(text));
  if (bytes > 0) return BlockAmount(text, Bytes{bytes});
  return invalid_argument(fmt::format("found '{}', expected more than nothing", text));
}

std::uint64_t BlockAmount::blocks(std::uint64_t unique_blocks,
                                  std::uint64_t bytes_per_block) const {
  if (const auto* blocks = std::get_if<std::uint64_t>(&amount_)) return *blocks;
  if (const auto* share = std::get_if<Share>(&amount_)) {
    return std::max<std::uint64_t>(1, share->of(unique_blocks));
  }
  KVTIER_CHECK(bytes_per_block > 0, "{} without bytes per block", text_);
  return std::get<Bytes>(amount_).bytes / bytes_per_block;
}

Result<TierAmount> TierAmount::parse(std::string_view text) {
  const std::size_t equals = text.find('=');
  const std::string_view name = text.substr(0, equals);
  const bool is_name =
      equals != std::string_view::npos && !name.empty() && std::ranges::all_of(name, [](char c) {
        return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '_' || c == '-';
      });
  if (!is_name) {
    return invalid_argument(fmt::format("found '{}', expected a tier such as host=64GiB", text));
  }
  KVTIER_ASSIGN_OR_RETURN(BlockAmount amount, BlockAmount::parse(text.substr(equals + 1)));
  return TierAmount{std::string(name), std::move(amount)};
}

SimulateOptions::SimulateOptions() : policies{"lru", "optimal", "infinite"} {}

std::vector<std::string_view> known_simulation_policies() {
  std::vector<std::string_view> names = known_simulated_caches();
  names.insert(names.end(), {"optimal", "infinite"});
  return names;
}

void bind_simulate_options(CLI::App& verb, SimulateOptions& options) {
  bind_trace(verb, options);
  bind_caches(verb, options, "1%,10%,50%");
  add_values(verb, "--tiers", options.tiers, TierAmount::parse,
             "One hierarchy instead, fastest first: device=8GiB,host=64GiB,disk=1TiB", "");
  add_value(verb, "--hierarchy", options.hierarchy, one_word_of(kHierarchies),
            "inclusive (a tier holds what is above it) or exclusive", "inclusive");
  bind_costs(verb, options.costs);
  bind_result(verb, options);
}

void bind_sweep_options(CLI::App& verb, SimulateOptions& options) {
  bind_trace(verb, options);
  bind_caches(verb, options, "--points of them");
  add_value(verb, "--points", options.points, count_from<std::uint32_t>(2, 10'000),
            "Capacities from 1/1000 of the distinct blocks to all, evenly in their logarithm",
            "20");
  bind_costs(verb, options.costs);
  add_value(verb, "--threads", options.threads, count_from<unsigned>(1, 4096),
            "Threads, a run each", "all");
  add_value(verb, "--resume", options.resume_path, parse_file_path,
            "File of finished runs: continued when it is there, kept up to date", "");
  bind_result(verb, options);
}

Status check_simulate_options(const SimulateOptions& options) {
  if (!options.tiers.empty() && !options.capacities.empty()) {
    return invalid_argument("--tiers: found capacities too, expected one or the other");
  }
  std::set<std::string> names;
  bool needs_bytes = false;
  for (const TierAmount& tier : options.tiers) {
    needs_bytes |= tier.amount.is_bytes();
    if (!names.insert(tier.name).second) {
      return invalid_argument(
          fmt::format("--tiers: found '{}' twice, expected distinct names", tier.name));
    }
  }
  for (const BlockAmount& capacity : options.capacities) needs_bytes |= capacity.is_bytes();
  if (needs_bytes && options.bytes_per_token == 0) {
    return invalid_argument(
        "--bytes-per-token: found nothing, expected it with capacities in bytes");
  }
  if (!options.output_path.empty() && options.output_path == options.resume_path) {
    return invalid_argument(fmt::format("--resume: found '{}', expected another file than --output",
                                        options.resume_path));
  }
  return {};
}

}  // namespace kvtier
