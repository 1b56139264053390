// Loading: from the index, or by looking for manifests in the segments.

#include "kernels/checksum.h"
#include "transfer/extent_format.h"
#include "transfer/store.h"
#include "transfer/store_state.h"

#include <algorithm>
#include <cmath>
#include <unordered_map>

namespace kvtier {
namespace {

// Pages of the beginnings of units that are read at a time while a segment is looked through.
constexpr std::uint32_t kUnitsPerLook = 256;
// Manifests that are read at a time, and how much of each: most are not longer.
constexpr std::size_t kManifestsPerLook = 32;
constexpr std::size_t kLookBytes = 32 * 1024;
// Looks go to the second half of the staging memory: the first holds longer manifests.
static_assert(kUnitsPerLook * SegmentHeader::kBytes == kManifestsPerLook * kLookBytes);

}  // namespace

bool Store::State::places_are_inside(const StoreItem& item) const {
  return std::ranges::all_of(item.parts, [this](const ManifestPart& part) {
    const std::uint64_t end = std::uint64_t{part.unit} + part.units;
    return part.units == 0 || (part.unit % part.units == 0 && end <= space->units());
  });
}

// What the bytes of a manifest at a unit say; everything but references and value.
Result<StoreItem> Store::State::parse_manifest(std::uint32_t unit,
                                               std::span<const std::byte> memory) const {
  StoreItem item;
  KVTIER_ASSIGN_OR_RETURN(const ManifestHeader header, decode_manifest(memory, item.parts));
  if (header.store != id) return corrupt("a manifest of another store");
  if (!places_are_inside(item)) return corrupt("a manifest with a place outside of the store");
  item.phase = StoreItem::Phase::kLive;
  item.key = header.key;
  item.parent = header.parent;
  item.number = header.number;
  item.layout_fingerprint = header.layout_fingerprint;
  item.extent_bytes = header.extent_bytes;
  item.unit = unit;
  item.units = SpaceMap::units_for(header.bytes);
  item.manifest_bytes = header.bytes;
  item.manifest = manifest_checksum(memory.first(header.bytes));
  return item;
}

// The manifest that begins at a unit, of which `look` holds the first bytes.
Result<StoreItem> Store::State::load_manifest(std::uint32_t unit, std::span<const std::byte> look) {
  KVTIER_ASSIGN_OR_RETURN(const ManifestHeader header, decode_manifest_header(look));
  if (header.bytes <= look.size()) return parse_manifest(unit, look);
  const std::uint32_t units = SpaceMap::units_for(header.bytes);
  if (unit % units != 0) return corrupt("a manifest at a place that is not aligned");
  const std::size_t pages = (header.bytes + SegmentHeader::kBytes - 1) / SegmentHeader::kBytes;
  const std::span<std::byte> memory = staged(0).first(pages * SegmentHeader::kBytes);
  KVTIER_RETURN_IF_ERROR(read_place(unit, memory));
  return parse_manifest(unit, memory);
}

// Takes an item with all its places; false when one of them belongs to another.
bool Store::State::adopt(StoreItem&& item, std::uint64_t last_use) {
  if (by_key.contains(item.key) || !space->claim(item.unit, item.units)) return false;
  for (std::size_t i = 0; i < item.parts.size(); ++i) {
    if (item.parts[i].units == 0 || space->claim(item.parts[i].unit, item.parts[i].units)) continue;
    while (i > 0) {
      const ManifestPart& claimed = item.parts[--i];
      if (claimed.units > 0) space->give_back(claimed.unit, claimed.units);
    }
    space->give_back(item.unit, item.units);
    return false;
  }
  const std::uint32_t index = new_item();
  by_key.emplace(item.key, index);
  items[index] = std::move(item);
  items[index].last_use = last_use;
  uses = std::max(uses, last_use);
  link_child(index);
  rank(index);
  return true;
}

// Reads the manifests of some records at a time and takes the items that are as they must be.
void Store::State::load_some(std::span<const Listed> listed) {
  operations.clear();
  for (std::size_t i = 0; i < listed.size(); ++i) {
    if (listed[i].record.unit >= space->units()) continue;
    operations.push_back(
        operation(FileOperation::Kind::kRead, listed[i].record.unit,
                  staging->bytes().subspan((kManifestsPerLook + i) * kLookBytes, kLookBytes), i));
  }
  std::vector<std::span<const std::byte>> looks(listed.size());
  io->run(operations, [&](StoreOperation& done) {
    stats.read_failures += !done.io.status.ok();
    if (!done.io.status.ok()) return;
    decrypt(done);
    looks[done.index] = done.io.buffer;
  });
  for (std::size_t i = 0; i < listed.size(); ++i) {
    const IndexRecord& record = listed[i].record;
    Result<StoreItem> item = load_manifest(record.unit, looks[i]);
    const bool same = item.ok() && item->key == record.key && item->number == record.number &&
                      item->manifest == record.manifest && item->units == record.units;
    if (same) {
      item->references = record.references;
      // No number has no place in the order of eviction.
      item->value = std::isnan(record.value) ? 0.0 : record.value;
    }
    if (!same || !adopt(std::move(*item), listed[i].line)) ++stats.items_dropped;
  }
}

// The items of a list that was closed cleanly, of which it repeats the manifests. What such a list
// says is believed as a manifest's word is: extents and blobs have to agree with it when they are
// read.
Status Store::State::load_detailed(const IndexContent& content) {
  // Where a segment was made anew, the manifests that are left say what was in it.
  if (segments_lost > 0) return load_items(content.records, 0);
  std::span<const ManifestPart> parts = content.parts;
  items.reserve(content.records.size());
  by_key.reserve(content.records.size());
  for (std::size_t i = 0; i < content.details.size(); ++i) {
    const IndexRecord& record = content.records[i];
    const IndexDetail& detail = content.details[i];
    StoreItem item;
    item.phase = StoreItem::Phase::kLive;
    item.key = record.key;
    item.parent = detail.parent;
    item.number = record.number;
    item.layout_fingerprint = detail.layout_fingerprint;
    item.extent_bytes = detail.extent_bytes;
    item.references = record.references;
    item.unit = record.unit;
    item.units = record.units;
    item.manifest_bytes = detail.manifest_bytes;
    item.manifest = record.manifest;
    item.value = std::isnan(record.value) ? 0.0 : record.value;
    item.parts.assign(parts.begin(), parts.begin() + detail.parts);
    parts = parts.subspan(detail.parts);
    const bool is_sound = SpaceMap::units_for(item.manifest_bytes) == item.units &&
                          item.manifest_bytes > 0 && places_are_inside(item);
    if (!is_sound || !adopt(std::move(item), i + 1)) ++stats.items_dropped;
  }
  return load_items(std::span(content.records).subspan(content.details.size()),
                    content.details.size());
}

Status Store::State::load_items(std::span<const IndexRecord> records, std::uint64_t first_line) {
  std::unordered_map<StoreKey, Listed> alive;
  std::uint64_t line = first_line;
  for (const IndexRecord& record : records) {
    ++line;
    if (record.kind == IndexRecord::Kind::kPut) {
      alive[record.key] = {record, line};
    } else if (record.kind == IndexRecord::Kind::kErase) {
      alive.erase(record.key);
    } else if (record.kind == IndexRecord::Kind::kReferences) {
      if (const auto found = alive.find(record.key); found != alive.end()) {
        found->second.record.references = record.references;
      }
    }
  }
  std::vector<Listed> sorted;
  sorted.reserve(alive.size());
  for (const auto& [key, listed] : alive) sorted.push_back(listed);
  // The latest first: of two claims to a place the later one is right.
  std::sort(sorted.begin(), sorted.end(),
            [](const Listed& a, const Listed& b) { return a.record.number > b.record.number; });
  std::span<const Listed> rest = sorted;
  while (!rest.empty()) {
    const std::size_t count = std::min(rest.size(), kManifestsPerLook);
    load_some(rest.first(count));
    rest = rest.subspan(count);
  }
  return {};
}

Status Store::State::load_index() {
  Status usable = open_index();
  if (!usable.ok() && !(options.read_only && usable.code() == StatusCode::kNotFound)) {
    return usable;
  }
  IndexContent content;
  if (usable.ok()) {
    Result<IndexContent> loaded = index->load(id);
    if (loaded.ok()) {
      content = std::move(*loaded);
    } else if (loaded.status().code() == StatusCode::kUnsupported) {
      return loaded.status();
    } else {
      usable = loaded.status();
    }
  }
  if (usable.ok() && !content.damage.empty()) usable = corrupt("index: " + content.damage);
  if (usable.ok() && options.ignore_index) usable = corrupt("index: not asked");
  const std::uint64_t epoch = content.header.epoch + 1;
  if (usable.ok() && content.header.level == Durability::kClean && !content.header.clean) {
    add_notice("the store was not closed, and its durability was `clean`: it is empty");
  } else if (usable.ok()) {
    KVTIER_RETURN_IF_ERROR(load_detailed(content));
    if (stats.items_dropped > 0) {
      add_notice(fmt::format("{} items are listed, but not there as they must be: dropped",
                             stats.items_dropped));
    }
  } else {
    KVTIER_RETURN_IF_ERROR(rebuild(usable.message()));
  }
  std::uint64_t number_max = 0;
  for (const StoreItem& item : items) number_max = std::max(number_max, item.number);
  const std::uint64_t next_epoch = std::max(epoch, (number_max >> 40) + 1);
  next_number = (next_epoch << 40) + 1;
  return options.read_only ? Status() : rewrite_index(false, next_epoch);
}

// Whether every extent of an item that no index vouches for has the header that it must have. Reads
// the headers alone, as many at a time as there is memory for.
bool Store::State::extents_are_there(const StoreItem& item) {
  std::vector<const ManifestPart*> extents;
  for (const ManifestPart& part : item.parts) {
    if (part.kind == ManifestPart::Kind::kExtent) extents.push_back(&part);
  }
  // All extents of an item are of one layout: the first says how long its headers are.
  std::size_t header_bytes = std::min<std::size_t>(SegmentHeader::kBytes, item.extent_bytes);
  if (!extents.empty()) {
    const std::span<std::byte> page = staged(1).first(header_bytes);
    if (!read_place(extents.front()->unit, page).ok()) return false;
    header_bytes = extent_header_bytes(page);
    if (header_bytes == 0 || header_bytes > item.extent_bytes) return false;
  }
  const std::span<std::byte> memory = staging->bytes().subspan(SpaceMap::kChunkBytes);
  const std::size_t at_once = memory.size() / header_bytes;
  bool all = true;
  for (std::size_t first = 0; first < extents.size() && all; first += at_once) {
    operations.clear();
    for (std::size_t i = first; i < std::min(first + at_once, extents.size()); ++i) {
      operations.push_back(operation(FileOperation::Kind::kRead, extents[i]->unit,
                                     memory.subspan((i - first) * header_bytes, header_bytes), i));
    }
    io->run(operations, [&](StoreOperation& done) {
      stats.read_bytes += done.io.buffer.size();
      all = all && done.io.status.ok();
      if (!all) return;
      decrypt(done);
      ExtentFacts facts;
      all = check_extent_header(done.io.buffer, facts).ok() &&
            facts.header_digest == extents[done.index]->digest;
    });
  }
  return all;
}

Status Store::State::scan_segment(std::uint32_t segment, std::vector<StoreItem>& found) {
  const std::uint32_t units = geometry.units_per_segment();
  const std::uint64_t total = std::uint64_t{geometry.segments} * units * SpaceMap::kUnitBytes;
  for (std::uint32_t first = 0; first < units; first += kUnitsPerLook) {
    const std::uint32_t count = std::min(kUnitsPerLook, units - first);
    operations.clear();
    for (std::uint32_t i = 0; i < count; ++i) {
      operations.push_back(
          operation(FileOperation::Kind::kRead, segment * units + first + i,
                    staging->bytes().subspan((kUnitsPerLook + i) * SegmentHeader::kBytes,
                                             SegmentHeader::kBytes),
                    i));
    }
    std::vector<std::uint32_t> candidates;
    io->run(operations, [&](StoreOperation& done) {
      if (!done.io.status.ok()) {
        ++stats.read_failures;
        return;
      }
      decrypt(done);
      if (looks_like_manifest(done.io.buffer, id)) {
        candidates.push_back(segment * units + first + static_cast<std::uint32_t>(done.index));
      }
    });
    for (const std::uint32_t unit : candidates) {
      const std::span<const std::byte> page = staging->bytes().subspan(
          (kUnitsPerLook + unit - segment * units - first) * SegmentHeader::kBytes,
          SegmentHeader::kBytes);
      Result<StoreItem> item = load_manifest(unit, page);
      if (item.ok()) found.push_back(std::move(*item));
    }
    if (options.progress) {
      options.progress((std::uint64_t{segment} * units + first + count) * SpaceMap::kUnitBytes,
                       total);
    }
  }
  return {};
}

Status Store::State::rebuild(const std::string& reason) {
  stats.rebuilt = true;
  add_notice(fmt::format("rebuilt from the segments ({})", reason));
  std::vector<StoreItem> found;
  for (std::uint32_t i = 0; i < geometry.segments; ++i) {
    KVTIER_RETURN_IF_ERROR(scan_segment(i, found));
  }
  std::sort(found.begin(), found.end(),
            [](const StoreItem& a, const StoreItem& b) { return a.number > b.number; });
  // Later commits count as later uses.
  std::uint64_t last_use = found.size();
  for (StoreItem& item : found) {
    if (extents_are_there(item)) adopt(std::move(item), last_use);
    --last_use;
  }
  // How many referred to an item is not in the segments: those at the end of a chain had one.
  for (StoreItem& item : items) {
    if (item.phase == StoreItem::Phase::kLive) item.references = !children.contains(item.key);
  }
  return {};
}

}  // namespace kvtier
