#pragma once

#include "memory/ids.h"

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

namespace kvtier {

/// XXH3-64 of a block's payload, seeded by what the block must be. A block that is intact but not
/// the one asked for, or of an older generation, fails the same comparison as a flipped bit.
/// One pass over the payload; allocates nothing.
std::uint64_t block_checksum(std::span<const std::byte> payload, const BlockIdentity& identity,
                             Generation generation);

/// The two halves of `block_checksum`: the seed names the block, the sum adds its bytes. Apart for
/// the GPU, which is handed seeds.
std::uint64_t block_seed(const BlockIdentity& identity, Generation generation);
std::uint64_t seeded_checksum(std::span<const std::byte> payload, std::uint64_t seed);

/// XXH3's default secret as little-endian words, for the GPU's version of the same sum.
std::array<std::uint64_t, 24> checksum_secret();

/// XXH3-64 with seed 0, for headers and digests.
std::uint64_t checksum(std::span<const std::byte> bytes);

}  // namespace kvtier
