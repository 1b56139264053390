// Items are found, held, read and verified.

#include "kernels/checksum.h"
#include "transfer/extent_format.h"
#include "transfer/store.h"
#include "transfer/store_state.h"

#include <algorithm>

namespace kvtier {
namespace {

std::size_t whole_pages_of(std::size_t bytes) {
  return (bytes + SegmentHeader::kBytes - 1) / SegmentHeader::kBytes * SegmentHeader::kBytes;
}

}  // namespace

Result<StoredItem> Store::find(const StoreKey& key) {
  State& state = *state_;
  if (!contains(key)) return not_found(fmt::format("item {}", key.short_text()));
  const std::uint32_t index = state.by_key.at(key);
  state.unrank(index);
  state.items[index].last_use = ++state.uses;
  ++state.items[index].holds;
  ++state.open_holds;
  return StoredItem(this, index);
}

// The bytes are what was read; says whether they are the extent that the manifest lists.
void Store::State::verify_read(StoreExtentRead& read, const ManifestPart& part, Status status) {
  if (!status.ok()) {
    ++stats.read_failures;
    std::fill(read.blocks.begin(), read.blocks.end(), StatusCode::kIoError);
    read.status = std::move(status);
    return;
  }
  ExtentFacts facts;
  read.status = check_extent(read.target, read.blocks, facts);
  stats.blocks_verified += facts.blocks;
  stats.blocks_corrupt += facts.blocks_corrupt;
  const bool is_header_bad = !read.status.ok() && facts.blocks_corrupt == 0;
  const std::uint64_t fingerprint = items[read.item->index_].layout_fingerprint;
  if (is_header_bad || (facts.header_digest == part.digest && facts.fingerprint == fingerprint)) {
    stats.blocks_corrupt += is_header_bad;
    return;
  }
  // Sound in itself, but not what was committed under this key.
  ++stats.blocks_corrupt;
  std::fill(read.blocks.begin(), read.blocks.end(), StatusCode::kCorrupt);
  read.status =
      corrupt(fmt::format("layer {} head group {}: header digest is {:#x}, expected {:#x}",
                          part.first, part.second, facts.header_digest, part.digest));
}

void Store::read(std::span<StoreExtentRead> reads) {
  State& state = *state_;
  std::vector<const ManifestPart*> parts(reads.size());
  state.operations.clear();
  for (std::size_t i = 0; i < reads.size(); ++i) {
    StoreExtentRead& read = reads[i];
    KVTIER_CHECK(read.item != nullptr && read.item->store_ == this, "an item of another store");
    const StoreItem& item = state.items[read.item->index_];
    parts[i] = state.find_part(item, ManifestPart::Kind::kExtent, read.key.layer.value,
                               read.key.head_group.value, read.key.index);
    read.status = Status();
    if (parts[i] == nullptr) {
      read.status =
          not_found(fmt::format("item {}: layer {} head group {} extent {}", item.key.short_text(),
                                read.key.layer.value, read.key.head_group.value, read.key.index));
      std::fill(read.blocks.begin(), read.blocks.end(), StatusCode::kNotFound);
      continue;
    }
    KVTIER_CHECK(read.target.size() == item.extent_bytes, "{} B for an extent of {} B",
                 read.target.size(), item.extent_bytes);
    state.operations.push_back(
        state.operation(FileOperation::Kind::kRead, parts[i]->unit, read.target, i));
    state.stats.read_bytes += read.target.size();
  }
  state.io->run(state.operations, [&](StoreOperation& done) {
    if (done.io.status.ok()) state.decrypt(done);
    state.verify_read(reads[done.index], *parts[done.index], done.io.status);
  });
}

// The manifest as it stands on disk, in staging memory, if it is the one that the index lists.
Status Store::State::read_manifest(const StoreItem& item, std::span<const std::byte>& manifest) {
  const std::size_t pages =
      (item.manifest_bytes + SegmentHeader::kBytes - 1) / SegmentHeader::kBytes;
  const std::span<std::byte> bytes = staged(0).first(pages * SegmentHeader::kBytes);
  const Status status = read_place(item.unit, bytes);
  if (!status.ok()) {
    ++stats.read_failures;
    return status;
  }
  manifest = bytes.first(item.manifest_bytes);
  std::vector<ManifestPart> parts;
  const Result<ManifestHeader> header = decode_manifest(manifest, parts);
  if (!header.ok()) return header.status();
  if (header->number != item.number || header->key != item.key ||
      manifest_checksum(manifest) != item.manifest) {
    return corrupt(fmt::format("item {}: the manifest is not the one that was committed",
                               item.key.short_text()));
  }
  return {};
}

Status Store::verify_manifest(const StoredItem& stored) {
  KVTIER_CHECK(stored.store_ == this, "an item of another store");
  std::span<const std::byte> manifest;
  return state_->read_manifest(state_->items[stored.index_], manifest);
}

Status Store::State::check_blob(const StoreItem& item, const ManifestPart& part,
                                std::span<const std::byte> found) const {
  const std::uint64_t digest = checksum(found);
  if (digest == part.digest) return {};
  return corrupt(fmt::format("item {}: blob {}: checksum is {:#x}, expected {:#x}",
                             item.key.short_text(), part.first, digest, part.digest));
}

// Reads the pieces of one blob, as many at a time as there is staging memory.
Status Store::State::read_pieces(const StoreItem& item, std::span<const ManifestPart> pieces,
                                 std::span<std::byte> target) {
  Status failure;
  while (!pieces.empty() && failure.ok()) {
    const std::size_t count = std::min(pieces.size(), kStagedPlaces);
    operations.clear();
    for (std::size_t i = 0; i < count; ++i) {
      operations.push_back(operation(FileOperation::Kind::kRead, pieces[i].unit,
                                     staged(i).first(whole_pages_of(pieces[i].third)), i));
      stats.read_bytes += operations.back().io.buffer.size();
    }
    io->run(operations, [&](StoreOperation& done) {
      const ManifestPart& piece = pieces[done.index];
      stats.read_failures += !done.io.status.ok();
      Status status = done.io.status;
      if (status.ok()) decrypt(done);
      const std::span<const std::byte> found = done.io.buffer.first(piece.third);
      if (status.ok()) status = check_blob(item, piece, found);
      // Every piece but the last has the same length, so its place in the blob follows from its
      // number.
      if (status.ok()) {
        std::copy(found.begin(), found.end(),
                  target.begin() + static_cast<std::ptrdiff_t>(piece.second) *
                                       static_cast<std::ptrdiff_t>(SpaceMap::kChunkBytes));
      } else if (failure.ok()) {
        failure = std::move(status);
      }
    });
    pieces = pieces.subspan(count);
  }
  return failure;
}

Status Store::read_blob(const StoredItem& stored, std::uint32_t tag, std::span<std::byte> target) {
  State& state = *state_;
  KVTIER_CHECK(stored.store_ == this, "an item of another store");
  const StoreItem& item = state.items[stored.index_];
  const std::optional<std::uint64_t> bytes = stored.blob_bytes(tag);
  if (!bytes) {
    return not_found(fmt::format("item {}: no blob {}", item.key.short_text(), tag));
  }
  KVTIER_CHECK(target.size() == *bytes, "{} B for a blob of {} B", target.size(), *bytes);
  // The pieces of a blob are neighbours in order, and what stands in the manifest has one part.
  const auto first = std::ranges::find_if(item.parts, [tag](const ManifestPart& part) {
    return part.kind != ManifestPart::Kind::kExtent && part.first == tag;
  });
  if (first->kind == ManifestPart::Kind::kInlineBlob) {
    std::span<const std::byte> manifest;
    KVTIER_RETURN_IF_ERROR(state.read_manifest(item, manifest));
    const std::span<const std::byte> found = manifest.subspan(first->unit, first->third);
    KVTIER_RETURN_IF_ERROR(state.check_blob(item, *first, found));
    std::copy(found.begin(), found.end(), target.begin());
    return {};
  }
  const auto end = std::find_if(first, item.parts.end(), [&](const ManifestPart& part) {
    return part.kind != first->kind || part.first != tag;
  });
  const std::span<const ManifestPart> pieces(first, end);
  for (std::size_t i = 0; i < pieces.size(); ++i) {
    const bool is_last = i + 1 == pieces.size();
    if (pieces[i].second == i && (is_last || pieces[i].third == SpaceMap::kChunkBytes)) continue;
    return corrupt(
        fmt::format("item {}: blob {}: its pieces are not in order", item.key.short_text(), tag));
  }
  return state.read_pieces(item, pieces, target);
}

}  // namespace kvtier
