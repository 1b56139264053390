#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace kvtier {

/// One contiguous piece of a copy. Source and target do not overlap.
struct CopySpan {
  const std::byte* source = nullptr;
  std::byte* target = nullptr;
  std::size_t bytes = 0;
};

/// Copies every span on the calling thread, in order. Empty lists copy nothing.
void gather_blocks(std::span<const CopySpan> spans);

/// Byte-by-byte version, for tests.
void gather_blocks_reference(std::span<const CopySpan> spans);

}  // namespace kvtier
