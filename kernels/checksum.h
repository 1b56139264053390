#pragma once

#include "memory/ids.h"

#include <cstddef>
#include <cstdint>
#include <span>

namespace kvtier {

/// XXH3-64 of a block's payload, seeded by what the block must be. A block that is intact but not
/// the one asked for, or of an older generation, fails the same comparison as a flipped bit.
/// One pass over the payload; allocates nothing.
std::uint64_t block_checksum(std::span<const std::byte> payload, const BlockIdentity& identity,
                             Generation generation);

/// XXH3-64 with seed 0, for headers and digests.
std::uint64_t checksum(std::span<const std::byte> bytes);

}  // namespace kvtier
