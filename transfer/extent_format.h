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

/// What a sound header says of its extent.
struct ExtentFacts {
  std::uint64_t fingerprint = 0;
  LayerIndex layer;
  HeadGroup head_group;
  std::uint64_t extent_bytes = 0;
  std::uint32_t places = 0;
  std::uint32_t blocks = 0;  ///< Places that hold one.
  std::uint32_t blocks_corrupt = 0;
  std::uint64_t header_digest = 0;  ///< XXH3-64 of the header's bytes.
};

/// Verifies a whole extent by what its own header says: the header, then each block against its
/// checksum. `verdicts`, unless empty, gets one entry per place (as many as fit): kOk, kNotFound
/// for an empty place, kCorrupt. A header that is not sound is `corrupt` and makes all of them so;
/// one bad block is too, but the others keep their verdict. `facts` holds what was found up to
/// there.
///
/// One pass over the bytes; thread-safe; allocates only to describe a failure.
Status check_extent(std::span<const std::byte> extent, std::span<StatusCode> verdicts,
                    ExtentFacts& facts);

/// The same of the header alone, of which `extent` must hold all; `blocks_corrupt` stays 0.
Status check_extent_header(std::span<const std::byte> extent, ExtentFacts& facts);

/// Bytes of the header of the extent that begins with this page, by what it says of itself; 0 when
/// it is none.
std::size_t extent_header_bytes(std::span<const std::byte> page);

/// Whether a page begins like an extent; says nothing about soundness.
bool looks_like_extent(std::span<const std::byte> page);

}  // namespace kvtier
