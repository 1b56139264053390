#pragma once

#include "memory/status.h"
#include "tools/simulate/line_reader.h"
#include "tools/simulate/request_trace.h"

#include <optional>
#include <string_view>
#include <vector>

namespace kvtier {

/// The request traces that we read; README.md describes each.
enum class TraceFormat : unsigned char {
  kMooncake,
  kAgentSessions,
  kRagpulse,
  kBailian,
  kLmcache,
  kTracelab,
  kTracelabReplay,
  kAzure,
  kBurstgpt,
};

const char* to_string(TraceFormat format);
std::vector<std::string_view> known_trace_formats();
/// By its name. `invalid_argument` lists the known names, or says why libCacheSim's formats are not
/// among them.
Result<TraceFormat> parse_trace_format(std::string_view name);

/// The format of a file by its first line that is not blank: the columns of a CSV header, or the
/// members of a JSON object. Fails with `corrupt` when it is none of ours.
Result<TraceFormat> detect_trace_format(const std::string& path, const TextLine& line);

/// What ids of this format stand for, or what the rules make of them. Fails with `invalid_argument`
/// when the rules ask for what the format cannot give.
Result<TraceIdentity> resolve_identity(TraceFormat format, const TraceRules& rules);

/// Fails with `corrupt` for a file of libCacheSim's, which is refused by name.
Status refuse_libcachesim(const std::string& path);

}  // namespace kvtier
