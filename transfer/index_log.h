#pragma once

#include "memory/region.h"
#include "transfer/file.h"
#include "transfer/store_format.h"

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

namespace kvtier {

/// What an index says when it is read.
struct IndexContent {
  IndexHeader header;
  std::vector<IndexRecord> records;
  /// Of a list that was closed cleanly: what the manifests of the first records say, in order.
  std::vector<IndexDetail> details;
  /// Their parts, one item's behind the other's.
  std::vector<ManifestPart> parts;
  /// Something in it is torn, lost or misplaced: what stands behind it is unknown, and the store is
  /// rebuilt from the segments instead.
  std::string damage;
};

/// What goes into an index behind an item's record, so that opening need not read its manifest.
struct IndexDetailed {
  IndexDetail detail;
  std::span<const ManifestPart> parts;
};

/// The index of a store: an append-only list of records in one file, which has two areas. When one
/// is full, or the store is opened or closed, what is alive is written to the other and that
/// becomes the one that counts, so that no moment leaves the store without an index.
///
/// A write of the last page repeats the records before it as they are; records do not cross sectors
/// of 512 bytes, so a torn write costs none of them. Owns nothing but a buffer; the file outlives
/// it. One thread at a time; every call waits for its writes.
class IndexLog {
 public:
  /// Size of a file for `records_max` records per area.
  static std::uint64_t file_bytes(std::uint64_t records_max);

  static Result<std::unique_ptr<IndexLog>> open(File* file);

  /// `corrupt` when neither area has a sound header of this store.
  Result<IndexContent> load(const StoreId& store);

  /// Writes `records` to the other area and makes it the one that counts; ends durable, whatever
  /// the level. `details`, for a header that says clean, go with the first records, as many as
  /// there is room for. `no_space` when the records do not fit.
  Status rewrite(IndexHeader header, std::span<const IndexRecord> records,
                 std::span<const IndexDetailed> details = {});

  /// False after a failed write, until a rewrite succeeds.
  bool is_sound() const { return !broken_; }
  /// Records that can still be appended.
  std::uint64_t room() const { return records_max_ - position_; }
  std::uint64_t records_max() const { return records_max_; }
  std::uint64_t epoch() const { return header_.epoch; }
  std::uint32_t area() const { return area_; }
  /// `no_space` when there is no room: rewrite. After another failure the last page is unknown and
  /// every further append fails until a rewrite succeeds.
  Status append(std::span<const IndexRecord> records);
  Status sync();

 private:
  IndexLog(File* file, Region buffer);
  std::span<std::byte> tail() const;
  std::uint64_t area_offset(std::uint32_t area) const;
  Result<IndexHeader> read_header(std::uint32_t area, const StoreId& store);
  class Lines;
  Status write_lines(std::uint32_t area, std::uint64_t epoch, std::uint64_t position, Lines& lines);

  File* file_;
  /// What is written or read, and behind it the last page as it stands in the file.
  Region buffer_;
  std::uint64_t area_bytes_ = 0;
  std::uint64_t records_max_ = 0;
  std::uint32_t area_ = 0;
  std::uint64_t position_ = 0;
  /// No attempt at a rewrite has the epoch of another, so that what a failed one left is told
  /// apart.
  std::uint64_t epoch_tried_ = 0;
  IndexHeader header_;
  bool broken_ = false;
  /// Each area has a header: from then on a header that is missing means damage.
  bool has_both_ = false;
};

}  // namespace kvtier
