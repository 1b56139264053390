#include "transfer/extent_format.h"

#include "kernels/checksum.h"
#include "transfer/little_endian.h"

#include <algorithm>
#include <array>

namespace kvtier {
namespace {

// Byte offsets of the table in transfer/README.md; a change here is a new version.
constexpr std::array<unsigned char, 8> kMagic = {'K', 'V', 'T', 'X', 'T', 'N', 'T', '\n'};
constexpr std::uint32_t kVersion = 1;
constexpr std::size_t kVersionAt = 8;
constexpr std::size_t kBlockCountAt = 12;
constexpr std::size_t kFingerprintAt = 16;
constexpr std::size_t kLayerAt = 24;
constexpr std::size_t kHeadGroupAt = 28;
constexpr std::size_t kExtentBytesAt = 32;
constexpr std::size_t kBlockBytesAt = 40;
constexpr std::size_t kPayloadBytesAt = 44;
constexpr std::size_t kChecksumAt = 56;

constexpr std::size_t kOriginHighAt = 0;
constexpr std::size_t kOriginLowAt = 8;
constexpr std::size_t kIndexAt = 16;
constexpr std::size_t kGenerationAt = 20;
constexpr std::size_t kLengthAt = 24;
constexpr std::size_t kEntryChecksumAt = 32;

// Digest of the two digests before and after the checksum field: nothing has to be zeroed for it,
// so that verifying never writes to a frame that others read.
std::uint64_t header_checksum(std::span<const std::byte> header) {
  std::array<std::byte, 16> digests;
  store_little_endian(digests.data(), checksum(header.first(kChecksumAt)));
  store_little_endian(digests.data() + 8,
                      checksum(header.subspan(BlockLayout::kExtentHeaderFixedBytes)));
  return checksum(digests);
}

// Bytes of the header of an extent with this many places.
std::size_t header_bytes_for(std::uint32_t places) {
  const std::size_t fields = BlockLayout::kExtentHeaderFixedBytes +
                             std::size_t{places} * BlockLayout::kExtentHeaderEntryBytes;
  return (fields + BlockLayout::kPageBytes - 1) / BlockLayout::kPageBytes * BlockLayout::kPageBytes;
}

Status mismatch(const char* field, std::uint64_t found, std::uint64_t expected) {
  return corrupt(fmt::format("extent header: {} is {:#x}, expected {:#x}", field, found, expected));
}

// Whether the block of a sound header's entry is what it must be.
StatusCode check_block(std::span<const std::byte> extent, const ExtentFacts& facts,
                       std::uint32_t place) {
  const std::byte* const entry = extent.data() + BlockLayout::kExtentHeaderFixedBytes +
                                 place * BlockLayout::kExtentHeaderEntryBytes;
  const auto length = load_little_endian<std::uint32_t>(entry + kLengthAt);
  if (length == 0) return StatusCode::kNotFound;
  const BlockIdentity identity = {
      .origin = {.high = load_little_endian<std::uint64_t>(entry + kOriginHighAt),
                 .low = load_little_endian<std::uint64_t>(entry + kOriginLowAt)},
      .layer = facts.layer,
      .head_group = facts.head_group,
      .index = BlockIndex{load_little_endian<std::uint32_t>(entry + kIndexAt)}};
  const Generation generation{load_little_endian<std::uint32_t>(entry + kGenerationAt)};
  const std::size_t block_bytes = load_little_endian<std::uint32_t>(extent.data() + kBlockBytesAt);
  const std::uint64_t found =
      block_checksum(extent.subspan(header_bytes_for(facts.places) + place * block_bytes, length),
                     identity, generation);
  const auto expected = load_little_endian<std::uint64_t>(entry + kEntryChecksumAt);
  return found == expected ? StatusCode::kOk : StatusCode::kCorrupt;
}

}  // namespace

ExtentHeader::ExtentHeader(std::span<std::byte> bytes, const BlockLayout& layout)
    : bytes_(bytes), layout_(&layout) {
  KVTIER_CHECK(bytes.size() == layout.extent_header_bytes(), "{} B for a header of {} B",
               bytes.size(), layout.extent_header_bytes());
}

std::byte* ExtentHeader::entry_at(std::uint32_t place) const {
  KVTIER_CHECK(place < layout_->blocks_per_extent(), "place {} of {}", place,
               layout_->blocks_per_extent());
  return bytes_.data() + BlockLayout::kExtentHeaderFixedBytes +
         place * BlockLayout::kExtentHeaderEntryBytes;
}

void ExtentHeader::format(LayerIndex layer, HeadGroup head_group) {
  std::fill(bytes_.begin(), bytes_.end(), std::byte{0});
  for (std::size_t i = 0; i < kMagic.size(); ++i) bytes_[i] = std::byte{kMagic[i]};
  std::byte* const at = bytes_.data();
  store_little_endian(at + kVersionAt, kVersion);
  store_little_endian(at + kBlockCountAt, layout_->blocks_per_extent());
  store_little_endian(at + kFingerprintAt, layout_->fingerprint());
  store_little_endian(at + kLayerAt, layer.value);
  store_little_endian(at + kHeadGroupAt, head_group.value);
  store_little_endian(at + kExtentBytesAt, std::uint64_t{layout_->extent_bytes()});
  store_little_endian(at + kBlockBytesAt, static_cast<std::uint32_t>(layout_->block_bytes()));
  store_little_endian(at + kPayloadBytesAt, static_cast<std::uint32_t>(layout_->payload_bytes()));
}

void ExtentHeader::set_entry(std::uint32_t place, const ExtentEntry& entry) {
  const LayerIndex layer{load_little_endian<std::uint32_t>(bytes_.data() + kLayerAt)};
  const HeadGroup head_group{load_little_endian<std::uint32_t>(bytes_.data() + kHeadGroupAt)};
  KVTIER_CHECK(entry.identity.layer == layer && entry.identity.head_group == head_group,
               "a block of layer {} group {} in an extent of layer {} group {}",
               entry.identity.layer.value, entry.identity.head_group.value, layer.value,
               head_group.value);
  KVTIER_CHECK(entry.length_bytes > 0 && entry.length_bytes <= layout_->payload_bytes(),
               "length {} of a block of {} B", entry.length_bytes, layout_->payload_bytes());
  std::byte* const at = entry_at(place);
  std::fill_n(at, BlockLayout::kExtentHeaderEntryBytes, std::byte{0});
  store_little_endian(at + kOriginHighAt, entry.identity.origin.high);
  store_little_endian(at + kOriginLowAt, entry.identity.origin.low);
  store_little_endian(at + kIndexAt, entry.identity.index.value);
  store_little_endian(at + kGenerationAt, entry.generation.value);
  store_little_endian(at + kLengthAt, entry.length_bytes);
  store_little_endian(at + kEntryChecksumAt, entry.checksum);
}

void ExtentHeader::clear_entry(std::uint32_t place) {
  std::fill_n(entry_at(place), BlockLayout::kExtentHeaderEntryBytes, std::byte{0});
}

ExtentEntry ExtentHeader::entry(std::uint32_t place) const {
  const std::byte* const at = entry_at(place);
  ExtentEntry entry;
  entry.length_bytes = load_little_endian<std::uint32_t>(at + kLengthAt);
  if (entry.length_bytes == 0) return entry;
  entry.identity.origin = {.high = load_little_endian<std::uint64_t>(at + kOriginHighAt),
                           .low = load_little_endian<std::uint64_t>(at + kOriginLowAt)};
  entry.identity.layer = LayerIndex{load_little_endian<std::uint32_t>(bytes_.data() + kLayerAt)};
  entry.identity.head_group =
      HeadGroup{load_little_endian<std::uint32_t>(bytes_.data() + kHeadGroupAt)};
  entry.identity.index = BlockIndex{load_little_endian<std::uint32_t>(at + kIndexAt)};
  entry.generation = Generation{load_little_endian<std::uint32_t>(at + kGenerationAt)};
  entry.checksum = load_little_endian<std::uint64_t>(at + kEntryChecksumAt);
  return entry;
}

void ExtentHeader::seal() {
  store_little_endian(bytes_.data() + kChecksumAt, header_checksum(bytes_));
}

Status ExtentHeader::verify(LayerIndex layer, HeadGroup head_group) const {
  const std::byte* const at = bytes_.data();
  std::array<std::byte, kMagic.size()> magic;
  for (std::size_t i = 0; i < kMagic.size(); ++i) magic[i] = std::byte{kMagic[i]};
  const auto expected_magic = load_little_endian<std::uint64_t>(magic.data());
  if (const auto found = load_little_endian<std::uint64_t>(at); found != expected_magic) {
    return mismatch("magic", found, expected_magic);
  }
  if (const auto found = load_little_endian<std::uint32_t>(at + kVersionAt); found != kVersion) {
    return mismatch("version", found, kVersion);
  }
  if (const auto found = load_little_endian<std::uint64_t>(at + kFingerprintAt);
      found != layout_->fingerprint()) {
    return mismatch("layout fingerprint", found, layout_->fingerprint());
  }
  if (const auto found = load_little_endian<std::uint32_t>(at + kBlockCountAt);
      found != layout_->blocks_per_extent()) {
    return mismatch("block count", found, layout_->blocks_per_extent());
  }
  const std::uint64_t expected = header_checksum(bytes_);
  if (const auto found = load_little_endian<std::uint64_t>(at + kChecksumAt); found != expected) {
    return mismatch("checksum", found, expected);
  }
  if (const auto found = load_little_endian<std::uint32_t>(at + kLayerAt); found != layer.value) {
    return mismatch("layer", found, layer.value);
  }
  if (const auto found = load_little_endian<std::uint32_t>(at + kHeadGroupAt);
      found != head_group.value) {
    return mismatch("head group", found, head_group.value);
  }
  return {};
}

bool looks_like_extent(std::span<const std::byte> page) {
  if (page.size() < kMagic.size()) return false;
  for (std::size_t i = 0; i < kMagic.size(); ++i) {
    if (page[i] != std::byte{kMagic[i]}) return false;
  }
  return true;
}

std::size_t extent_header_bytes(std::span<const std::byte> page) {
  if (page.size() < BlockLayout::kPageBytes || !looks_like_extent(page)) return 0;
  return header_bytes_for(load_little_endian<std::uint32_t>(page.data() + kBlockCountAt));
}

Status check_extent_header(std::span<const std::byte> extent, ExtentFacts& facts) {
  facts = {};
  if (extent.size() < BlockLayout::kPageBytes || !looks_like_extent(extent)) {
    return corrupt("extent header: the magic is not there");
  }
  const std::byte* const at = extent.data();
  if (const auto found = load_little_endian<std::uint32_t>(at + kVersionAt); found != kVersion) {
    return mismatch("version", found, kVersion);
  }
  const auto places = load_little_endian<std::uint32_t>(at + kBlockCountAt);
  const std::size_t header_bytes = header_bytes_for(places);
  if (header_bytes > extent.size()) return mismatch("block count", places, 0);
  const std::span<const std::byte> header = extent.first(header_bytes);
  const std::uint64_t expected = header_checksum(header);
  if (const auto found = load_little_endian<std::uint64_t>(at + kChecksumAt); found != expected) {
    return mismatch("checksum", found, expected);
  }
  facts.places = places;
  facts.fingerprint = load_little_endian<std::uint64_t>(at + kFingerprintAt);
  facts.layer = LayerIndex{load_little_endian<std::uint32_t>(at + kLayerAt)};
  facts.head_group = HeadGroup{load_little_endian<std::uint32_t>(at + kHeadGroupAt)};
  facts.extent_bytes = load_little_endian<std::uint64_t>(at + kExtentBytesAt);
  facts.header_digest = checksum(header);
  const std::uint64_t block_bytes = load_little_endian<std::uint32_t>(at + kBlockBytesAt);
  if (block_bytes * places + header_bytes > facts.extent_bytes) {
    return mismatch("extent bytes", facts.extent_bytes, block_bytes * places + header_bytes);
  }
  for (std::uint32_t place = 0; place < places; ++place) {
    const std::byte* const entry =
        at + BlockLayout::kExtentHeaderFixedBytes + place * BlockLayout::kExtentHeaderEntryBytes;
    const auto length = load_little_endian<std::uint32_t>(entry + kLengthAt);
    if (length > block_bytes) return mismatch("length of a block", length, block_bytes);
    facts.blocks += length > 0;
  }
  return {};
}

Status check_extent(std::span<const std::byte> extent, std::span<StatusCode> verdicts,
                    ExtentFacts& facts) {
  Status status = check_extent_header(extent, facts);
  if (status.ok() && facts.extent_bytes != extent.size()) {
    status = mismatch("extent bytes", facts.extent_bytes, extent.size());
  }
  if (!status.ok()) {
    std::fill(verdicts.begin(), verdicts.end(), StatusCode::kCorrupt);
    return status;
  }
  std::uint32_t first_corrupt = 0;
  for (std::uint32_t place = 0; place < facts.places; ++place) {
    const StatusCode verdict = check_block(extent, facts, place);
    if (place < verdicts.size()) verdicts[place] = verdict;
    if (verdict != StatusCode::kCorrupt) continue;
    if (facts.blocks_corrupt == 0) first_corrupt = place;
    ++facts.blocks_corrupt;
  }
  if (facts.blocks_corrupt == 0) return {};
  return corrupt(
      fmt::format("layer {} head group {}: {} of {} blocks are not as they were written, "
                  "the first in place {}",
                  facts.layer.value, facts.head_group.value, facts.blocks_corrupt, facts.blocks,
                  first_corrupt));
}

}  // namespace kvtier
