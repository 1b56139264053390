#pragma once

#include "kernels/gpu.h"
#include "memory/status.h"
#include "memory/stream_ref.h"

#include <cstddef>
#include <cstdint>
#include <span>

namespace kvtier {

/// Reads device memory once, in address order, as fast as it comes, and folds its 64-bit words into
/// `*sum` by xor: the yardstick that benchmarks hold readers against. Multiples of 16 bytes.
Status read_bytes(const Gpu& gpu, std::span<const std::byte> bytes, std::uint64_t* sum,
                  StreamRef stream);

}  // namespace kvtier
