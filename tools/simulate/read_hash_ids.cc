// Mooncake, Qwen-Bailian and LMCache lookups: one request per line, with the ids of its blocks.

#include "tools/simulate/json_records.h"
#include "tools/simulate/request_readers.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

namespace kvtier {
namespace {

struct HashIdFields {
  TraceFormat format;
  std::string_view timestamp;
  double us_per_unit;
  std::string_view input_tokens;
  std::string_view output_tokens;
  std::string_view ids;
  std::string_view block_tokens;  ///< May be absent: then the size is the usual one.
  std::uint32_t usual_block_tokens;
};
constexpr HashIdFields kHashIdFields[] = {
    {TraceFormat::kMooncake, "timestamp", 1e3, "input_length", "output_length", "hash_ids",
     "block_size", 512},
    {TraceFormat::kBailian, "timestamp", 1e6, "input_length", "output_length", "hash_ids",
     "block_size", 16},
    {TraceFormat::kLmcache, "timestamp", 1e6, "seq_len", "output_len", "chunk_hashes", "chunk_size",
     256},
};

struct HashIdRecord {
  std::optional<double> timestamp;
  std::optional<std::uint64_t> input_tokens;
  std::optional<std::uint64_t> output_tokens;
  std::optional<std::uint64_t> block_tokens;
  std::optional<std::string> model;
  std::vector<std::uint64_t> ids;
  bool has_ids = false;
};

Status read_record(JsonRecords& json, const TextLine& line, const HashIdFields& fields,
                   HashIdRecord& record) {
  return json.read_object(line, [&](std::string_view key, JsonValue value) -> Status {
    if (key == fields.ids) {
      if (record.has_ids) return json.fault(key, "the key twice", "every key once per object");
      record.has_ids = true;
      return json.read_ids(value, record.ids);
    }
    if (key == fields.timestamp) return json.read(value, record.timestamp);
    if (key == fields.input_tokens) return json.read(value, record.input_tokens);
    if (key == fields.output_tokens) return json.read(value, record.output_tokens);
    if (key == fields.block_tokens) return json.read(value, record.block_tokens);
    if (key == "model_name" || key == "model") return json.read(value, record.model);
    return {};
  });
}

Status check_record(const JsonRecords& json, const HashIdFields& fields, const HashIdRecord& record,
                    std::uint64_t block_tokens) {
  const auto missing = [&](std::string_view field) {
    return json.fault(field, "nothing", "the field");
  };
  if (!record.timestamp) return missing(fields.timestamp);
  if (!record.input_tokens) return missing(fields.input_tokens);
  if (!record.has_ids) return missing(fields.ids);
  // Some traces list the last block when it is not full, others do not.
  const std::uint64_t full = *record.input_tokens / block_tokens;
  const std::uint64_t all = full + (*record.input_tokens % block_tokens != 0 ? 1 : 0);
  if (record.ids.size() >= full && record.ids.size() <= all) return {};
  return json.fault(fields.ids, fmt::format("{} ids", record.ids.size()),
                    fmt::format("{}{}: {} tokens in blocks of {}", full,
                                all > full ? fmt::format(" or {}", all) : "", *record.input_tokens,
                                block_tokens));
}

}  // namespace

Status located(const LineReader& lines, std::uint64_t line, std::string_view field,
               const Status& status) {
  if (status.ok()) return status;
  return Status(status.code(),
                fmt::format("{}:{}: {}: {}", lines.path(), line, field, status.message()));
}

Status read_hash_id_lines(TraceFormat format, LineReader& lines, RequestTraceBuilder& builder) {
  const HashIdFields& fields = *std::ranges::find(kHashIdFields, format, &HashIdFields::format);
  const std::uint32_t usual =
      builder.rules().block_tokens != 0 ? builder.rules().block_tokens : fields.usual_block_tokens;
  JsonRecords json(lines.path());
  HashIdRecord record;
  while (true) {
    KVTIER_ASSIGN_OR_RETURN(const std::optional<TextLine> line, lines.next());
    if (!line) return {};
    std::vector<std::uint64_t> ids = std::move(record.ids);  // Keeps its memory.
    ids.clear();
    record = {};
    record.ids = std::move(ids);
    KVTIER_RETURN_IF_ERROR(read_record(json, *line, fields, record));
    const std::uint64_t block_tokens = record.block_tokens.value_or(usual);
    KVTIER_RETURN_IF_ERROR(
        located(lines, line->number, fields.block_tokens, builder.set_block_tokens(block_tokens)));
    KVTIER_RETURN_IF_ERROR(check_record(json, fields, record, block_tokens));
    RequestTraceBuilder::Arrival arrival;
    arrival.arrival_us = std::llrint(std::min(*record.timestamp * fields.us_per_unit, 9e18));
    arrival.input_tokens = *record.input_tokens;
    arrival.output_tokens = record.output_tokens.value_or(0);
    arrival.model = record.model.value_or("");
    KVTIER_RETURN_IF_ERROR(
        located(lines, line->number, fields.input_tokens, builder.begin_request(arrival)));
    KVTIER_RETURN_IF_ERROR(
        located(lines, line->number, fields.ids, builder.add_blocks(record.ids)));
  }
}

}  // namespace kvtier
