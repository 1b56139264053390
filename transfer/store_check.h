#pragma once

#include "memory/status.h"
#include "transfer/store.h"

#include <cstdint>
#include <string>
#include <vector>

namespace kvtier {

/// What a check of a whole store found.
struct StoreCheckReport {
  std::string notice;  ///< What opening said.
  StoreStats stats;
  std::uint64_t items = 0;
  std::uint64_t extents = 0;
  std::uint64_t blocks = 0;
  std::uint64_t blobs = 0;
  std::uint64_t bytes = 0;  ///< Read and verified.
  /// One line per item that is not wholly sound.
  std::vector<std::string> unsound;
  std::uint64_t repaired = 0;  ///< Unsound items that were dropped.

  bool sound() const { return unsound.size() == repaired && stats.items_dropped == 0; }
};

/// Reads everything in the store and verifies it. With `repair`, items that are not wholly sound
/// are dropped; nothing is ever mended or made up. Waits; allocates.
Result<StoreCheckReport> check_store(Store& store, bool repair);

/// What a segment file holds, by looking at the file alone.
struct SegmentReport {
  SegmentHeader header;
  std::string backend;
  std::uint64_t file_bytes = 0;
  std::uint64_t manifests = 0;  ///< Sound, of whatever age.
  std::uint64_t extents = 0;    ///< With a sound header.
  std::uint64_t blocks = 0;     ///< Of those extents.
  std::uint64_t blocks_corrupt = 0;
  std::uint64_t empty_units = 0;  ///< Units that begin with zeros.
  std::uint64_t other_units = 0;  ///< Insides of larger places, blobs, or what was dropped.
  /// The first few blocks that failed, one line each.
  std::vector<std::string> corrupt;
};

/// Looks through a segment file; `cipher` is null for a plain one. `corrupt` when its header is not
/// sound, `unsupported` when its key is another one.
Result<SegmentReport> inspect_segment(const std::string& path, PageCipher* cipher);

}  // namespace kvtier
