#pragma once

#include "memory/ids.h"
#include "memory/status.h"

#include <cstdint>
#include <string>

namespace kvtier {

/// A block that was wanted and could not be had intact.
struct BlockFailure {
  Tier tier;  ///< Where the last attempt to get it failed.
  BlockIdentity identity;
  Generation generation;
  StatusCode code;
  std::uint64_t checksum_expected = 0;  ///< Recorded when the block sealed; 0 where unreadable.
  std::uint64_t checksum_found = 0;     ///< Of the bytes that came, for the block wanted.
  std::string message;                  ///< One line that says all of this.
};

}  // namespace kvtier
