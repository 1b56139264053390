#pragma once

#include "memory/region.h"
#include "transfer/index_log.h"
#include "transfer/space_map.h"
#include "transfer/store.h"
#include "transfer/store_io.h"

#include <compare>
#include <cstdint>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

namespace kvtier {

/// An item, or one that is being written.
struct StoreItem {
  enum class Phase : unsigned char { kFree, kFilling, kLive };
  static constexpr std::uint32_t kNone = 0xFFFFFFFF;

  Phase phase = Phase::kFree;
  bool failed = false;  ///< A write of the fill failed: it can only be dropped.
  StoreKey key;
  StoreKey parent;
  std::uint64_t number = 0;
  std::uint64_t layout_fingerprint = 0;
  std::uint32_t extent_bytes = 0;
  std::uint32_t written = 0;  ///< Extents of a fill that have been written.
  std::uint32_t references = 0;
  std::uint32_t holds = 0;
  std::uint32_t unit = 0;   ///< Of the manifest.
  std::uint32_t units = 0;  ///< Of the manifest; 0 when it has none yet.
  std::uint32_t manifest_bytes = 0;
  std::uint64_t manifest = 0;  ///< Its checksum.
  double value = 0.0;
  std::uint64_t last_use = 0;
  /// Neighbours among the items that continue the same one.
  std::uint32_t next_child = kNone;
  std::uint32_t previous_child = kNone;
  /// Sorted by kind, first, second, third once live; the extents come first.
  std::vector<ManifestPart> parts;
};

/// Order of eviction: least valuable first, then longest unused.
struct EvictionRank {
  double value = 0.0;
  std::uint64_t last_use = 0;
  std::uint32_t item = 0;
  friend auto operator<=>(const EvictionRank&, const EvictionRank&) = default;
};

/// Sizes of a store's files.
struct StoreGeometry {
  std::uint32_t segments = 0;
  std::uint64_t segment_bytes = 0;
  std::uint64_t index_bytes = 0;

  static Result<StoreGeometry> of_capacity(std::uint64_t capacity_bytes,
                                           std::uint64_t segment_bytes);
  /// Index, lock and segments.
  std::uint64_t total_bytes() const;
  std::uint32_t units_per_segment() const {
    return static_cast<std::uint32_t>((segment_bytes - SegmentHeader::kDataOffset) /
                                      SpaceMap::kUnitBytes);
  }
  friend bool operator==(const StoreGeometry&, const StoreGeometry&) = default;
};

// Invariants:
//  - every place of every live item and fill is taken in `space`, and nothing else is;
//  - `by_key` has the live items and the fills; `children` has the first of a list of both under
//    their parent's key, whether that one is there or not;
//  - `ranks` has just the live items without holds and children: what may be evicted;
//  - a place is given back only after the index (where there is one) has stopped listing its item.
struct Store::State {
  static constexpr std::size_t kStagedPlaces = 8;

  StoreOptions options;
  std::unique_ptr<StoreDirectory> directory;
  StoreGeometry geometry;
  StoreId id{};
  std::vector<std::unique_ptr<File>> segments;
  std::unique_ptr<File> index_file;
  std::unique_ptr<IndexLog> index;
  std::unique_ptr<StoreIo> io;
  std::unique_ptr<SpaceMap> space;
  /// For manifests, pieces of blobs and what is to be encrypted: `kStagedPlaces` of 256 KiB.
  std::optional<Region> staging;

  std::vector<StoreItem> items;
  std::vector<std::uint32_t> free_items;
  std::unordered_map<StoreKey, std::uint32_t> by_key;
  std::unordered_map<StoreKey, std::uint32_t> children;
  std::set<EvictionRank> ranks;
  std::vector<bool> dirty;  ///< Segments written to since they were synced.
  std::vector<StoreOperation> operations;

  StoreStats stats;
  std::string notice;
  std::uint64_t next_number = 1;
  std::uint64_t uses = 0;
  std::uint32_t open_fills = 0;
  std::uint32_t open_holds = 0;
  std::uint32_t segments_lost = 0;  ///< Made anew at open.
  bool foreign_key = false;
  bool closed = false;

  // --- Places.
  std::uint32_t segment_of(std::uint32_t unit) const { return unit / geometry.units_per_segment(); }
  std::uint64_t offset_of(std::uint32_t unit) const {
    return SegmentHeader::kDataOffset +
           std::uint64_t{unit % geometry.units_per_segment()} * SpaceMap::kUnitBytes;
  }
  std::span<std::byte> staged(std::size_t place) const {
    return staging->bytes().subspan(place * SpaceMap::kChunkBytes, SpaceMap::kChunkBytes);
  }
  StoreOperation operation(FileOperation::Kind kind, std::uint32_t unit,
                           std::span<std::byte> buffer, std::size_t tag) const;
  /// Encrypts or decrypts in place what lies, or is to lie, at the operation's place.
  void encrypt(const StoreOperation& operation, std::span<const std::byte> source);
  void decrypt(const StoreOperation& operation);
  /// One operation on a place, from start to end; decrypts what it reads.
  Status read_place(std::uint32_t unit, std::span<std::byte> target);
  Status write_place(std::uint32_t unit, std::span<std::byte> staged_bytes);

  // --- Items.
  bool logged() const { return options.durability >= Durability::kCrash; }
  Status check_writable() const;
  std::uint32_t new_item();
  void free_item(std::uint32_t index);
  bool is_evictable(const StoreItem& item) const;
  void rank(std::uint32_t index);
  void unrank(std::uint32_t index);
  void link_child(std::uint32_t index);
  void unlink_child(std::uint32_t index);
  std::uint64_t units_of(const StoreItem& item) const;
  const ManifestPart* find_part(const StoreItem& item, ManifestPart::Kind kind, std::uint32_t first,
                                std::uint32_t second, std::uint32_t third) const;
  void give_back_places(StoreItem& item);

  // --- Writing.
  Status take_place(std::uint32_t units, std::uint32_t& unit);
  Status write_extents(StoreItem& item, std::span<const StoreExtentWrite> extents,
                       std::span<const std::uint64_t> digests);
  Status check_manifest(const StoreItem& item, std::span<const StoreBlob> blobs) const;
  Status place_blobs(StoreItem& item, std::span<const StoreBlob> blobs);
  Status write_pieces(std::span<const ManifestPart> pieces, std::span<const std::byte> bytes);
  Status write_manifest(StoreItem& item, std::span<const StoreBlob> blobs);
  Status sync_segments();
  Status check_files();
  Status append(std::span<const IndexRecord> records);
  IndexRecord record_of(const StoreItem& item, IndexRecord::Kind kind) const;
  Status rewrite_index(bool clean, std::uint64_t epoch_min = 0);
  Status commit_all(std::span<const Commit> commits);
  void abandon(std::uint32_t index);

  // --- Dropping.
  Status drop(std::span<const std::uint32_t> victims);
  Status evict(std::uint64_t units_wanted);
  void zero_manifests(std::span<const std::uint32_t> victims);
  Status move_place(std::uint32_t item, const SpaceMap::Move& move);

  // --- Reading.
  Status read_pieces(const StoreItem& item, std::span<const ManifestPart> pieces,
                     std::span<std::byte> target);
  Status check_blob(const StoreItem& item, const ManifestPart& part,
                    std::span<const std::byte> found) const;
  Status read_manifest(const StoreItem& item, std::span<const std::byte>& manifest);
  void verify_read(StoreExtentRead& read, const ManifestPart& part, Status status);

  // --- Opening.
  Status open_files();
  Status create_files();
  Status create_segment(std::uint32_t segment);
  Status open_existing();
  Status open_index();
  Status check_room(std::uint64_t new_bytes);
  Result<SegmentHeader> read_header(File& file);
  SegmentHeader header_of(std::uint32_t segment) const;
  Status find_geometry();
  Result<bool> is_unfinished();
  Status load_index();
  struct Listed {
    IndexRecord record;
    std::uint64_t line = 0;  ///< In the index: later ones were used later.
  };
  Status load_items(std::span<const IndexRecord> records, std::uint64_t first_line);
  Status rebuild(const std::string& reason);
  Status scan_segment(std::uint32_t segment, std::vector<StoreItem>& found);
  void load_some(std::span<const Listed> listed);
  Result<StoreItem> parse_manifest(std::uint32_t unit, std::span<const std::byte> memory) const;
  Result<StoreItem> load_manifest(std::uint32_t unit, std::span<const std::byte> look);
  bool extents_are_there(const StoreItem& item);
  bool adopt(StoreItem&& item, std::uint64_t last_use);
  bool places_are_inside(const StoreItem& item) const;
  Status load_detailed(const IndexContent& content);
  void add_notice(const std::string& line);
  Status close_files();
};

/// "segment-0007".
std::string segment_name(std::uint32_t segment);
inline constexpr const char* kIndexFileName = "index";

}  // namespace kvtier
