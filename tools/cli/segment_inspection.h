#pragma once

#include "transfer/store_check.h"

#include <nlohmann/json.hpp>

#include <cstddef>
#include <span>
#include <string>

namespace kvtier {

// What `kvtier inspect` says about a store's segment file.

/// Whether a file begins as segment files do.
bool is_segment(std::span<const std::byte> bytes);

std::string segment_table(const std::string& path, const SegmentReport& report);
nlohmann::ordered_json segment_json(const SegmentReport& report);

}  // namespace kvtier
