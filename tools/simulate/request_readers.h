#pragma once

#include "memory/status.h"
#include "tools/simulate/line_reader.h"
#include "tools/simulate/request_trace.h"
#include "tools/simulate/trace_format.h"

#include <array>
#include <cstdint>
#include <optional>
#include <string_view>
#include <unordered_map>

namespace kvtier {

// One per family of formats. Each reads its input to the end and adds every request to the builder,
// in the order of the input; what a field means is in README.md. Failures name file, line and
// field.

/// One request per line with the ids of its blocks: Mooncake, Qwen-Bailian, LMCache lookups.
Status read_hash_id_lines(TraceFormat format, LineReader& lines, RequestTraceBuilder& builder);

/// One agent session per line, or the whole file is one session. `session` is the number of the
/// first and is left at the next.
Status read_agent_sessions(LineReader& lines, bool is_document, std::uint32_t& session,
                           RequestTraceBuilder& builder);

/// The kinds of parts that a RAGPulse prompt is made of, in the order in which we join them.
struct RagpulsePart {
  const char* member;  ///< In a request's hash_ids.
  const char* table;   ///< The file with their lengths, without ".zst".
  const char* id;      ///< Its id field.
};
inline constexpr std::array<RagpulsePart, 5> kRagpulseParts = {{
    {"sys_prompt", "1_sys_prompt.jsonl", "sys_prompt_id"},
    {"passages_ids", "2_passages.jsonl", "passage_id"},
    {"history", "3_history.jsonl", "history_id"},
    {"web_search", "5_web_search.jsonl", "web_search_id"},
    {"user_input", "4_user_input.jsonl", "user_input_id"},
}};
/// Tokens of each part, by kind and id.
using RagpulseLengths =
    std::array<std::unordered_map<std::uint64_t, std::uint32_t>, kRagpulseParts.size()>;

Status read_ragpulse_table(LineReader& lines, std::size_t part, RagpulseLengths& lengths);
Status read_ragpulse(LineReader& lines, const RagpulseLengths& lengths,
                     RequestTraceBuilder& builder);

/// Lengths and arrivals: Azure, BurstGPT.
Status read_length_rows(TraceFormat format, LineReader& lines, RequestTraceBuilder& builder);

/// Rounds of agents with the tokens that each shares with the round before.
Status read_tracelab(LineReader& lines, RequestTraceBuilder& builder);
Status read_tracelab_replay(LineReader& lines, RequestTraceBuilder& builder);

/// "FILE:LINE: FIELD: " in front of what the builder found.
Status located(const LineReader& lines, std::uint64_t line, std::string_view field,
               const Status& status);

/// A date and time as "2023-11-16 18:17:03.9799600" or "2026-06-01T05:40:20.151Z", UTC, in
/// microseconds since 1970; further digits are cut off. None when it is no such time.
std::optional<std::int64_t> parse_time_us(std::string_view text);

}  // namespace kvtier
