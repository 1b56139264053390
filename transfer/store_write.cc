// Fills: taking places, writing extents, blobs and manifests, making items visible.

#include "kernels/checksum.h"
#include "transfer/extent_format.h"
#include "transfer/store.h"
#include "transfer/store_state.h"

#include <algorithm>
#include <cmath>
#include <tuple>

namespace kvtier {
namespace {

constexpr std::size_t kStorePageBytes = BlockLayout::kPageBytes;

// The file only reads from a buffer that it writes; its interface has one kind of buffer for both.
std::span<std::byte> for_writing(std::span<const std::byte> bytes) {
  return {const_cast<std::byte*>(bytes.data()), bytes.size()};
}

auto key_of(const ManifestPart& part) {
  return std::tuple(part.kind, part.first, part.second, part.third);
}

// Sorts an item's parts and refuses two that go by the same name.
Status sort_parts(StoreItem& item) {
  std::sort(item.parts.begin(), item.parts.end(),
            [](const auto& a, const auto& b) { return key_of(a) < key_of(b); });
  for (std::size_t i = 1; i < item.parts.size(); ++i) {
    const ManifestPart& a = item.parts[i - 1];
    const ManifestPart& b = item.parts[i];
    const bool extents = a.kind == ManifestPart::Kind::kExtent && key_of(a) == key_of(b);
    const bool blobs =
        b.kind == ManifestPart::Kind::kInlineBlob && a.kind == b.kind && a.first == b.first;
    if (!extents && !blobs) continue;
    return invalid_argument(fmt::format("item {}: two {} of the same name", item.key.short_text(),
                                        extents ? "extents" : "blobs"));
  }
  return {};
}

}  // namespace

Status Store::State::take_place(std::uint32_t units, std::uint32_t& unit) {
  std::optional<std::uint32_t> taken = space->take(units);
  while (!taken) {
    KVTIER_RETURN_IF_ERROR(evict(units));
    taken = space->take(units);
  }
  unit = *taken;
  return {};
}

Result<StoreFill> Store::fill(const StoreFillRequest& request) {
  State& state = *state_;
  KVTIER_RETURN_IF_ERROR(state.check_writable());
  const std::uint32_t units = SpaceMap::units_for(request.extent_bytes);
  if (request.extents > 0 && (units == 0 || request.extent_bytes % kStorePageBytes != 0)) {
    return unsupported(fmt::format("extents of {} B, expected a multiple of 4096 up to {}",
                                   request.extent_bytes, SpaceMap::kChunkBytes));
  }
  if (state.by_key.contains(request.key)) {
    return busy(fmt::format("item {} is stored or being written", request.key.short_text()));
  }
  // One more unit for the manifest, which gets its place when its size is known.
  const std::uint64_t wanted = std::uint64_t{request.extents} * units + 1;
  const std::uint64_t fixed_bytes =
      ManifestHeader::kBytes + std::uint64_t{request.extents} * ManifestHeader::kPartBytes;
  if (wanted > state.space->units() || fixed_bytes > SpaceMap::kChunkBytes) {
    return no_space(fmt::format("{}: an item of {} extents of {} B, the store has {} B",
                                state.directory->name(), request.extents, request.extent_bytes,
                                state.space->units() * SpaceMap::kUnitBytes));
  }
  const std::uint32_t index = state.new_item();
  StoreItem& item = state.items[index];
  item.phase = StoreItem::Phase::kFilling;
  item.key = request.key;
  item.parent = request.parent;
  item.layout_fingerprint = request.layout_fingerprint;
  item.extent_bytes = static_cast<std::uint32_t>(request.extent_bytes);
  state.by_key.emplace(request.key, index);
  state.link_child(index);
  ++state.open_fills;
  // From here on dropping the fill undoes everything.
  StoreFill fill(this, index);
  // Half of the index is left for what is appended, so that it is not rewritten at every turn.
  if (state.by_key.size() > state.index->records_max() / 2) {
    KVTIER_RETURN_IF_ERROR(state.evict(1));
  }
  if (state.space->free_units() < wanted) {
    KVTIER_RETURN_IF_ERROR(state.evict(wanted - state.space->free_units()));
  }
  for (std::uint32_t i = 0; i < request.extents; ++i) {
    ManifestPart part;
    part.units = static_cast<std::uint8_t>(units);
    KVTIER_RETURN_IF_ERROR(state.take_place(units, part.unit));
    state.items[index].parts.push_back(part);
  }
  return fill;
}

Status Store::write(StoreFill& fill, std::span<const StoreExtentWrite> extents) {
  KVTIER_CHECK(fill.store_ == this, "a fill of another store, or an empty one");
  State& state = *state_;
  StoreItem& item = state.items[fill.index_];
  if (item.failed) return io_error("an earlier write of this item failed");
  if (extents.size() > item.parts.size() - item.written) {
    return invalid_argument(fmt::format("{} extents written, {} more given, {} asked for",
                                        item.written, extents.size(), item.parts.size()));
  }
  std::vector<std::uint64_t> digests;
  for (const StoreExtentWrite& extent : extents) {
    if (extent.bytes.size() != item.extent_bytes ||
        reinterpret_cast<std::uintptr_t>(extent.bytes.data()) % kStorePageBytes != 0) {
      return invalid_argument(
          fmt::format("an extent of {} B at {}, expected {} B, page-aligned", extent.bytes.size(),
                      static_cast<const void*>(extent.bytes.data()), item.extent_bytes));
    }
    ExtentFacts facts;
    KVTIER_RETURN_IF_ERROR(state.options.verify_writes ? check_extent(extent.bytes, {}, facts)
                                                       : check_extent_header(extent.bytes, facts));
    if (facts.layer != extent.key.layer || facts.head_group != extent.key.head_group ||
        facts.fingerprint != item.layout_fingerprint) {
      return corrupt(fmt::format(
          "an extent of layer {} head group {} layout {:#x}, expected layer {} head group {} "
          "layout {:#x}",
          facts.layer.value, facts.head_group.value, facts.fingerprint, extent.key.layer.value,
          extent.key.head_group.value, item.layout_fingerprint));
    }
    digests.push_back(facts.header_digest);
  }
  const Status status = state.write_extents(item, extents, digests);
  item.failed = !status.ok();
  return status;
}

Status Store::State::write_extents(StoreItem& item, std::span<const StoreExtentWrite> extents,
                                   std::span<const std::uint64_t> digests) {
  Status failure;
  while (!extents.empty()) {
    // Encrypted copies go through the staging memory; plain extents are written from where they
    // are.
    const std::size_t count =
        options.cipher == nullptr ? extents.size() : std::min(extents.size(), kStagedPlaces);
    operations.clear();
    for (std::size_t i = 0; i < count; ++i) {
      const StoreExtentWrite& extent = extents[i];
      ManifestPart& part = item.parts[item.written++];
      part.kind = ManifestPart::Kind::kExtent;
      part.first = extent.key.layer.value;
      part.second = extent.key.head_group.value;
      part.third = extent.key.index;
      part.digest = digests[i];
      std::span<std::byte> buffer = for_writing(extent.bytes);
      if (options.cipher != nullptr) buffer = staged(i).first(extent.bytes.size());
      operations.push_back(operation(FileOperation::Kind::kWrite, part.unit, buffer, i));
      if (options.cipher != nullptr) encrypt(operations.back(), extent.bytes);
      dirty[operations.back().file] = true;
      stats.written_bytes += extent.bytes.size();
    }
    io->run(operations, [&](StoreOperation& done) {
      if (done.io.status.ok()) return;
      ++stats.write_failures;
      if (failure.ok()) failure = done.io.status;
    });
    extents = extents.subspan(count);
    digests = digests.subspan(count);
  }
  return failure;
}

Status Store::State::sync_segments() {
  for (std::size_t i = 0; i < segments.size(); ++i) {
    if (!dirty[i]) continue;
    KVTIER_RETURN_IF_ERROR(segments[i]->sync());
    dirty[i] = false;
  }
  return {};
}

// What is written to a file that lost its name would not be found again.
Status Store::State::check_files() {
  for (std::uint32_t i = 0; i < segments.size(); ++i) {
    if (dirty[i]) KVTIER_RETURN_IF_ERROR(directory->check(segment_name(i)));
  }
  return directory->check(kIndexFileName);
}

IndexRecord Store::State::record_of(const StoreItem& item, IndexRecord::Kind kind) const {
  return {.kind = kind,
          .references = item.references,
          .unit = item.unit,
          .units = item.units,
          .number = item.number,
          .manifest = item.manifest,
          .value = item.value,
          .key = item.key};
}

Status Store::State::rewrite_index(bool clean, std::uint64_t epoch_min) {
  std::vector<const StoreItem*> live;
  for (const StoreItem& item : items) {
    if (item.phase == StoreItem::Phase::kLive) live.push_back(&item);
  }
  // The longest unused first: whoever loads the list knows the order of use.
  std::sort(live.begin(), live.end(),
            [](const StoreItem* a, const StoreItem* b) { return a->last_use < b->last_use; });
  std::vector<IndexRecord> records;
  std::vector<IndexDetailed> details;
  for (const StoreItem* item : live) {
    records.push_back(record_of(*item, IndexRecord::Kind::kPut));
    if (!clean) continue;
    details.push_back({.detail = {.parent = item->parent,
                                  .layout_fingerprint = item->layout_fingerprint,
                                  .extent_bytes = item->extent_bytes,
                                  .manifest_bytes = item->manifest_bytes,
                                  .parts = static_cast<std::uint32_t>(item->parts.size())},
                       .parts = item->parts});
  }
  const IndexHeader header = {.store = id,
                              .epoch = epoch_min,
                              .level = options.durability,
                              .clean = clean,
                              .segments = geometry.segments,
                              .segment_bytes = geometry.segment_bytes};
  ++stats.index_rewrites;
  return index->rewrite(header, records, details);
}

Status Store::State::append(std::span<const IndexRecord> records) {
  if (!logged()) return {};
  if (!index->is_sound() || index->room() < records.size()) {
    KVTIER_RETURN_IF_ERROR(rewrite_index(false));
  }
  return index->append(records);
}

Status Store::State::commit_all(std::span<const Commit> commits) {
  for (const Commit& commit : commits) {
    StoreItem& item = items[commit.fill->index_];
    if (item.failed) return io_error("an earlier write of this item failed");
    if (std::isnan(commit.value)) return invalid_argument("an item of which the value is NaN");
    if (item.written != item.parts.size()) {
      return invalid_argument(fmt::format("item {}: {} of {} extents were written",
                                          item.key.short_text(), item.written, item.parts.size()));
    }
    KVTIER_RETURN_IF_ERROR(check_manifest(item, commit.blobs));
    KVTIER_RETURN_IF_ERROR(place_blobs(item, commit.blobs));
    KVTIER_RETURN_IF_ERROR(sort_parts(item));
    KVTIER_RETURN_IF_ERROR(write_manifest(item, commit.blobs));
  }
  if (!logged()) return {};
  KVTIER_RETURN_IF_ERROR(check_files());
  if (options.durability == Durability::kPower) KVTIER_RETURN_IF_ERROR(sync_segments());
  std::vector<IndexRecord> records;
  for (const Commit& commit : commits) {
    StoreItem& item = items[commit.fill->index_];
    item.value = commit.value;
    item.references = commit.references;
    records.push_back(record_of(item, IndexRecord::Kind::kPut));
  }
  KVTIER_RETURN_IF_ERROR(append(records));
  return options.durability == Durability::kPower ? index->sync() : Status();
}

Status Store::commit(std::span<const Commit> commits) {
  State& state = *state_;
  for (const Commit& commit : commits) {
    KVTIER_CHECK(commit.fill != nullptr && commit.fill->store_ == this,
                 "a fill of another store, or an empty one");
  }
  const Status status = state.commit_all(commits);
  if (!status.ok()) {
    for (const Commit& commit : commits) *commit.fill = StoreFill();
    return status;
  }
  for (const Commit& commit : commits) {
    const std::uint32_t index = commit.fill->index_;
    StoreItem& item = state.items[index];
    item.phase = StoreItem::Phase::kLive;
    item.value = commit.value;
    item.references = commit.references;
    item.last_use = ++state.uses;
    state.rank(index);
    commit.fill->store_ = nullptr;
    --state.open_fills;
    ++state.stats.commits;
  }
  return {};
}

// A manifest that nothing will list is not left for a rebuild to find.
void Store::State::abandon(std::uint32_t index) {
  StoreItem& item = items[index];
  if (item.units > 0) zero_manifests({&index, 1});
  give_back_places(item);
  free_item(index);
  --open_fills;
}

}  // namespace kvtier
