#pragma once

#include "tests/tools/make_trace.h"
#include "tests/tools/run_kvtier.h"

#include <nlohmann/json.hpp>

#include <string>
#include <vector>

namespace kvtier {

/// The trace that lies in the repository: two layers of a real model.
std::string shipped_trace();

/// A generated trace that is large enough for tiers that hold a part of it: 700 tokens, two layers.
MakeTraceOptions replayable_trace();

/// `kvtier replay TRACE ARGUMENTS --format json`, its output parsed; checks the exit code.
nlohmann::json replay_json(const std::string& trace, std::vector<std::string> arguments,
                           int exit_code = 0);

/// What must be equal for equal input and options.
std::string repeatable_part(nlohmann::json result);

}  // namespace kvtier
