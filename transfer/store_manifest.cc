// What an item is made of, on disk: its blobs and its manifest.

#include "kernels/checksum.h"
#include "transfer/store.h"
#include "transfer/store_state.h"

#include <algorithm>

namespace kvtier {
namespace {

constexpr std::size_t kManifestPageBytes = SegmentHeader::kBytes;

std::size_t whole_pages(std::size_t bytes) {
  return (bytes + kManifestPageBytes - 1) / kManifestPageBytes * kManifestPageBytes;
}

std::size_t inline_bytes(std::size_t bytes) { return (bytes + 7) / 8 * 8; }

// Whether a blob has its bytes in the manifest, of which so many are taken.
bool stands_in_manifest(const StoreBlob& blob, std::size_t bytes) {
  return blob.bytes.empty() || bytes + inline_bytes(blob.bytes.size()) <= SpaceMap::kUnitBytes;
}

}  // namespace

// Whether the manifest can list what it has to; before anything of it is written.
Status Store::State::check_manifest(const StoreItem& item, std::span<const StoreBlob> blobs) const {
  std::size_t bytes =
      ManifestHeader::kBytes + (item.parts.size() + blobs.size()) * ManifestHeader::kPartBytes;
  std::size_t more_pieces = 0;
  std::uint64_t units = units_of(item);
  for (const StoreBlob& blob : blobs) {
    if (stands_in_manifest(blob, bytes)) {
      bytes += inline_bytes(blob.bytes.size());
    } else {
      const std::size_t whole = (blob.bytes.size() - 1) / SpaceMap::kChunkBytes;
      more_pieces += whole;
      units += whole * SpaceMap::kChunkUnits +
               SpaceMap::units_for(blob.bytes.size() - whole * SpaceMap::kChunkBytes);
    }
  }
  bytes += more_pieces * ManifestHeader::kPartBytes;
  if (bytes > SpaceMap::kChunkBytes) {
    return unsupported(fmt::format("item {}: a manifest of {} B, at most {}: it has too many blobs",
                                   item.key.short_text(), bytes, SpaceMap::kChunkBytes));
  }
  units += SpaceMap::units_for(bytes);
  if (units <= space->units()) return {};
  return no_space(fmt::format("{}: item {} wants {} B, the store has {} B", directory->name(),
                              item.key.short_text(), units * SpaceMap::kUnitBytes,
                              space->units() * SpaceMap::kUnitBytes));
}

std::uint64_t Store::blob_bytes_max(std::uint32_t extents, std::uint32_t blobs) {
  const std::uint64_t fixed =
      ManifestHeader::kBytes + SpaceMap::kUnitBytes +
      (std::uint64_t{extents} + std::uint64_t{2} * blobs) * ManifestHeader::kPartBytes;
  if (fixed >= SpaceMap::kChunkBytes) return 0;
  return (SpaceMap::kChunkBytes - fixed) / ManifestHeader::kPartBytes * SpaceMap::kChunkBytes;
}

// Decides which blobs stand in the manifest, and takes places for the pieces of the others and
// writes them.
Status Store::State::place_blobs(StoreItem& item, std::span<const StoreBlob> blobs) {
  std::size_t bytes =
      ManifestHeader::kBytes + (item.parts.size() + blobs.size()) * ManifestHeader::kPartBytes;
  for (const StoreBlob& blob : blobs) {
    if (stands_in_manifest(blob, bytes)) {
      bytes += inline_bytes(blob.bytes.size());
      ManifestPart part{.kind = ManifestPart::Kind::kInlineBlob, .first = blob.tag};
      part.third = static_cast<std::uint32_t>(blob.bytes.size());
      part.digest = checksum(blob.bytes);
      item.parts.push_back(part);
      continue;
    }
    const std::size_t first_part = item.parts.size();
    std::span<const std::byte> rest = blob.bytes;
    for (std::uint32_t piece = 0; !rest.empty(); ++piece) {
      const std::size_t length = std::min(rest.size(), SpaceMap::kChunkBytes);
      const std::uint32_t units = SpaceMap::units_for(length);
      std::uint32_t unit = 0;
      KVTIER_RETURN_IF_ERROR(take_place(units, unit));
      item.parts.push_back({.kind = ManifestPart::Kind::kBlobPiece,
                            .units = static_cast<std::uint8_t>(units),
                            .first = blob.tag,
                            .second = piece,
                            .third = static_cast<std::uint32_t>(length),
                            .unit = unit,
                            .digest = checksum(rest.first(length))});
      rest = rest.subspan(length);
    }
    KVTIER_RETURN_IF_ERROR(write_pieces(std::span(item.parts).subspan(first_part), blob.bytes));
  }
  return {};
}

// Writes the pieces of one blob, as many at a time as there is staging memory.
Status Store::State::write_pieces(std::span<const ManifestPart> pieces,
                                  std::span<const std::byte> bytes) {
  Status failure;
  while (!pieces.empty() && failure.ok()) {
    const std::size_t count = std::min(pieces.size(), kStagedPlaces);
    operations.clear();
    for (std::size_t i = 0; i < count; ++i) {
      const std::size_t length = pieces[i].third;
      const std::span<std::byte> copy = staged(i).first(whole_pages(length));
      std::copy_n(bytes.begin(), length, copy.begin());
      std::fill(copy.begin() + static_cast<std::ptrdiff_t>(length), copy.end(), std::byte{0});
      operations.push_back(operation(FileOperation::Kind::kWrite, pieces[i].unit, copy, i));
      if (options.cipher != nullptr) encrypt(operations.back(), copy);
      dirty[operations.back().file] = true;
      stats.written_bytes += copy.size();
      bytes = bytes.subspan(length);
    }
    io->run(operations, [&](StoreOperation& done) {
      if (done.io.status.ok()) return;
      ++stats.write_failures;
      if (failure.ok()) failure = done.io.status;
    });
    pieces = pieces.subspan(count);
  }
  return failure;
}

// The item's parts are complete and sorted; the manifest gets a place and is written there.
Status Store::State::write_manifest(StoreItem& item, std::span<const StoreBlob> blobs) {
  std::size_t bytes = ManifestHeader::kBytes + item.parts.size() * ManifestHeader::kPartBytes;
  const std::span<std::byte> memory = staged(0);
  std::fill(memory.begin(), memory.end(), std::byte{0});
  for (ManifestPart& part : item.parts) {
    if (part.kind != ManifestPart::Kind::kInlineBlob) continue;
    const auto blob = std::find_if(blobs.begin(), blobs.end(),
                                   [&](const StoreBlob& b) { return b.tag == part.first; });
    part.unit = static_cast<std::uint32_t>(bytes);
    std::copy(blob->bytes.begin(), blob->bytes.end(),
              memory.begin() + static_cast<std::ptrdiff_t>(bytes));
    bytes += inline_bytes(blob->bytes.size());
  }
  KVTIER_RETURN_IF_ERROR(take_place(SpaceMap::units_for(bytes), item.unit));
  item.units = SpaceMap::units_for(bytes);
  item.number = next_number++;
  item.manifest_bytes = static_cast<std::uint32_t>(bytes);
  const ManifestHeader header = {.store = id,
                                 .number = item.number,
                                 .layout_fingerprint = item.layout_fingerprint,
                                 .key = item.key,
                                 .parent = item.parent,
                                 .extent_bytes = item.extent_bytes,
                                 .parts = static_cast<std::uint32_t>(item.parts.size()),
                                 .bytes = item.manifest_bytes};
  encode_manifest(header, item.parts, memory.first(bytes));
  item.manifest = manifest_checksum(memory.first(bytes));
  return write_place(item.unit, memory.first(whole_pages(bytes)));
}

}  // namespace kvtier
