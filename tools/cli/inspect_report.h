#pragma once

#include "tools/cli/replay_result.h"
#include "tools/trace/attention_trace.h"

#include <nlohmann/json.hpp>

#include <string>

namespace kvtier {

// What `kvtier inspect` says about a sound input: as a table for people and as the member of
// `kvtier.inspect-result` that is named after the kind. Text from the input is made printable.

std::string trace_table(const AttentionTrace& trace);
nlohmann::ordered_json trace_json(const AttentionTrace& trace);

std::string replay_result_table(const ReplayResultSummary& result);
nlohmann::ordered_json replay_result_json(const ReplayResultSummary& result);

}  // namespace kvtier
