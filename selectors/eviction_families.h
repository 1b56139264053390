#pragma once

#include "selectors/eviction_policy.h"

#include <cstdint>
#include <memory>

namespace kvtier {

/// One per file; eviction_policy.cc names them.
std::unique_ptr<EvictionPolicy> make_lru(std::uint32_t capacity);
std::unique_ptr<EvictionPolicy> make_lrfu(std::uint32_t capacity);

}  // namespace kvtier
