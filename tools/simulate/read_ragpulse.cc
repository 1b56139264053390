// RAGPulse: prompts made of parts; each part has an id of its content and a length of its own.

#include "tools/cli/parse.h"
#include "tools/simulate/json_records.h"
#include "tools/simulate/request_readers.h"

#include <fmt/format.h>

#include <cmath>
#include <limits>

namespace kvtier {
namespace {

struct RagpulseRecord {
  std::optional<std::string> timestamp;  ///< Seconds, in quotes.
  std::optional<std::uint64_t> input_tokens;
  std::optional<std::uint64_t> output_tokens;
  std::array<std::vector<std::uint64_t>, kRagpulseParts.size()> ids;
  bool has_ids = false;
};

Status read_part_ids(JsonRecords& json, JsonValue value, RagpulseRecord& record) {
  record.has_ids = true;
  return json.members(value, [&](std::string_view key, JsonValue ids) -> Status {
    for (std::size_t part = 0; part < kRagpulseParts.size(); ++part) {
      if (key == kRagpulseParts[part].member) return json.read_ids(ids, record.ids[part]);
    }
    return json.fault(fmt::format("hash_ids.{}", key), "an unknown kind of part",
                      "sys_prompt, passages_ids, history, web_search or user_input");
  });
}

Status read_request(JsonRecords& json, const TextLine& line, RagpulseRecord& record) {
  KVTIER_RETURN_IF_ERROR(
      json.read_object(line, [&](std::string_view key, JsonValue value) -> Status {
        if (key == "timestamp") return json.read(value, record.timestamp);
        if (key == "input_length") return json.read(value, record.input_tokens);
        if (key == "output_length") return json.read(value, record.output_tokens);
        if (key == "hash_ids") return read_part_ids(json, value, record);
        return {};
      }));
  if (!record.timestamp) return json.fault("timestamp", "nothing", "the field");
  if (!record.input_tokens) return json.fault("input_length", "nothing", "the field");
  if (!record.has_ids) return json.fault("hash_ids", "nothing", "the field");
  return {};
}

}  // namespace

Status read_ragpulse_table(LineReader& lines, std::size_t part, RagpulseLengths& lengths) {
  JsonRecords json(lines.path());
  const char* id_field = kRagpulseParts[part].id;
  while (true) {
    KVTIER_ASSIGN_OR_RETURN(const std::optional<TextLine> line, lines.next());
    if (!line) return {};
    std::optional<std::uint64_t> id;
    std::optional<std::uint64_t> tokens;
    KVTIER_RETURN_IF_ERROR(
        json.read_object(*line, [&](std::string_view key, JsonValue value) -> Status {
          if (key == id_field) return json.read(value, id);
          if (key == "token_length") return json.read(value, tokens);
          return {};
        }));
    if (!id) return json.fault(id_field, "nothing", "the field");
    if (!tokens) return json.fault("token_length", "nothing", "the field");
    if (*tokens > std::numeric_limits<std::uint32_t>::max()) {
      return json.fault("token_length", fmt::format("{}", *tokens), "a number of 32 bits");
    }
    const auto [entry, is_new] =
        lengths[part].try_emplace(*id, static_cast<std::uint32_t>(*tokens));
    if (!is_new && entry->second != *tokens) {
      return json.fault("token_length", fmt::format("{} for id {}", *tokens, *id),
                        fmt::format("{} as before", entry->second));
    }
  }
}

Status read_ragpulse(LineReader& lines, const RagpulseLengths& lengths,
                     RequestTraceBuilder& builder) {
  JsonRecords json(lines.path());
  while (true) {
    KVTIER_ASSIGN_OR_RETURN(const std::optional<TextLine> line, lines.next());
    if (!line) return {};
    RagpulseRecord record;
    KVTIER_RETURN_IF_ERROR(read_request(json, *line, record));
    const Result<double> seconds = parse_number(*record.timestamp);
    if (!seconds.ok() || *seconds < 0 || *seconds > 9e12) {
      return json.fault("timestamp", *record.timestamp, "seconds from the start, in quotes");
    }
    RequestTraceBuilder::Arrival arrival;
    arrival.arrival_us = std::llrint(*seconds * 1e6);
    arrival.input_tokens = *record.input_tokens;
    arrival.output_tokens = record.output_tokens.value_or(0);
    KVTIER_RETURN_IF_ERROR(
        located(lines, line->number, "input_length", builder.begin_request(arrival)));
    for (std::size_t part = 0; part < kRagpulseParts.size(); ++part) {
      const char* member = kRagpulseParts[part].member;
      for (const std::uint64_t id : record.ids[part]) {
        const auto found = lengths[part].find(id);
        if (found == lengths[part].end()) {
          return json.fault(fmt::format("hash_ids.{}", member), fmt::format("id {}", id),
                            fmt::format("an id of {}", kRagpulseParts[part].table));
        }
        KVTIER_RETURN_IF_ERROR(located(lines, line->number, fmt::format("hash_ids.{}", member),
                                       builder.add_part(id, found->second)));
      }
    }
  }
}

}  // namespace kvtier
