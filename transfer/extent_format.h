#pragma once

#include "memory/block_layout.h"
#include "memory/ids.h"
#include "memory/status.h"

#include <cstddef>
#include <cstdint>
#include <span>

namespace kvtier {

/// What an extent's header says of one block.
struct ExtentEntry {
  BlockIdentity identity;
  Generation generation;
  /// Payload bytes that count; 0 marks a place that holds no sealed block.
  std::uint32_t length_bytes = 0;
  std::uint64_t checksum = 0;

  friend bool operator==(const ExtentEntry&, const ExtentEntry&) = default;
};

/// The header that stands in front of every extent, in its host frame and on disk; the byte layout
/// is in transfer/README.md. Entries are written as blocks seal; the header's own checksum is
/// brought up to date by `seal` just before the extent is written to disk.
///
/// A view of `layout.extent_header_bytes()` bytes; not thread-safe, allocates nothing.
class ExtentHeader {
 public:
  ExtentHeader(std::span<std::byte> bytes, const BlockLayout& layout);

  /// Starts an extent: every entry empty.
  void format(LayerIndex layer, HeadGroup head_group);
  /// The block is of the extent's layer and head group, and not empty.
  void set_entry(std::uint32_t place, const ExtentEntry& entry);
  void clear_entry(std::uint32_t place);
  /// A default `ExtentEntry` for an empty place.
  ExtentEntry entry(std::uint32_t place) const;

  /// Computes and stores the header's checksum.
  void seal();
  /// `corrupt` when magic, version, layout fingerprint, block count or checksum are not right, or
  /// when it is the intact header of another layer's or head group's extent; the message says
  /// which, with found and expected.
  Status verify(LayerIndex layer, HeadGroup head_group) const;

 private:
  std::byte* entry_at(std::uint32_t place) const;

  std::span<std::byte> bytes_;
  const BlockLayout* layout_;
};

}  // namespace kvtier
