#pragma once

#include "memory/status.h"
#include "transfer/durability.h"
#include "transfer/page_cipher.h"
#include "transfer/sha256.h"

#include <array>
#include <compare>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <span>
#include <string>
#include <vector>

namespace kvtier {

// The byte layouts of transfer/README.md: segment headers, manifests, the index. Encoding writes
// every byte of its target; decoding trusts nothing and answers `corrupt`, naming field, found and
// expected. Pure functions; thread-safe.

/// Names an item: a digest of what it holds and of what comes before it.
struct StoreKey {
  Sha256Digest bytes{};
  friend constexpr auto operator<=>(const StoreKey&, const StoreKey&) = default;
  /// The first eight bytes in hexadecimal, for messages.
  std::string short_text() const;
};

/// Tells one store from another, so that what an earlier store left on a drive is not taken for
/// content.
using StoreId = std::array<std::byte, 16>;

enum class Codec : std::uint32_t { kNone = 0 };
enum class Cipher : std::uint32_t { kNone = 0, kAes256Xts = 1 };

/// The first page of a segment file.
struct SegmentHeader {
  static constexpr std::size_t kBytes = 4096;
  static constexpr std::size_t kDataOffset = 64 * 1024;  ///< Of the segment's first unit.

  StoreId store{};
  std::uint32_t segment = 0;  ///< Which of the store's, from 0.
  std::uint32_t segments = 0;
  std::uint64_t segment_bytes = 0;  ///< File size; header included.
  /// Layout that the store was made for; each extent names its own.
  std::uint64_t layout_fingerprint = 0;
  Codec codec = Codec::kNone;
  Cipher cipher = Cipher::kNone;
  KeyId key{};

  friend bool operator==(const SegmentHeader&, const SegmentHeader&) = default;
};
void encode(const SegmentHeader& header, std::span<std::byte> page);
Result<SegmentHeader> decode_segment_header(std::span<const std::byte> page);

/// One part of an item, as its manifest lists it.
struct ManifestPart {
  enum class Kind : std::uint8_t {
    kExtent = 1,      ///< An extent in a place of its own.
    kBlobPiece = 2,   ///< Up to 256 KiB of a blob in a place of its own.
    kInlineBlob = 3,  ///< A blob within the manifest.
  };
  Kind kind = Kind::kExtent;
  std::uint8_t units = 0;    ///< Of its place; 0 when inline.
  std::uint32_t first = 0;   ///< Layer, or the blob's tag.
  std::uint32_t second = 0;  ///< Head group, or which piece.
  std::uint32_t third = 0;   ///< Extent index in the item, or bytes of the piece.
  std::uint32_t unit = 0;    ///< Where its place begins; inline, offset in the manifest.
  std::uint64_t digest = 0;  ///< XXH3-64 of the extent's header, or of the piece's bytes.
  friend bool operator==(const ManifestPart&, const ManifestPart&) = default;
};

/// What an item is made of; stands in a place of its own.
struct ManifestHeader {
  static constexpr std::size_t kBytes = 160;
  static constexpr std::size_t kPartBytes = 32;

  StoreId store{};
  std::uint64_t number = 0;  ///< Of the commit; of two claims to a place the larger one is right.
  std::uint64_t layout_fingerprint = 0;
  StoreKey key;
  StoreKey parent;
  std::uint32_t extent_bytes = 0;
  std::uint32_t parts = 0;
  std::uint32_t bytes = 0;  ///< Header, parts and inline blobs.
};
/// `manifest` has `header.bytes` bytes, the inline blobs already in place.
void encode_manifest(const ManifestHeader& header, std::span<const ManifestPart> parts,
                     std::span<std::byte> manifest);
/// Whether a page could be the first of a manifest of this store; reads the fixed part alone.
bool looks_like_manifest(std::span<const std::byte> page, const StoreId& store);
/// Bytes that the manifest needs, from its first page; what does not make sense is `corrupt`.
Result<ManifestHeader> decode_manifest_header(std::span<const std::byte> page);
/// The whole manifest, checksum included; `parts` is replaced.
Result<ManifestHeader> decode_manifest(std::span<const std::byte> manifest,
                                       std::vector<ManifestPart>& parts);
/// The checksum that stands in a manifest: what the index remembers of it.
std::uint64_t manifest_checksum(std::span<const std::byte> manifest);

/// First page of each of the two areas of the index.
struct IndexHeader {
  static constexpr std::size_t kBytes = 4096;

  StoreId store{};
  std::uint64_t epoch = 0;  ///< Grows with every rewriting; the area with the larger one counts.
  Durability level = Durability::kCrash;
  bool clean = false;          ///< Nothing was appended since.
  std::uint64_t records = 0;   ///< Written with the header, details included.
  std::uint32_t segments = 0;  ///< Geometry of the store.
  std::uint64_t segment_bytes = 0;
  friend bool operator==(const IndexHeader&, const IndexHeader&) = default;
};
void encode(const IndexHeader& header, std::span<std::byte> page);
Result<IndexHeader> decode_index_header(std::span<const std::byte> page);

/// One line of the index.
struct IndexRecord {
  static constexpr std::size_t kBytes = 128;
  enum class Kind : std::uint32_t {
    kEnd = 0,
    kPut = 1,
    kErase = 2,
    kReferences = 3,
    // What the manifest of the put before them says; in a list that was closed cleanly.
    kDetail = 4,
    kParts = 5,
  };

  Kind kind = Kind::kPut;
  std::uint32_t references = 0;
  std::uint32_t unit = 0;      ///< Of the manifest.
  std::uint32_t units = 0;     ///< Of the manifest.
  std::uint64_t number = 0;    ///< Of the item's commit.
  std::uint64_t manifest = 0;  ///< The manifest's checksum.
  double value = 0.0;
  StoreKey key;
  friend bool operator==(const IndexRecord&, const IndexRecord&) = default;
};
/// What a manifest says of itself, beyond what a put has: with it, opening reads no manifest.
struct IndexDetail {
  /// Parts in one record of kind `kParts`; the last one of an item has what is left.
  static constexpr std::uint32_t kPartsPerRecord = 3;

  StoreKey parent;
  std::uint64_t layout_fingerprint = 0;
  std::uint32_t extent_bytes = 0;
  std::uint32_t manifest_bytes = 0;
  std::uint32_t parts = 0;

  /// Records that it and its parts take.
  std::uint64_t records() const {
    return 1 + (std::uint64_t{parts} + kPartsPerRecord - 1) / kPartsPerRecord;
  }
  friend bool operator==(const IndexDetail&, const IndexDetail&) = default;
};

/// `position` counts the records of an area.
void encode(const IndexRecord& record, std::uint64_t epoch, std::uint64_t position,
            std::span<std::byte> bytes);
void encode(const IndexDetail& detail, std::uint64_t epoch, std::uint64_t position,
            std::span<std::byte> bytes);
/// One to three parts.
void encode(std::span<const ManifestPart> parts, std::uint64_t epoch, std::uint64_t position,
            std::span<std::byte> bytes);
/// What stands where a record may stand.
enum class RecordState : unsigned char {
  kValid,
  kEnd,      ///< The end, as it was written there.
  kAbsent,   ///< Zeros, or what an earlier epoch left.
  kDamaged,  ///< Neither: a torn, lost or misplaced write.
};
/// Of kinds `kDetail` and `kParts` the kind alone is decoded; for the rest there are the two below.
RecordState decode_record(std::span<const std::byte> bytes, std::uint64_t epoch,
                          std::uint64_t position, IndexRecord& record);
IndexDetail decode_detail(std::span<const std::byte> bytes);
/// Appends `count` parts, at most three; false when one makes no sense in an item of this detail.
bool decode_parts(std::span<const std::byte> bytes, const IndexDetail& detail, std::uint32_t count,
                  std::vector<ManifestPart>& parts);

}  // namespace kvtier

template <>
struct std::hash<kvtier::StoreKey> {
  std::size_t operator()(const kvtier::StoreKey& key) const noexcept {
    // Any eight bytes of a digest are as good as all.
    std::size_t word = 0;
    std::memcpy(&word, key.bytes.data(), sizeof(word));
    return word;
  }
};
