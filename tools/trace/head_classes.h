#pragma once

#include "selectors/registry.h"

#include <string>
#include <string_view>

namespace kvtier {

inline constexpr std::string_view kHeadClassesSchema = "kvtier.head-classes";

/// Reads a file of head classes: {"schema": "kvtier.head-classes", "version": 1, "retrieval":
/// [[true, false, ...], ...]}, one list per layer of the run, one entry per KV head: true for heads
/// that look far back. Failures are one line, "FILE: FIELD: found X, expected Y".
Result<HeadClasses> read_head_classes(const std::string& path);

/// What the command line gives to selectors: the reader above.
SelectorResources selector_resources();

}  // namespace kvtier
