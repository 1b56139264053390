// TraceLab: rounds of agents. No ids, but of each round the tokens that its provider found cached.

#include "tools/simulate/csv_records.h"
#include "tools/simulate/json_records.h"
#include "tools/simulate/request_readers.h"

#include <fmt/format.h>

#include <cmath>
#include <map>
#include <string>

namespace kvtier {
namespace {

constexpr std::uint32_t kUsualBlockTokens = 64;

struct TracelabRound {
  std::string session;
  std::string model;
  std::int64_t arrival_us = 0;
  std::uint64_t prefix_tokens = 0;
  std::uint64_t input_tokens = 0;
  std::uint64_t output_tokens = 0;
};

/// Gives blocks to rounds by the only identity there is: the first `prefix_tokens` of a round are
/// the first of the round before in its session, and all behind them is new. What a provider had
/// dropped from its cache therefore counts as new: a lower bound.
class RoundBlocks {
 public:
  Status add(const TracelabRound& round, RequestTraceBuilder& builder) {
    RequestTraceBuilder::Arrival arrival;
    arrival.arrival_us = round.arrival_us;
    arrival.input_tokens = round.input_tokens;
    arrival.output_tokens = round.output_tokens;
    arrival.model = round.model;
    KVTIER_RETURN_IF_ERROR(builder.begin_request(arrival));
    if (builder.identity() != TraceIdentity::kPrefixLengths) return {};
    const std::uint32_t block_tokens =
        builder.rules().block_tokens != 0 ? builder.rules().block_tokens : kUsualBlockTokens;
    KVTIER_RETURN_IF_ERROR(builder.set_block_tokens(block_tokens));
    std::vector<std::uint64_t>& ids = last_[round.session];
    // Only full blocks: a block is shared when all of its tokens are.
    ids.resize(std::min<std::size_t>(ids.size(), round.prefix_tokens / block_tokens));
    while (ids.size() < round.input_tokens / block_tokens) ids.push_back(next_++);
    ids.resize(round.input_tokens / block_tokens);
    return builder.add_blocks(ids);
  }

 private:
  std::map<std::string, std::vector<std::uint64_t>> last_;  ///< Of the last round of a session.
  std::uint64_t next_ = 0;
};

/// The first of the times in `timing_events`.
Status read_first_event(JsonRecords& json, JsonValue value, std::optional<std::int64_t>& first) {
  return json.elements(value, [&](JsonValue event) {
    std::optional<std::string> text;
    KVTIER_RETURN_IF_ERROR(json.members(event, [&](std::string_view key, JsonValue member) {
      return key == "timestamp" ? json.read(member, text) : Status();
    }));
    const auto time = text ? parse_time_us(*text) : std::nullopt;
    if (!time) {
      return json.mismatch_here("timestamp", text.value_or("nothing"), "a date and time");
    }
    if (!first || *time < *first) first = time;
    return Status();
  });
}

Status read_round(JsonRecords& json, const TextLine& line, TracelabRound& round) {
  std::optional<std::string> session;
  std::optional<std::string> model;
  std::optional<std::uint64_t> prefix;
  std::optional<std::uint64_t> input;
  std::optional<std::uint64_t> output;
  std::optional<std::int64_t> first_event;
  KVTIER_RETURN_IF_ERROR(
      json.read_object(line, [&](std::string_view key, JsonValue value) -> Status {
        if (key == "session_id") return json.read(value, session);
        if (key == "model") return json.read(value, model);
        if (key == "prefix_tokens") return json.read(value, prefix);
        if (key == "input_tokens_total") return json.read(value, input);
        if (key == "output_tokens") return json.read(value, output);
        if (key == "timing_events") return read_first_event(json, value, first_event);
        return {};
      }));
  if (!session) return json.fault("session_id", "nothing", "the field");
  if (!prefix) return json.fault("prefix_tokens", "nothing", "the field");
  if (!input) return json.fault("input_tokens_total", "nothing", "the field");
  if (!first_event) return json.fault("timing_events", "no time", "at least one event");
  if (*prefix > *input) {
    return json.fault("prefix_tokens", fmt::format("{}", *prefix),
                      fmt::format("at most input_tokens_total, {}", *input));
  }
  round = {*session, model.value_or(""), *first_event, *prefix, *input, output.value_or(0)};
  return {};
}

enum ReplayColumns : std::size_t { kSession, kPrefix, kFresh, kOutputTokens, kWait };

}  // namespace

Status read_tracelab(LineReader& lines, RequestTraceBuilder& builder) {
  JsonRecords json(lines.path());
  RoundBlocks blocks;
  while (true) {
    KVTIER_ASSIGN_OR_RETURN(const std::optional<TextLine> line, lines.next());
    if (!line) return {};
    TracelabRound round;
    KVTIER_RETURN_IF_ERROR(read_round(json, *line, round));
    KVTIER_RETURN_IF_ERROR(
        located(lines, line->number, "input_tokens_total", blocks.add(round, builder)));
  }
}

Status read_tracelab_replay(LineReader& lines, RequestTraceBuilder& builder) {
  CsvRecords csv(lines.path());
  KVTIER_ASSIGN_OR_RETURN(std::optional<TextLine> line, lines.next());
  if (!line) return {};
  KVTIER_RETURN_IF_ERROR(csv.read_header(
      *line, {"session_id", "prefix_len", "input_len", "output_len", "tool_wait_after_ms"}));
  RoundBlocks blocks;
  // No arrivals: sessions start one gap apart, and a round comes when the tools before it are done.
  std::map<std::string, std::int64_t> next_arrival_us;
  while (true) {
    KVTIER_ASSIGN_OR_RETURN(line, lines.next());
    if (!line) return {};
    KVTIER_RETURN_IF_ERROR(csv.read_row(*line));
    TracelabRound round;
    round.session = csv.cell(kSession);
    KVTIER_ASSIGN_OR_RETURN(round.prefix_tokens, csv.count(kPrefix));
    KVTIER_ASSIGN_OR_RETURN(const std::uint64_t fresh_tokens, csv.count(kFresh));
    KVTIER_ASSIGN_OR_RETURN(round.output_tokens, csv.count(kOutputTokens));
    KVTIER_ASSIGN_OR_RETURN(const double wait_ms, csv.number(kWait));
    if (__builtin_add_overflow(round.prefix_tokens, fresh_tokens, &round.input_tokens)) {
      return csv.mismatch(kPrefix, "tokens that fit 32 bits");
    }
    const auto start_us =
        static_cast<std::int64_t>(next_arrival_us.size() * builder.rules().session_start_gap_us);
    std::int64_t& arrival_us = next_arrival_us.try_emplace(round.session, start_us).first->second;
    round.arrival_us = arrival_us;
    arrival_us += std::llrint(std::min(wait_ms, 9e12) * 1e3);
    KVTIER_RETURN_IF_ERROR(located(lines, line->number, "input_len", blocks.add(round, builder)));
  }
}

}  // namespace kvtier
