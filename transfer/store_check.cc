#include "transfer/store_check.h"

#include "memory/region.h"
#include "transfer/disk_directory.h"
#include "transfer/extent_format.h"
#include "transfer/space_map.h"

#include <algorithm>
#include <filesystem>
#include <optional>

namespace kvtier {
namespace {

constexpr std::size_t kReadsPerBatch = 16;
constexpr std::size_t kCorruptNamed = 16;

// Reads and verifies one item; one line about what is wrong with it, or none.
std::string check_item(Store& store, const StoreKey& key, std::span<std::byte> memory,
                       StoreCheckReport& report) {
  Result<StoredItem> item = store.find(key);
  if (!item.ok()) return item.status().to_string();
  std::vector<StoreExtentKey> keys(item->extents());
  item->list_extents(keys);
  std::string wrong;
  if (const Status status = store.verify_manifest(*item); !status.ok()) wrong = status.to_string();
  for (std::size_t first = 0; first < keys.size(); first += kReadsPerBatch) {
    const std::size_t count = std::min(kReadsPerBatch, keys.size() - first);
    std::vector<StoreExtentRead> reads(count);
    for (std::size_t i = 0; i < count; ++i) {
      reads[i].item = &*item;
      reads[i].key = keys[first + i];
      reads[i].target = memory.subspan(i * SpaceMap::kChunkBytes, item->extent_bytes());
    }
    store.read(reads);
    for (const StoreExtentRead& read : reads) {
      ++report.extents;
      report.bytes += read.target.size();
      if (!read.status.ok() && wrong.empty()) wrong = read.status.to_string();
    }
  }
  for (const std::uint32_t tag : item->blob_tags()) {
    std::vector<std::byte> bytes(*item->blob_bytes(tag));
    ++report.blobs;
    report.bytes += bytes.size();
    const Status status = store.read_blob(*item, tag, bytes);
    if (!status.ok() && wrong.empty()) wrong = status.to_string();
  }
  return wrong.empty() ? "" : fmt::format("item {}: {}", key.short_text(), wrong);
}

}  // namespace

Result<StoreCheckReport> check_store(Store& store, bool repair) {
  KVTIER_ASSIGN_OR_RETURN(
      const Region memory,
      Region::allocate({.bytes = kReadsPerBatch * SpaceMap::kChunkBytes, .huge_pages = false}));
  StoreCheckReport report;
  report.notice = store.notice();
  std::vector<StoreKey> keys;
  store.for_each([&](const StoreKey& key) { keys.push_back(key); });
  std::sort(keys.begin(), keys.end());
  for (const StoreKey& key : keys) {
    ++report.items;
    std::string wrong = check_item(store, key, memory.bytes(), report);
    if (wrong.empty()) continue;
    report.unsound.push_back(std::move(wrong));
    if (!repair) continue;
    KVTIER_RETURN_IF_ERROR(store.erase(key));
    ++report.repaired;
  }
  report.stats = store.stats();
  report.blocks = report.stats.blocks_verified;
  return report;
}

namespace {

// What begins at one unit; `memory` has room for a place, and its first page has been read.
Status look_at_unit(File& file, PageCipher* cipher, std::uint64_t offset,
                    std::span<std::byte> memory, SegmentReport& report) {
  const auto read = [&](std::size_t bytes) -> Status {
    FileOperation operation = {
        .kind = FileOperation::Kind::kRead, .offset = offset, .buffer = memory.first(bytes)};
    FileOperation* pointer = &operation;
    KVTIER_CHECK(file.submit({&pointer, 1}) == 1, "a file that is not in use refused a read");
    FileOperation* done = nullptr;
    while (file.reap({&done, 1}, std::chrono::seconds(1)) == 0) {
    }
    KVTIER_RETURN_IF_ERROR(operation.status);
    if (operation.transferred < bytes) return io_error(fmt::format("the file ends at {}", offset));
    if (cipher != nullptr) {
      cipher->decrypt(report.header.segment, offset / PageCipher::kPageBytes, operation.buffer,
                      memory.data());
    }
    return {};
  };
  const std::span<std::byte> page = memory.first(SegmentHeader::kBytes);
  KVTIER_RETURN_IF_ERROR(read(page.size()));
  if (std::all_of(page.begin(), page.end(), [](std::byte b) { return b == std::byte{0}; })) {
    ++report.empty_units;
    return {};
  }
  if (looks_like_manifest(page, report.header.store)) {
    const Result<ManifestHeader> header = decode_manifest_header(page);
    std::vector<ManifestPart> parts;
    const std::size_t bytes = header.ok() ? header->bytes : page.size();
    const std::size_t pages = (bytes + page.size() - 1) / page.size() * page.size();
    KVTIER_RETURN_IF_ERROR(read(pages));
    const bool sound = header.ok() && decode_manifest(memory.first(bytes), parts).ok();
    ++(sound ? report.manifests : report.other_units);
    return {};
  }
  if (!looks_like_extent(page)) {
    ++report.other_units;
    return {};
  }
  // The header says how long the extent is; it may reach into what another wrote since.
  ExtentFacts facts;
  const std::uint64_t left = report.file_bytes - offset;
  const std::size_t most = static_cast<std::size_t>(std::min<std::uint64_t>(left, memory.size()));
  KVTIER_RETURN_IF_ERROR(read(most));
  if (!check_extent_header(memory.first(most), facts).ok() || facts.extent_bytes > most) {
    ++report.other_units;
    return {};
  }
  const Status status = check_extent(memory.first(facts.extent_bytes), {}, facts);
  ++report.extents;
  report.blocks += facts.blocks;
  report.blocks_corrupt += facts.blocks_corrupt;
  if (!status.ok() && report.corrupt.size() < kCorruptNamed) {
    report.corrupt.push_back(fmt::format("at byte {}: {}", offset, status.message()));
  }
  return {};
}

Result<SegmentReport> look_through(File& file, const std::string& name, PageCipher* cipher) {
  KVTIER_ASSIGN_OR_RETURN(const Region memory,
                          Region::allocate({.bytes = SpaceMap::kChunkBytes, .huge_pages = false}));
  SegmentReport report;
  report.backend = file.traits().backend;
  report.file_bytes = file.size_bytes();
  const std::span<std::byte> page = memory.bytes().first(SegmentHeader::kBytes);
  FileOperation operation = {.kind = FileOperation::Kind::kRead, .offset = 0, .buffer = page};
  FileOperation* pointer = &operation;
  KVTIER_CHECK(file.submit({&pointer, 1}) == 1, "a file that is not in use refused a read");
  FileOperation* done = nullptr;
  while (file.reap({&done, 1}, std::chrono::seconds(1)) == 0) {
  }
  KVTIER_RETURN_IF_ERROR(operation.status);
  if (operation.transferred < page.size()) {
    return corrupt(
        fmt::format("{}: {} B, a segment's header has {}", name, report.file_bytes, page.size()));
  }
  const Result<SegmentHeader> header = decode_segment_header(page);
  if (!header.ok()) {
    return Status(header.status().code(), fmt::format("{}: {}", name, header.status().message()));
  }
  report.header = *header;
  const KeyId own = cipher == nullptr ? KeyId{} : cipher->id();
  if (report.header.key != own) {
    return unsupported(
        fmt::format("{}: encrypted with another key than this one, or none was given", name));
  }
  for (std::uint64_t offset = SegmentHeader::kDataOffset;
       offset + SpaceMap::kUnitBytes <= report.file_bytes; offset += SpaceMap::kUnitBytes) {
    KVTIER_RETURN_IF_ERROR(look_at_unit(file, cipher, offset, memory.bytes(), report));
  }
  return report;
}

}  // namespace

Result<SegmentReport> inspect_segment(const std::string& path, PageCipher* cipher) {
  const std::filesystem::path whole(path);
  const std::string folder = whole.has_parent_path() ? whole.parent_path().string() : ".";
  KVTIER_ASSIGN_OR_RETURN(std::unique_ptr<StoreDirectory> directory,
                          open_disk_directory(folder, {.create = false, .read_only = true}));
  KVTIER_ASSIGN_OR_RETURN(std::unique_ptr<File> file, directory->open(whole.filename().string()));
  Result<SegmentReport> report = look_through(*file, path, cipher);
  KVTIER_RETURN_IF_ERROR(file->close());
  return report;
}

}  // namespace kvtier
