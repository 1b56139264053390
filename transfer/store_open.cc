// Opening: files are made or found, the geometry is read, the index or the segments are loaded.

#include "transfer/disk_directory.h"
#include "transfer/file_error.h"
#include "transfer/store.h"
#include "transfer/store_state.h"

#include <sys/random.h>

#include <algorithm>
#include <array>
#include <cerrno>

namespace kvtier {
namespace {

constexpr std::uint64_t kLockFileBytes = 4096;
constexpr std::uint32_t kSegmentsMax = 4096;
constexpr std::uint32_t kSegmentsByDefault = 8;
constexpr std::uint64_t kSegmentBytesMax = std::uint64_t{4} << 40;
// Smaller stores than this many chunks per segment get fewer segments.
constexpr std::uint64_t kChunksPerSegmentMin = 256;
constexpr std::uint64_t kRecordsMin = 1024;
constexpr std::uint64_t kBytesPerRecord = 128 * 1024;

std::uint64_t index_bytes_for(std::uint64_t data_bytes) {
  return IndexLog::file_bytes(std::max(kRecordsMin, data_bytes / kBytesPerRecord));
}

// The largest segment file of whole chunks that is not larger than `bytes`; 0 when none is.
std::uint64_t whole_segment(std::uint64_t bytes) {
  if (bytes < SegmentHeader::kDataOffset + SpaceMap::kChunkBytes) return 0;
  return (bytes - SegmentHeader::kDataOffset) / SpaceMap::kChunkBytes * SpaceMap::kChunkBytes +
         SegmentHeader::kDataOffset;
}

std::string hex_of(std::span<const std::byte> bytes) {
  std::string text;
  for (const std::byte byte : bytes) text += fmt::format("{:02x}", std::to_integer<int>(byte));
  return text;
}

Result<StoreId> random_id() {
  StoreId id;
  if (::getrandom(id.data(), id.size(), 0) == static_cast<ssize_t>(id.size())) return id;
  return io_error(fmt::format("no random numbers: {}", error_text(errno)));
}

}  // namespace

Result<StoreGeometry> StoreGeometry::of_capacity(std::uint64_t capacity_bytes,
                                                 std::uint64_t segment_bytes) {
  StoreGeometry geometry;
  const std::uint64_t overhead = kLockFileBytes + index_bytes_for(capacity_bytes);
  const std::uint64_t data = capacity_bytes > overhead ? capacity_bytes - overhead : 0;
  std::uint64_t wanted = segment_bytes;
  if (wanted == 0) {
    const std::uint64_t parts = std::clamp<std::uint64_t>(
        data / (kChunksPerSegmentMin * SpaceMap::kChunkBytes), 1, kSegmentsByDefault);
    wanted = std::min(data / parts, kSegmentBytesMax);
  }
  geometry.segment_bytes = whole_segment(wanted);
  const std::uint64_t count = geometry.segment_bytes == 0 ? 0 : data / geometry.segment_bytes;
  if (count == 0) {
    const std::uint64_t least =
        kLockFileBytes + index_bytes_for(0) + SegmentHeader::kDataOffset + SpaceMap::kChunkBytes;
    return invalid_argument(fmt::format(
        "a store of {} B in segments of {} B, expected at least {} B and room for one segment",
        capacity_bytes, wanted, least));
  }
  // Places are numbered with 32 bits: 256 TiB.
  const std::uint64_t units = count * geometry.units_per_segment();
  if (count > kSegmentsMax || units > 0xFFFFFFF0u) {
    return invalid_argument(fmt::format("a store of {} segments of {} B, at most {} and 256 TiB",
                                        count, geometry.segment_bytes, kSegmentsMax));
  }
  geometry.segments = static_cast<std::uint32_t>(count);
  geometry.index_bytes = index_bytes_for(count * geometry.segment_bytes);
  return geometry;
}

std::uint64_t StoreGeometry::total_bytes() const {
  return kLockFileBytes + index_bytes + std::uint64_t{segments} * segment_bytes;
}

SegmentHeader Store::State::header_of(std::uint32_t segment) const {
  SegmentHeader header = {.store = id,
                          .segment = segment,
                          .segments = geometry.segments,
                          .segment_bytes = geometry.segment_bytes,
                          .layout_fingerprint = options.layout_fingerprint};
  if (options.cipher != nullptr) {
    header.cipher = Cipher::kAes256Xts;
    header.key = options.cipher->id();
  }
  return header;
}

Status Store::State::check_room(std::uint64_t new_bytes) {
  KVTIER_ASSIGN_OR_RETURN(const std::uint64_t free, directory->free_bytes());
  if (free >= new_bytes && free - new_bytes >= options.free_bytes_min) return {};
  return no_space(fmt::format("{}: {} B wanted, {} B free, of which {} B are to stay free",
                              directory->name(), new_bytes, free, options.free_bytes_min));
}

// Makes one segment file; its header stands in the first page and again in the second.
Status Store::State::create_segment(std::uint32_t segment) {
  KVTIER_ASSIGN_OR_RETURN(segments[segment],
                          directory->create(segment_name(segment), geometry.segment_bytes));
  const std::span<std::byte> pages = staged(0).first(2 * SegmentHeader::kBytes);
  encode(header_of(segment), pages.first(SegmentHeader::kBytes));
  std::copy_n(pages.begin(), SegmentHeader::kBytes, pages.begin() + SegmentHeader::kBytes);
  const std::span<const std::unique_ptr<File>> all = segments;
  StoreIo one(all.subspan(segment, 1));
  StoreOperation write;
  write.io = {.kind = FileOperation::Kind::kWrite, .offset = 0, .buffer = pages};
  one.run({&write, 1}, [](StoreOperation&) {});
  KVTIER_RETURN_IF_ERROR(write.io.status);
  return segments[segment]->sync();
}

Status Store::State::create_files() {
  KVTIER_ASSIGN_OR_RETURN(
      geometry, StoreGeometry::of_capacity(options.capacity_bytes, options.segment_bytes));
  KVTIER_RETURN_IF_ERROR(check_room(geometry.total_bytes()));
  KVTIER_ASSIGN_OR_RETURN(id, random_id());
  // An index without a segment says nothing that could be found.
  KVTIER_ASSIGN_OR_RETURN(const std::optional<std::uint64_t> old_index,
                          directory->size_of(kIndexFileName));
  if (old_index) {
    add_notice(fmt::format("{} is missing, as is every other segment: the store is made anew",
                           segment_name(0)));
    KVTIER_RETURN_IF_ERROR(directory->remove(kIndexFileName));
  }
  segments.resize(geometry.segments);
  for (std::uint32_t i = 0; i < geometry.segments; ++i) KVTIER_RETURN_IF_ERROR(create_segment(i));
  KVTIER_RETURN_IF_ERROR(open_index());
  return directory->sync();
}

// Opens the index's file, or makes one where there is none.
Status Store::State::open_index() {
  KVTIER_ASSIGN_OR_RETURN(const std::optional<std::uint64_t> size,
                          directory->size_of(kIndexFileName));
  const bool usable = size && *size == geometry.index_bytes;
  if (!usable && options.read_only) return not_found("index: there is none of the right size");
  if (!usable) {
    if (size) KVTIER_RETURN_IF_ERROR(directory->remove(kIndexFileName));
    KVTIER_ASSIGN_OR_RETURN(index_file, directory->create(kIndexFileName, geometry.index_bytes));
  } else {
    KVTIER_ASSIGN_OR_RETURN(index_file, directory->open(kIndexFileName));
  }
  KVTIER_ASSIGN_OR_RETURN(index, IndexLog::open(index_file.get()));
  return {};
}

// A segment's header, from its first page or the copy in the second.
Result<SegmentHeader> Store::State::read_header(File& file) {
  const std::span<std::byte> pages = staged(0).first(2 * SegmentHeader::kBytes);
  FileOperation read = {.kind = FileOperation::Kind::kRead, .offset = 0, .buffer = pages};
  FileOperation* pointer = &read;
  KVTIER_CHECK(file.submit({&pointer, 1}) == 1, "a file that is not in use refused an operation");
  std::array<FileOperation*, 1> done{};
  while (file.reap(done, std::chrono::seconds(1)) == 0) {
  }
  KVTIER_RETURN_IF_ERROR(read.status);
  if (read.transferred < pages.size()) return corrupt("the file is shorter than its header");
  Result<SegmentHeader> header = decode_segment_header(pages.first(SegmentHeader::kBytes));
  if (header.ok() || header.status().code() == StatusCode::kUnsupported) return header;
  const Result<SegmentHeader> copy = decode_segment_header(pages.subspan(SegmentHeader::kBytes));
  return copy.ok() ? copy : header;
}

// What the store is, from the first sound header.
Status Store::State::find_geometry() {
  Status first_failure = corrupt(fmt::format("{}: no segment can be read", directory->name()));
  for (std::uint32_t i = 0; i < kSegmentsMax; ++i) {
    KVTIER_ASSIGN_OR_RETURN(const std::optional<std::uint64_t> size,
                            directory->size_of(segment_name(i)));
    if (!size && i > 2 * kSegmentsByDefault) break;
    if (!size) continue;
    KVTIER_ASSIGN_OR_RETURN(std::unique_ptr<File> file, directory->open(segment_name(i)));
    const Result<SegmentHeader> header = read_header(*file);
    KVTIER_RETURN_IF_ERROR(file->close());
    if (!header.ok()) {
      first_failure = Status(
          header.status().code(),
          fmt::format("{}/{}: {}", directory->name(), segment_name(i), header.status().message()));
      continue;
    }
    id = header->store;
    geometry = {.segments = header->segments,
                .segment_bytes = header->segment_bytes,
                .index_bytes = index_bytes_for(header->segments * header->segment_bytes)};
    if (whole_segment(geometry.segment_bytes) != geometry.segment_bytes ||
        geometry.segments > kSegmentsMax) {
      return corrupt(fmt::format("{}/{}: {} segments of {} B make no sense", directory->name(),
                                 segment_name(i), geometry.segments, geometry.segment_bytes));
    }
    const KeyId own = options.cipher == nullptr ? KeyId{} : options.cipher->id();
    foreign_key = header->key != own;
    if (foreign_key) {
      add_notice(fmt::format(
          "{}: the store is encrypted with key {}, this is {}: nothing is found and nothing is "
          "changed",
          directory->name(), header->cipher == Cipher::kNone ? "none" : hex_of(header->key),
          options.cipher == nullptr ? "none" : hex_of(own)));
    }
    return {};
  }
  return first_failure;
}

Status Store::State::open_existing() {
  KVTIER_RETURN_IF_ERROR(find_geometry());
  if (options.capacity_bytes != 0) {
    const Result<StoreGeometry> asked =
        StoreGeometry::of_capacity(options.capacity_bytes, geometry.segment_bytes);
    if (!asked.ok() || asked->segments != geometry.segments) {
      return unsupported(fmt::format(
          "{}: the store has {} B, asked for was {} B; remove it to make one of another size",
          directory->name(), geometry.total_bytes(), options.capacity_bytes));
    }
  }
  if (!options.read_only) KVTIER_RETURN_IF_ERROR(check_room(0));
  segments.resize(geometry.segments);
  for (std::uint32_t i = 0; i < geometry.segments; ++i) {
    KVTIER_ASSIGN_OR_RETURN(const std::optional<std::uint64_t> size,
                            directory->size_of(segment_name(i)));
    if (size && *size >= geometry.segment_bytes) {
      KVTIER_ASSIGN_OR_RETURN(segments[i], directory->open(segment_name(i)));
      continue;
    }
    const std::string what = size ? fmt::format("{} was cut to {} B of {}", segment_name(i), *size,
                                                geometry.segment_bytes)
                                  : fmt::format("{} is missing", segment_name(i));
    if (options.read_only || foreign_key) {
      return io_error(fmt::format("{}: {}", directory->name(), what));
    }
    add_notice(what + ": made anew, what was in it is gone");
    ++segments_lost;
    KVTIER_RETURN_IF_ERROR(directory->remove(segment_name(i)));
    KVTIER_RETURN_IF_ERROR(create_segment(i));
  }
  return {};
}

// Whether the only thing here is a first segment without a header: what a process leaves that was
// killed while it made the store. Nothing can have been committed to it.
Result<bool> Store::State::is_unfinished() {
  for (const std::string& later : {segment_name(1), std::string(kIndexFileName)}) {
    KVTIER_ASSIGN_OR_RETURN(const std::optional<std::uint64_t> size, directory->size_of(later));
    if (size) return false;
  }
  KVTIER_ASSIGN_OR_RETURN(const std::optional<std::uint64_t> size,
                          directory->size_of(segment_name(0)));
  if (!size) return false;
  if (*size < 2 * SegmentHeader::kBytes) return true;
  KVTIER_ASSIGN_OR_RETURN(std::unique_ptr<File> file, directory->open(segment_name(0)));
  const std::span<std::byte> pages = staged(0).first(2 * SegmentHeader::kBytes);
  std::fill(pages.begin(), pages.end(), std::byte{1});
  const Result<SegmentHeader> header = read_header(*file);
  KVTIER_RETURN_IF_ERROR(file->close());
  return !header.ok() &&
         std::all_of(pages.begin(), pages.end(), [](std::byte b) { return b == std::byte{0}; });
}

Status Store::State::open_files() {
  KVTIER_ASSIGN_OR_RETURN(staging, Region::allocate({.bytes = kStagedPlaces * SpaceMap::kChunkBytes,
                                                     .huge_pages = false}));
  bool exists = false;
  for (std::uint32_t i = 0; i <= 2 * kSegmentsByDefault && !exists; ++i) {
    KVTIER_ASSIGN_OR_RETURN(const std::optional<std::uint64_t> size,
                            directory->size_of(segment_name(i)));
    exists = size.has_value();
  }
  if (exists && !options.read_only) {
    KVTIER_ASSIGN_OR_RETURN(const bool unfinished, is_unfinished());
    if (unfinished) KVTIER_RETURN_IF_ERROR(directory->remove(segment_name(0)));
    exists = !unfinished;
  }
  if (!exists && options.read_only) {
    return not_found(fmt::format("{}: there is no store", directory->name()));
  }
  KVTIER_RETURN_IF_ERROR(exists ? open_existing() : create_files());
  io = std::make_unique<StoreIo>(segments);
  dirty.assign(geometry.segments, false);
  if (foreign_key) {
    space = std::make_unique<SpaceMap>(0);
    return {};
  }
  space = std::make_unique<SpaceMap>(geometry.segments * geometry.units_per_segment() /
                                     SpaceMap::kChunkUnits);
  if (!exists) return rewrite_index(false);
  return load_index();
}

Status Store::State::close_files() {
  Status status;
  const auto keep_first = [&](const Status& closed) {
    if (status.ok()) status = closed;
  };
  for (const std::unique_ptr<File>& file : segments) {
    if (file != nullptr) keep_first(file->close());
  }
  if (index_file != nullptr) keep_first(index_file->close());
  return status;
}

Result<std::unique_ptr<Store>> Store::open(std::unique_ptr<StoreDirectory> directory,
                                           const StoreOptions& options) {
  auto state = std::make_unique<State>();
  state->options = options;
  state->directory = std::move(directory);
  const Status status = state->open_files();
  if (!status.ok()) {
    // What was opened so far is closed; of two failures the first is the one to tell.
    [[maybe_unused]] const Status closed = state->close_files();
    return status;
  }
  return std::unique_ptr<Store>(new Store(std::move(state)));
}

Result<std::unique_ptr<Store>> open_store(const std::string& path, const StoreOptions& options) {
  const DiskDirectoryOptions directory_options = {.create = options.capacity_bytes != 0,
                                                  .read_only = options.read_only};
  if (options.durability == Durability::kNone) {
    KVTIER_ASSIGN_OR_RETURN(std::unique_ptr<StoreDirectory> directory,
                            open_nameless_directory(path, directory_options));
    return Store::open(std::move(directory), options);
  }
  KVTIER_ASSIGN_OR_RETURN(std::unique_ptr<StoreDirectory> directory,
                          open_disk_directory(path, directory_options));
  return Store::open(std::move(directory), options);
}

}  // namespace kvtier
