#pragma once

#include "memory/status.h"
#include "tools/simulate/request_trace.h"
#include "tools/simulate/trace_format.h"

#include <optional>
#include <string>

namespace kvtier {

/// Reads a request trace: a file, plain or `.zst`; a folder of agent sessions, one `.json` each, in
/// the order of their names; or a folder of RAGPulse.
///
/// `format` is detected unless given. Fails with `invalid_argument` when the rules ask for what the
/// format cannot give, with `io_error` or `no_space` when the machine fails, and otherwise with a
/// line "FILE:LINE: FIELD: found X, expected Y".
///
/// The digest of a folder is that of the lines "NAME sha256:..." of its files that were read.
Result<RequestTrace> open_request_trace(const std::string& path, std::optional<TraceFormat> format,
                                        const TraceRules& rules);

}  // namespace kvtier
