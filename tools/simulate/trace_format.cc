#include "tools/simulate/trace_format.h"

#include "tools/simulate/json_records.h"
#include "tools/trace/json_document.h"

#include <fmt/ranges.h>

#include <set>
#include <string>

namespace kvtier {
namespace {

struct FormatName {
  TraceFormat format;
  const char* name;
  TraceIdentity identity;  ///< Of its ids, unless the rules say otherwise.
};
constexpr FormatName kFormatNames[] = {
    {TraceFormat::kMooncake, "mooncake", TraceIdentity::kChained},
    {TraceFormat::kAgentSessions, "agent-sessions", TraceIdentity::kChained},
    {TraceFormat::kRagpulse, "ragpulse", TraceIdentity::kTrie},
    {TraceFormat::kBailian, "bailian", TraceIdentity::kTrie},
    {TraceFormat::kLmcache, "lmcache", TraceIdentity::kChained},
    {TraceFormat::kTracelab, "tracelab", TraceIdentity::kNone},
    {TraceFormat::kTracelabReplay, "tracelab-replay", TraceIdentity::kNone},
    {TraceFormat::kAzure, "azure", TraceIdentity::kNone},
    {TraceFormat::kBurstgpt, "burstgpt", TraceIdentity::kNone},
};

constexpr const char* kWhyNotLibcachesim =
    "its records are single objects without prompts or token counts, and header layouts of several "
    "versions share one magic number";

const FormatName& name_of(TraceFormat format) {
  return *std::ranges::find(kFormatNames, format, &FormatName::format);
}

Result<TraceFormat> detect_csv(const std::string& path, const TextLine& line) {
  const std::string_view header = line.text;
  const auto has = [header](std::string_view column) {
    return header.find(column) != std::string_view::npos;
  };
  if (has("ContextTokens") && has("GeneratedTokens")) return TraceFormat::kAzure;
  if (has("Request tokens") && has("Response tokens")) return TraceFormat::kBurstgpt;
  if (has("prefix_len") && has("round_idx")) return TraceFormat::kTracelabReplay;
  return input_error(
      fmt::format("{}:{}", path, line.number), "format", fmt::format("'{}'", printable(header, 60)),
      fmt::format("the first line of one of {}", fmt::join(known_trace_formats(), ", ")),
      "or --input-format");
}

}  // namespace

const char* to_string(TraceFormat format) { return name_of(format).name; }

std::vector<std::string_view> known_trace_formats() {
  std::vector<std::string_view> names;
  for (const FormatName& row : kFormatNames) names.emplace_back(row.name);
  return names;
}

Result<TraceFormat> parse_trace_format(std::string_view name) {
  for (const FormatName& row : kFormatNames) {
    if (name == row.name) return row.format;
  }
  const bool is_libcachesim = name == "lcs" || name == "lcp";
  return invalid_argument(fmt::format(
      "found '{}', expected one of {}{}", name, fmt::join(known_trace_formats(), ", "),
      is_libcachesim ? fmt::format(" (libCacheSim is not read: {})", kWhyNotLibcachesim) : ""));
}

Result<TraceFormat> detect_trace_format(const std::string& path, const TextLine& line) {
  const std::size_t first = line.text.find_first_not_of(" \t");
  if (first == std::string_view::npos || line.text[first] != '{') return detect_csv(path, line);
  JsonRecords json(path);
  std::set<std::string, std::less<>> keys;
  bool has_parts = false;
  KVTIER_RETURN_IF_ERROR(json.read_object(line, [&](std::string_view key, JsonValue value) {
    keys.emplace(key);
    simdjson::ondemand::json_type type{};
    if (key == "hash_ids" && !value.type().get(type)) {
      has_parts = type == simdjson::ondemand::json_type::object;
    }
    return Status();
  }));
  if (keys.contains("requests")) return TraceFormat::kAgentSessions;
  if (keys.contains("chunk_hashes")) return TraceFormat::kLmcache;
  if (keys.contains("hash_ids") && has_parts) return TraceFormat::kRagpulse;
  if (keys.contains("hash_ids") && keys.contains("chat_id")) return TraceFormat::kBailian;
  if (keys.contains("hash_ids")) return TraceFormat::kMooncake;
  if (keys.contains("prefix_tokens") && keys.contains("round_index")) return TraceFormat::kTracelab;
  return input_error(fmt::format("{}:{}", path, line.number), "format",
                     fmt::format("an object with {}", fmt::join(keys, ", ")),
                     "hash_ids, requests, chunk_hashes or prefix_tokens", "or --input-format");
}

Result<TraceIdentity> resolve_identity(TraceFormat format, const TraceRules& rules) {
  const TraceIdentity own = name_of(format).identity;
  if (!rules.identity) return own;
  const bool has_prefix_lengths =
      format == TraceFormat::kTracelab || format == TraceFormat::kTracelabReplay;
  if (*rules.identity == TraceIdentity::kPrefixLengths ? has_prefix_lengths
                                                       : own != TraceIdentity::kNone) {
    return *rules.identity;
  }
  return invalid_argument(fmt::format("found '{}' for a trace in format {}, expected {}",
                                      to_string(*rules.identity), to_string(format),
                                      has_prefix_lengths            ? "prefix-lengths"
                                      : own != TraceIdentity::kNone ? "trie or raw"
                                                                    : "none: it has no ids"));
}

Status refuse_libcachesim(const std::string& path) {
  for (const std::string_view ending : {".lcs", ".lcp", ".lcs.zst", ".lcp.zst"}) {
    if (path.ends_with(ending)) {
      return input_error(path, "format", "a libCacheSim trace",
                         fmt::format("one of {}", fmt::join(known_trace_formats(), ", ")),
                         kWhyNotLibcachesim);
    }
  }
  return {};
}

}  // namespace kvtier
