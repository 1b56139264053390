#include "transfer/store_format.h"

#include "kernels/checksum.h"
#include "transfer/little_endian.h"
#include "transfer/space_map.h"

#include <algorithm>
#include <bit>
#include <iterator>

namespace kvtier {
namespace {

// Byte offsets of the tables in transfer/README.md; a change here is a new version.
constexpr std::uint32_t kStoreFormatVersion = 1;
// An index of version 1 is one of version 2 without details.
constexpr std::uint32_t kIndexVersion = 2;
constexpr std::uint32_t kIndexVersionMin = 1;
constexpr char kSegmentMagic[] = "KVTSEGM\n";
constexpr char kManifestMagic[] = "KVTMANI\n";
constexpr char kIndexMagic[] = "KVTINDX\n";
constexpr char kRecordMagic[] = "KVIR";
constexpr std::size_t kPageChecksumAt = 4088;
constexpr std::size_t kManifestChecksumAt = 128;
constexpr std::size_t kRecordPartsAt = 24;
constexpr std::size_t kRecordChecksumAt = 120;

// A page with magic, version and a checksum in its last eight bytes: segment and index headers.
class PageWriter {
 public:
  PageWriter(std::span<std::byte> bytes, const char* magic,
             std::uint32_t version = kStoreFormatVersion)
      : bytes_(bytes) {
    std::fill(bytes.begin(), bytes.end(), std::byte{0});
    std::memcpy(bytes.data(), magic, 8);
    put(8, version);
  }
  template <typename Number>
  void put(std::size_t at, Number number) {
    store_little_endian(bytes_.data() + at, number);
  }
  template <std::size_t kSize>
  void put_bytes(std::size_t at, const std::array<std::byte, kSize>& bytes) {
    std::copy(bytes.begin(), bytes.end(), bytes_.begin() + static_cast<std::ptrdiff_t>(at));
  }

 private:
  std::span<std::byte> bytes_;
};

template <typename Number>
Number get(std::span<const std::byte> bytes, std::size_t at) {
  return load_little_endian<Number>(bytes.data() + at);
}

template <std::size_t kSize>
std::array<std::byte, kSize> get_bytes(std::span<const std::byte> bytes, std::size_t at) {
  std::array<std::byte, kSize> found;
  std::copy_n(bytes.begin() + static_cast<std::ptrdiff_t>(at), kSize, found.begin());
  return found;
}

bool has_magic(std::span<const std::byte> bytes, const char* magic) {
  return bytes.size() >= 8 && std::memcmp(bytes.data(), magic, 8) == 0;
}

Status format_mismatch(const char* what, const char* field, std::uint64_t found,
                       std::uint64_t expected) {
  return corrupt(fmt::format("{}: {} is {:#x}, expected {:#x}", what, field, found, expected));
}

// What both kinds of header page share.
Status check_page(std::span<const std::byte> page, const char* what, const char* magic,
                  std::uint32_t version_min, std::uint32_t version_max) {
  KVTIER_CHECK(page.size() == 4096, "{} of {} B", what, page.size());
  if (!has_magic(page, magic)) return corrupt(fmt::format("{}: the magic is not there", what));
  if (const auto found = get<std::uint32_t>(page, 8); found < version_min || found > version_max) {
    return unsupported(
        fmt::format("{}: version {}, this program knows version {}", what, found, version_max));
  }
  const std::uint64_t expected = checksum(page.first(kPageChecksumAt));
  if (const auto found = get<std::uint64_t>(page, kPageChecksumAt); found != expected) {
    return format_mismatch(what, "checksum", found, expected);
  }
  return {};
}

void seal_page(std::span<std::byte> page) {
  store_little_endian(page.data() + kPageChecksumAt, checksum(page.first(kPageChecksumAt)));
}

bool is_one_of_units(std::uint8_t units) { return units == 1 || units == 2 || units == 4; }

// A part that makes sense within a manifest of these sizes.
bool is_plausible(const ManifestPart& part, std::uint32_t extent_bytes,
                  std::uint32_t manifest_bytes) {
  switch (part.kind) {
    case ManifestPart::Kind::kExtent:
      return part.units == SpaceMap::units_for(extent_bytes) && part.units > 0;
    case ManifestPart::Kind::kBlobPiece:
      return is_one_of_units(part.units) && SpaceMap::units_for(part.third) == part.units;
    case ManifestPart::Kind::kInlineBlob:
      return part.units == 0 && part.unit <= manifest_bytes &&
             part.third <= manifest_bytes - part.unit;
  }
  return false;
}

void put_part(const ManifestPart& part, std::byte* at) {
  std::fill_n(at, ManifestHeader::kPartBytes, std::byte{0});
  store_little_endian(at, static_cast<std::uint8_t>(part.kind));
  store_little_endian(at + 1, part.units);
  store_little_endian(at + 4, part.first);
  store_little_endian(at + 8, part.second);
  store_little_endian(at + 12, part.third);
  store_little_endian(at + 16, part.unit);
  store_little_endian(at + 24, part.digest);
}

ManifestPart get_part(std::span<const std::byte> bytes, std::size_t at) {
  ManifestPart part;
  part.kind = static_cast<ManifestPart::Kind>(get<std::uint8_t>(bytes, at));
  part.units = get<std::uint8_t>(bytes, at + 1);
  part.first = get<std::uint32_t>(bytes, at + 4);
  part.second = get<std::uint32_t>(bytes, at + 8);
  part.third = get<std::uint32_t>(bytes, at + 12);
  part.unit = get<std::uint32_t>(bytes, at + 16);
  part.digest = get<std::uint64_t>(bytes, at + 24);
  return part;
}

// What every record has; `bytes` is cleared first.
void start_record(IndexRecord::Kind kind, std::uint64_t epoch, std::uint64_t position,
                  std::span<std::byte> bytes) {
  KVTIER_CHECK(bytes.size() == IndexRecord::kBytes, "a record of {} B", bytes.size());
  std::fill(bytes.begin(), bytes.end(), std::byte{0});
  std::memcpy(bytes.data(), kRecordMagic, 4);
  store_little_endian(bytes.data() + 4, static_cast<std::uint32_t>(kind));
  store_little_endian(bytes.data() + 8, epoch);
  store_little_endian(bytes.data() + 16, position);
}

void seal_record(std::span<std::byte> bytes) {
  store_little_endian(bytes.data() + kRecordChecksumAt, checksum(bytes.first(kRecordChecksumAt)));
}

}  // namespace

std::string StoreKey::short_text() const {
  std::string text;
  for (std::size_t i = 0; i < 8; ++i) {
    text += fmt::format("{:02x}", std::to_integer<int>(bytes[i]));
  }
  return text;
}

void encode(const SegmentHeader& header, std::span<std::byte> page) {
  PageWriter writer(page, kSegmentMagic);
  writer.put(12, header.segment);
  writer.put_bytes(16, header.store);
  writer.put(32, header.layout_fingerprint);
  writer.put(40, header.segment_bytes);
  writer.put(48, header.segments);
  writer.put(52, static_cast<std::uint32_t>(SpaceMap::kUnitBytes));
  writer.put(56, static_cast<std::uint32_t>(header.codec));
  writer.put(60, static_cast<std::uint32_t>(header.cipher));
  writer.put_bytes(64, header.key);
  seal_page(page);
}

Result<SegmentHeader> decode_segment_header(std::span<const std::byte> page) {
  constexpr const char* kWhat = "segment header";
  KVTIER_RETURN_IF_ERROR(
      check_page(page, kWhat, kSegmentMagic, kStoreFormatVersion, kStoreFormatVersion));
  SegmentHeader header;
  header.store = get_bytes<16>(page, 16);
  header.segment = get<std::uint32_t>(page, 12);
  header.segments = get<std::uint32_t>(page, 48);
  header.segment_bytes = get<std::uint64_t>(page, 40);
  header.layout_fingerprint = get<std::uint64_t>(page, 32);
  header.codec = static_cast<Codec>(get<std::uint32_t>(page, 56));
  header.cipher = static_cast<Cipher>(get<std::uint32_t>(page, 60));
  header.key = get_bytes<16>(page, 64);
  if (const auto found = get<std::uint32_t>(page, 52); found != SpaceMap::kUnitBytes) {
    return format_mismatch(kWhat, "unit bytes", found, SpaceMap::kUnitBytes);
  }
  if (header.codec != Codec::kNone) {
    return unsupported(fmt::format("{}: codec {}, this program knows 0", kWhat,
                                   static_cast<std::uint32_t>(header.codec)));
  }
  if (header.cipher != Cipher::kNone && header.cipher != Cipher::kAes256Xts) {
    return unsupported(fmt::format("{}: cipher {}, this program knows 0 and 1", kWhat,
                                   static_cast<std::uint32_t>(header.cipher)));
  }
  if (header.segment >= header.segments) {
    return format_mismatch(kWhat, "segment", header.segment, header.segments);
  }
  return header;
}

std::uint64_t manifest_checksum(std::span<const std::byte> manifest) {
  std::array<std::byte, 16> digests;
  store_little_endian(digests.data(), checksum(manifest.first(kManifestChecksumAt)));
  store_little_endian(digests.data() + 8, checksum(manifest.subspan(kManifestChecksumAt + 8)));
  return checksum(digests);
}

void encode_manifest(const ManifestHeader& header, std::span<const ManifestPart> parts,
                     std::span<std::byte> manifest) {
  KVTIER_CHECK(manifest.size() == header.bytes && parts.size() == header.parts &&
                   header.bytes >= ManifestHeader::kBytes + parts.size_bytes(),
               "a manifest of {} B with {} parts", manifest.size(), parts.size());
  static_assert(sizeof(ManifestPart) == ManifestHeader::kPartBytes);
  const std::size_t fields = ManifestHeader::kBytes + parts.size() * ManifestHeader::kPartBytes;
  PageWriter writer(manifest.first(fields), kManifestMagic);
  writer.put(12, header.parts);
  writer.put_bytes(16, header.store);
  writer.put(32, header.number);
  writer.put(40, header.layout_fingerprint);
  writer.put_bytes(48, header.key.bytes);
  writer.put_bytes(80, header.parent.bytes);
  writer.put(112, header.extent_bytes);
  writer.put(116, header.bytes);
  for (std::size_t i = 0; i < parts.size(); ++i) {
    put_part(parts[i], manifest.data() + ManifestHeader::kBytes + i * ManifestHeader::kPartBytes);
  }
  store_little_endian(manifest.data() + kManifestChecksumAt, manifest_checksum(manifest));
}

bool looks_like_manifest(std::span<const std::byte> page, const StoreId& store) {
  return page.size() >= ManifestHeader::kBytes && has_magic(page, kManifestMagic) &&
         get_bytes<16>(page, 16) == store;
}

Result<ManifestHeader> decode_manifest_header(std::span<const std::byte> page) {
  constexpr const char* kWhat = "manifest";
  if (page.size() < ManifestHeader::kBytes || !has_magic(page, kManifestMagic)) {
    return corrupt("manifest: the magic is not there");
  }
  if (const auto found = get<std::uint32_t>(page, 8); found != kStoreFormatVersion) {
    return unsupported(fmt::format("{}: version {}, this program knows version {}", kWhat, found,
                                   kStoreFormatVersion));
  }
  ManifestHeader header;
  header.parts = get<std::uint32_t>(page, 12);
  header.store = get_bytes<16>(page, 16);
  header.number = get<std::uint64_t>(page, 32);
  header.layout_fingerprint = get<std::uint64_t>(page, 40);
  header.key.bytes = get_bytes<32>(page, 48);
  header.parent.bytes = get_bytes<32>(page, 80);
  header.extent_bytes = get<std::uint32_t>(page, 112);
  header.bytes = get<std::uint32_t>(page, 116);
  const std::uint64_t needed =
      ManifestHeader::kBytes + std::uint64_t{header.parts} * ManifestHeader::kPartBytes;
  if (header.bytes < needed || header.bytes > SpaceMap::kChunkBytes) {
    return format_mismatch(kWhat, "bytes", header.bytes, needed);
  }
  return header;
}

Result<ManifestHeader> decode_manifest(std::span<const std::byte> manifest,
                                       std::vector<ManifestPart>& parts) {
  KVTIER_ASSIGN_OR_RETURN(const ManifestHeader header, decode_manifest_header(manifest));
  if (header.bytes > manifest.size()) {
    return format_mismatch("manifest", "bytes", header.bytes, manifest.size());
  }
  manifest = manifest.first(header.bytes);
  const std::uint64_t expected = manifest_checksum(manifest);
  if (const auto found = get<std::uint64_t>(manifest, kManifestChecksumAt); found != expected) {
    return format_mismatch("manifest", "checksum", found, expected);
  }
  parts.clear();
  for (std::uint32_t i = 0; i < header.parts; ++i) {
    const ManifestPart part =
        get_part(manifest, ManifestHeader::kBytes + i * ManifestHeader::kPartBytes);
    if (!is_plausible(part, header.extent_bytes, header.bytes)) {
      return corrupt(fmt::format("manifest: part {} of {} makes no sense", i, header.parts));
    }
    parts.push_back(part);
  }
  return header;
}

void encode(const IndexHeader& header, std::span<std::byte> page) {
  PageWriter writer(page, kIndexMagic, kIndexVersion);
  writer.put(12, static_cast<std::uint32_t>(header.level));
  writer.put_bytes(16, header.store);
  writer.put(32, header.epoch);
  writer.put(40, header.records);
  writer.put(48, std::uint32_t{header.clean});
  writer.put(52, header.segments);
  writer.put(56, header.segment_bytes);
  seal_page(page);
}

Result<IndexHeader> decode_index_header(std::span<const std::byte> page) {
  constexpr const char* kWhat = "index header";
  KVTIER_RETURN_IF_ERROR(check_page(page, kWhat, kIndexMagic, kIndexVersionMin, kIndexVersion));
  IndexHeader header;
  const auto level = get<std::uint32_t>(page, 12);
  if (level > static_cast<std::uint32_t>(Durability::kPower)) {
    return format_mismatch(kWhat, "durability", level, 3);
  }
  header.level = static_cast<Durability>(level);
  header.store = get_bytes<16>(page, 16);
  header.epoch = get<std::uint64_t>(page, 32);
  header.records = get<std::uint64_t>(page, 40);
  header.clean = get<std::uint32_t>(page, 48) == 1;
  header.segments = get<std::uint32_t>(page, 52);
  header.segment_bytes = get<std::uint64_t>(page, 56);
  return header;
}

void encode(const IndexRecord& record, std::uint64_t epoch, std::uint64_t position,
            std::span<std::byte> bytes) {
  start_record(record.kind, epoch, position, bytes);
  store_little_endian(bytes.data() + 24, record.number);
  std::copy(record.key.bytes.begin(), record.key.bytes.end(), bytes.begin() + 32);
  store_little_endian(bytes.data() + 64, record.unit);
  store_little_endian(bytes.data() + 68, record.units);
  store_little_endian(bytes.data() + 72, record.references);
  store_little_endian(bytes.data() + 80, record.manifest);
  store_little_endian(bytes.data() + 88, std::bit_cast<std::uint64_t>(record.value));
  seal_record(bytes);
}

void encode(const IndexDetail& detail, std::uint64_t epoch, std::uint64_t position,
            std::span<std::byte> bytes) {
  start_record(IndexRecord::Kind::kDetail, epoch, position, bytes);
  store_little_endian(bytes.data() + 24, detail.layout_fingerprint);
  std::copy(detail.parent.bytes.begin(), detail.parent.bytes.end(), bytes.begin() + 32);
  store_little_endian(bytes.data() + 64, detail.extent_bytes);
  store_little_endian(bytes.data() + 68, detail.manifest_bytes);
  store_little_endian(bytes.data() + 72, detail.parts);
  seal_record(bytes);
}

void encode(std::span<const ManifestPart> parts, std::uint64_t epoch, std::uint64_t position,
            std::span<std::byte> bytes) {
  KVTIER_CHECK(!parts.empty() && parts.size() <= IndexDetail::kPartsPerRecord, "{} parts",
               parts.size());
  start_record(IndexRecord::Kind::kParts, epoch, position, bytes);
  for (std::size_t i = 0; i < parts.size(); ++i) {
    put_part(parts[i], bytes.data() + kRecordPartsAt + i * ManifestHeader::kPartBytes);
  }
  seal_record(bytes);
}

IndexDetail decode_detail(std::span<const std::byte> bytes) {
  IndexDetail detail;
  detail.layout_fingerprint = get<std::uint64_t>(bytes, 24);
  detail.parent.bytes = get_bytes<32>(bytes, 32);
  detail.extent_bytes = get<std::uint32_t>(bytes, 64);
  detail.manifest_bytes = get<std::uint32_t>(bytes, 68);
  detail.parts = get<std::uint32_t>(bytes, 72);
  return detail;
}

bool decode_parts(std::span<const std::byte> bytes, const IndexDetail& detail, std::uint32_t count,
                  std::vector<ManifestPart>& parts) {
  KVTIER_CHECK(count <= IndexDetail::kPartsPerRecord, "{} parts", count);
  for (std::uint32_t i = 0; i < count; ++i) {
    parts.push_back(get_part(bytes, kRecordPartsAt + i * ManifestHeader::kPartBytes));
    if (!is_plausible(parts.back(), detail.extent_bytes, detail.manifest_bytes)) return false;
  }
  return true;
}

RecordState decode_record(std::span<const std::byte> bytes, std::uint64_t epoch,
                          std::uint64_t position, IndexRecord& record) {
  KVTIER_CHECK(bytes.size() == IndexRecord::kBytes, "a record of {} B", bytes.size());
  if (std::all_of(bytes.begin(), bytes.end(), [](std::byte b) { return b == std::byte{0}; })) {
    return RecordState::kAbsent;
  }
  if (std::memcmp(bytes.data(), kRecordMagic, 4) != 0 ||
      get<std::uint64_t>(bytes, kRecordChecksumAt) != checksum(bytes.first(kRecordChecksumAt))) {
    return RecordState::kDamaged;
  }
  const auto found_epoch = get<std::uint64_t>(bytes, 8);
  if (found_epoch < epoch) return RecordState::kAbsent;
  const auto kind = get<std::uint32_t>(bytes, 4);
  if (found_epoch > epoch || get<std::uint64_t>(bytes, 16) != position ||
      kind > static_cast<std::uint32_t>(IndexRecord::Kind::kParts)) {
    return RecordState::kDamaged;
  }
  record.kind = static_cast<IndexRecord::Kind>(kind);
  if (record.kind == IndexRecord::Kind::kEnd) return RecordState::kEnd;
  if (record.kind >= IndexRecord::Kind::kDetail) return RecordState::kValid;
  record.number = get<std::uint64_t>(bytes, 24);
  record.key.bytes = get_bytes<32>(bytes, 32);
  record.unit = get<std::uint32_t>(bytes, 64);
  record.units = get<std::uint32_t>(bytes, 68);
  record.references = get<std::uint32_t>(bytes, 72);
  record.manifest = get<std::uint64_t>(bytes, 80);
  record.value = std::bit_cast<double>(get<std::uint64_t>(bytes, 88));
  return RecordState::kValid;
}

}  // namespace kvtier
