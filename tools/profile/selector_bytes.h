#pragma once

#include "memory/status.h"

#include <cstdint>
#include <string>

namespace kvtier {

/// What a selector keeps of a context for one KV head.
struct SelectorBytes {
  double per_token = 0;
  double fixed = 0;  ///< Its window's keys, codebooks and the like.

  double at(double tokens) const { return fixed + per_token * tokens; }
};

/// Asks the selector itself: one of the registry is made for a head of these dims and shown a
/// context of made-up keys; what it says it keeps, twice, gives the slope. So the answer cannot
/// drift from the code. Takes up to a second for the families that cluster.
///
/// `invalid_argument` for a name the registry refuses; `unsupported` for dims that selector cannot
/// take.
Result<SelectorBytes> measure_selector_bytes(const std::string& selector, std::uint32_t head_dim,
                                             std::uint32_t value_dim, std::uint32_t block_tokens);

}  // namespace kvtier
