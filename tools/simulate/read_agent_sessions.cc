// Agent sessions (Weka, kv-cache-tester): one JSON object per session, with sub-agents inside.

#include "tools/simulate/json_records.h"
#include "tools/simulate/request_readers.h"

#include <fmt/format.h>

#include <cmath>

namespace kvtier {
namespace {

struct AgentRequest {
  double t = 0;  ///< Seconds since the session's start.
  std::optional<std::uint64_t> input_tokens;
  std::optional<std::uint64_t> output_tokens;
  std::string model;
  std::size_t first = 0;  ///< Of its ids.
  std::size_t ids = 0;
};

/// One session while it is read; whose times and sizes are known only at the end.
class AgentSession {
 public:
  explicit AgentSession(JsonRecords& json) : json_(json) {}

  Status read(const TextLine& line) {
    block_tokens_.reset();
    scope_.reset();
    requests_.clear();
    ids_.clear();
    bool has_requests = false;
    KVTIER_RETURN_IF_ERROR(json_.read_object(line, [&](std::string_view key, JsonValue value) {
      if (key == "block_size") return json_.read(value, block_tokens_);
      if (key == "hash_id_scope") return json_.read(value, scope_);
      if (key != "requests") return Status();
      has_requests = true;
      return json_.elements(value, [&](JsonValue entry) { return read_entry(entry, 0); });
    }));
    if (!has_requests) return json_.fault("requests", "nothing", "the field");
    if (!block_tokens_) return json_.fault("block_size", "nothing", "the field");
    if (scope_ && *scope_ != "local" && *scope_ != "global") {
      return json_.fault("hash_id_scope", *scope_, "local or global");
    }
    return {};
  }

  std::uint64_t block_tokens() const { return *block_tokens_; }
  bool is_local() const { return scope_.value_or("local") == "local"; }
  const std::vector<AgentRequest>& requests() const { return requests_; }
  std::span<const std::uint64_t> ids_of(const AgentRequest& request) const {
    return std::span(ids_).subspan(request.first, request.ids);
  }

 private:
  /// Sub-agents of sub-agents; keeps recursion over a hostile file shallow.
  static constexpr int kDepthMax = 16;

  Status read_entry(JsonValue entry, int depth) {
    const std::size_t nested_begin = requests_.size();
    AgentRequest request;
    std::optional<double> t;
    std::optional<std::string> type;
    std::optional<std::string> model;
    request.first = ids_.size();
    bool has_ids = false;
    KVTIER_RETURN_IF_ERROR(json_.members(entry, [&](std::string_view key, JsonValue value) {
      if (key == "t") return json_.read(value, t);
      if (key == "type") return json_.read(value, type);
      if (key == "model") return json_.read(value, model);
      if (key == "in") return json_.read(value, request.input_tokens);
      if (key == "out") return json_.read(value, request.output_tokens);
      if (key == "requests") {
        if (depth == kDepthMax) return json_.fault(key, "deeper nesting", "fewer sub-agents");
        return json_.elements(value, [&](JsonValue e) { return read_entry(e, depth + 1); });
      }
      if (key != "hash_ids") return Status();
      if (has_ids) return json_.fault(key, "the key twice", "every key once per object");
      has_ids = true;
      request.first = ids_.size();
      const Status status = json_.read_ids(value, ids_);
      request.ids = ids_.size() - request.first;
      return status;
    }));
    if (!t) return json_.mismatch_here("t", "nothing", "the field");
    if (type == "subagent") {
      for (std::size_t i = nested_begin; i < requests_.size(); ++i) requests_[i].t += *t;
      return {};
    }
    if (requests_.size() > nested_begin) {
      return json_.mismatch_here("requests", "requests inside a request", "a sub-agent");
    }
    if (!request.input_tokens) return json_.mismatch_here("in", "nothing", "the field");
    if (!has_ids) return json_.mismatch_here("hash_ids", "nothing", "the field");
    request.t = *t;
    request.model = model.value_or("");
    requests_.push_back(std::move(request));
    return {};
  }

  JsonRecords& json_;
  std::optional<std::uint64_t> block_tokens_;
  std::optional<std::string> scope_;
  std::vector<AgentRequest> requests_;
  std::vector<std::uint64_t> ids_;
};

Status add_session(const AgentSession& session, std::uint32_t number, const LineReader& lines,
                   std::uint64_t line, RequestTraceBuilder& builder) {
  KVTIER_RETURN_IF_ERROR(
      located(lines, line, "block_size", builder.set_block_tokens(session.block_tokens())));
  const std::int64_t start_us =
      static_cast<std::int64_t>(number * builder.rules().session_start_gap_us);
  for (const AgentRequest& request : session.requests()) {
    const std::uint64_t full = *request.input_tokens / session.block_tokens();
    const std::uint64_t remainder = *request.input_tokens % session.block_tokens();
    if (request.ids < full || request.ids > full + (remainder != 0 ? 1 : 0)) {
      return located(
          lines, line, "hash_ids",
          corrupt(fmt::format("found {} ids, expected {}: {} tokens in blocks of {}", request.ids,
                              full, *request.input_tokens, session.block_tokens())));
    }
    RequestTraceBuilder::Arrival arrival;
    // Milliseconds, as the reference numbers have it.
    arrival.arrival_us = start_us + 1000 * std::llrint(std::min(request.t * 1e3, 9e15));
    arrival.input_tokens = *request.input_tokens;
    arrival.output_tokens = request.output_tokens.value_or(0);
    arrival.session = session.is_local() ? number + 1 : 0;
    arrival.model = request.model;
    KVTIER_RETURN_IF_ERROR(located(lines, line, "in", builder.begin_request(arrival)));
    KVTIER_RETURN_IF_ERROR(
        located(lines, line, "hash_ids", builder.add_blocks(session.ids_of(request))));
  }
  return {};
}

}  // namespace

Status read_agent_sessions(LineReader& lines, bool is_document, std::uint32_t& session,
                           RequestTraceBuilder& builder) {
  JsonRecords json(lines.path());
  AgentSession reader(json);
  while (true) {
    std::optional<TextLine> line;
    if (is_document) {
      KVTIER_ASSIGN_OR_RETURN(line, lines.all());
    } else {
      KVTIER_ASSIGN_OR_RETURN(line, lines.next());
    }
    if (!line) return {};
    KVTIER_RETURN_IF_ERROR(reader.read(*line));
    KVTIER_RETURN_IF_ERROR(add_session(reader, session, lines, line->number, builder));
    ++session;
    if (is_document) return {};
  }
}

}  // namespace kvtier
