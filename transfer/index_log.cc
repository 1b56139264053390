#include "transfer/index_log.h"

#include <algorithm>
#include <array>
#include <cstring>

namespace kvtier {
namespace {

constexpr std::size_t kIndexPageBytes = 4096;
constexpr std::size_t kIndexBufferBytes = 256 * 1024;
constexpr std::uint64_t kRecordsPerPage = kIndexPageBytes / IndexRecord::kBytes;

// One operation from start to end; what comes short counts as an error.
Status run_whole(File& file, FileOperation::Kind kind, std::uint64_t offset,
                 std::span<std::byte> buffer) {
  FileOperation operation{.kind = kind, .offset = offset, .buffer = buffer};
  FileOperation* pointer = &operation;
  KVTIER_CHECK(file.submit({&pointer, 1}) == 1, "the index's file refused an operation");
  std::array<FileOperation*, 1> done{};
  while (file.reap(done, std::chrono::seconds(1)) == 0) {
  }
  if (!operation.status.ok()) {
    return Status(operation.status.code(), fmt::format("index: {}", operation.status.message()));
  }
  if (operation.transferred != buffer.size()) {
    return io_error(fmt::format("index: {} B at {} came short: {} B", buffer.size(), offset,
                                operation.transferred));
  }
  return {};
}

// Puts the lines of a list back together: each detail follows its put, its parts follow the detail.
class LineReader {
 public:
  explicit LineReader(IndexContent& content) : content_(content) {}

  // False when the line cannot stand here.
  bool take(const IndexRecord& record, std::span<const std::byte> bytes) {
    switch (record.kind) {
      case IndexRecord::Kind::kDetail: {
        const bool follows_put = parts_left_ == 0 && !content_.records.empty() &&
                                 content_.records.back().kind == IndexRecord::Kind::kPut &&
                                 content_.details.size() + 1 == content_.records.size();
        if (!follows_put || !content_.header.clean) return false;
        content_.details.push_back(decode_detail(bytes));
        parts_left_ = content_.details.back().parts;
        return true;
      }
      case IndexRecord::Kind::kParts: {
        const std::uint32_t count = std::min(parts_left_, IndexDetail::kPartsPerRecord);
        parts_left_ -= count;
        return count > 0 && decode_parts(bytes, content_.details.back(), count, content_.parts);
      }
      default:
        if (parts_left_ > 0) return false;
        content_.records.push_back(record);
        return true;
    }
  }
  bool is_complete() const { return parts_left_ == 0; }

 private:
  IndexContent& content_;
  std::uint32_t parts_left_ = 0;
};

}  // namespace

// The lines of a list, one after the other: records, behind the first of them their details.
class IndexLog::Lines {
 public:
  Lines(std::span<const IndexRecord> records, std::span<const IndexDetailed> details)
      : records_(records), details_(details), left_(records.size()) {
    for (const IndexDetailed& detailed : details) left_ += detailed.detail.records();
  }

  std::uint64_t left() const { return left_; }

  void write_next(std::uint64_t epoch, std::uint64_t position, std::span<std::byte> bytes) {
    --left_;
    if (!parts_.empty()) {
      const std::size_t count = std::min<std::size_t>(parts_.size(), IndexDetail::kPartsPerRecord);
      encode(parts_.first(count), epoch, position, bytes);
      parts_ = parts_.subspan(count);
    } else if (detail_is_next_) {
      encode(details_.front().detail, epoch, position, bytes);
      parts_ = details_.front().parts;
      details_ = details_.subspan(1);
      detail_is_next_ = false;
    } else {
      encode(records_.front(), epoch, position, bytes);
      records_ = records_.subspan(1);
      detail_is_next_ = !details_.empty();
    }
  }

 private:
  std::span<const IndexRecord> records_;
  std::span<const IndexDetailed> details_;
  std::span<const ManifestPart> parts_;
  std::uint64_t left_;
  bool detail_is_next_ = false;
};

std::uint64_t IndexLog::file_bytes(std::uint64_t records_max) {
  const std::uint64_t pages = (records_max + kRecordsPerPage - 1) / kRecordsPerPage;
  return 2 * (1 + pages) * kIndexPageBytes;
}

IndexLog::IndexLog(File* file, Region buffer) : file_(file), buffer_(std::move(buffer)) {
  area_bytes_ = file->size_bytes() / kIndexPageBytes / 2 * kIndexPageBytes;
  records_max_ = area_bytes_ / kIndexPageBytes == 0
                     ? 0
                     : (area_bytes_ / kIndexPageBytes - 1) * kRecordsPerPage;
}

Result<std::unique_ptr<IndexLog>> IndexLog::open(File* file) {
  KVTIER_ASSIGN_OR_RETURN(
      Region buffer,
      Region::allocate({.bytes = kIndexBufferBytes + kIndexPageBytes, .huge_pages = false}));
  return std::unique_ptr<IndexLog>(new IndexLog(file, std::move(buffer)));
}

std::span<std::byte> IndexLog::tail() const {
  return buffer_.bytes().subspan(kIndexBufferBytes, kIndexPageBytes);
}

std::uint64_t IndexLog::area_offset(std::uint32_t area) const { return area * area_bytes_; }

Result<IndexHeader> IndexLog::read_header(std::uint32_t area, const StoreId& store) {
  const std::span<std::byte> page = buffer_.bytes().first(kIndexPageBytes);
  KVTIER_RETURN_IF_ERROR(run_whole(*file_, FileOperation::Kind::kRead, area_offset(area), page));
  KVTIER_ASSIGN_OR_RETURN(const IndexHeader header, decode_index_header(page));
  if (header.store != store) return corrupt("index header: of another store");
  if (header.records > records_max_) return corrupt("index header: more records than fit");
  return header;
}

Result<IndexContent> IndexLog::load(const StoreId& store) {
  if (records_max_ == 0) return corrupt("index: the file is too short");
  std::array<Result<IndexHeader>, 2> headers = {read_header(0, store), read_header(1, store)};
  for (const Result<IndexHeader>& header : headers) {
    if (header.status().code() == StatusCode::kUnsupported) return header.status();
  }
  if (!headers[0].ok() && !headers[1].ok()) return corrupt(headers[0].status().message());
  area_ = !headers[0].ok() ? 1 : !headers[1].ok() ? 0 : headers[1]->epoch > headers[0]->epoch;
  header_ = *headers[area_];
  IndexContent content{.header = header_};
  // The other may have been the one that counts: both are written when an index is made.
  has_both_ = headers[1 - area_].ok();
  if (!has_both_) content.damage = "one of its two headers is damaged";
  // After a clean stop what the header counts is all there is. Otherwise the rest of the area is
  // looked through, since behind a page that was lost there may be others that were not.
  const std::uint64_t limit = header_.clean ? header_.records : records_max_;
  LineReader lines(content);
  std::uint64_t position = 0;
  bool ended = false;
  for (std::uint64_t at = 0; at < limit;) {
    const std::uint64_t pages = std::min<std::uint64_t>(
        (limit - at + kRecordsPerPage - 1) / kRecordsPerPage, kIndexBufferBytes / kIndexPageBytes);
    const std::span<std::byte> bytes = buffer_.bytes().first(pages * kIndexPageBytes);
    KVTIER_RETURN_IF_ERROR(
        run_whole(*file_, FileOperation::Kind::kRead,
                  area_offset(area_) + kIndexPageBytes + at * IndexRecord::kBytes, bytes));
    for (std::uint64_t i = 0; i < pages * kRecordsPerPage && at < limit; ++i, ++at) {
      IndexRecord record;
      const std::span<const std::byte> line =
          bytes.subspan(i * IndexRecord::kBytes, IndexRecord::kBytes);
      RecordState state = decode_record(line, header_.epoch, at, record);
      if (state == RecordState::kValid && !ended) {
        position = at + 1;
        if (lines.take(record, line)) continue;
        state = RecordState::kDamaged;
      }
      // The end is written down: a page of it that went missing does not look like one.
      const bool is_sound = ended ? state == RecordState::kEnd || state == RecordState::kAbsent
                                  : state == RecordState::kEnd;
      if (!is_sound && content.damage.empty()) {
        constexpr const char* kWhat[] = {"behind a hole", "out of place", "missing", "torn"};
        content.damage = fmt::format("record {} is {}", at, kWhat[static_cast<int>(state)]);
      }
      ended = true;
    }
  }
  if ((position < header_.records || !lines.is_complete()) && content.damage.empty()) {
    content.damage = fmt::format("{} records, expected at least {}", position, header_.records);
  }
  position_ = position;
  return content;
}

// Writes whole pages, behind the records the end: a page of ends where the last one is full. The
// first page may begin with records that are there already: they are repeated from memory, because
// what would be read back could be damaged.
Status IndexLog::write_lines(std::uint32_t area, std::uint64_t epoch, std::uint64_t position,
                             Lines& lines) {
  do {
    const std::uint64_t lead = position % kRecordsPerPage;
    const std::uint64_t first_page = position / kRecordsPerPage;
    constexpr std::size_t kBatch = (kIndexBufferBytes - kIndexPageBytes) / IndexRecord::kBytes;
    const std::size_t count = std::min<std::size_t>(lines.left(), kBatch - lead);
    const std::uint64_t last_page = (position + count) / kRecordsPerPage;
    const std::uint64_t end = std::min((last_page + 1) * kRecordsPerPage, records_max_);
    const std::size_t bytes = (end - first_page * kRecordsPerPage) * IndexRecord::kBytes;
    const std::span<std::byte> buffer = buffer_.bytes().first(bytes);
    const std::uint64_t offset = area_offset(area) + (1 + first_page) * kIndexPageBytes;
    if (lead > 0) {
      std::copy(tail().begin(), tail().end(), buffer.begin());
    }
    for (std::size_t i = 0; i < count; ++i) {
      lines.write_next(epoch, position + i,
                       buffer.subspan((lead + i) * IndexRecord::kBytes, IndexRecord::kBytes));
    }
    for (std::uint64_t at = position + count; at < end; ++at) {
      encode(IndexRecord{.kind = IndexRecord::Kind::kEnd}, epoch, at,
             buffer.subspan((at - first_page * kRecordsPerPage) * IndexRecord::kBytes,
                            IndexRecord::kBytes));
    }
    KVTIER_RETURN_IF_ERROR(run_whole(*file_, FileOperation::Kind::kWrite, offset, buffer));
    const auto last = buffer.last(kIndexPageBytes);
    std::copy(last.begin(), last.end(), tail().begin());
    position += count;
  } while (lines.left() > 0);
  return {};
}

Status IndexLog::rewrite(IndexHeader header, std::span<const IndexRecord> records,
                         std::span<const IndexDetailed> details) {
  if (records.size() > records_max_) {
    return no_space(fmt::format("index: {} records, room for {}", records.size(), records_max_));
  }
  KVTIER_CHECK(details.size() <= records.size() && (details.empty() || header.clean),
               "{} details of {} records", details.size(), records.size());
  broken_ = true;
  header.epoch = std::max({header.epoch, header_.epoch + 1, epoch_tried_ + 1});
  epoch_tried_ = header.epoch;
  std::uint64_t room = records_max_ - records.size();
  std::size_t detailed = 0;
  while (detailed < details.size() && details[detailed].detail.records() <= room) {
    room -= details[detailed++].detail.records();
  }
  Lines lines(records, details.first(detailed));
  header.records = lines.left();
  const std::uint32_t other = 1 - area_;
  KVTIER_RETURN_IF_ERROR(write_lines(other, header.epoch, 0, lines));
  // The header makes the records count: they have to be there first.
  KVTIER_RETURN_IF_ERROR(file_->sync());
  const std::span<std::byte> page = buffer_.bytes().first(kIndexPageBytes);
  encode(header, page);
  KVTIER_RETURN_IF_ERROR(run_whole(*file_, FileOperation::Kind::kWrite, area_offset(other), page));
  KVTIER_RETURN_IF_ERROR(file_->sync());
  header_ = header;
  area_ = other;
  position_ = header.records;
  broken_ = false;
  if (has_both_) return {};
  has_both_ = true;
  return rewrite(header, records, details);
}

Status IndexLog::append(std::span<const IndexRecord> records) {
  if (broken_) return io_error("index: an earlier write failed");
  if (records.size() > room()) {
    return no_space(fmt::format("index: {} records, room for {}", records.size(), room()));
  }
  Lines lines(records, {});
  const Status status = write_lines(area_, header_.epoch, position_, lines);
  broken_ = !status.ok();
  if (status.ok()) position_ += records.size();
  return status;
}

Status IndexLog::sync() {
  const Status status = file_->sync();
  // After a failure nobody knows which of the writes before it are there.
  if (!status.ok()) broken_ = true;
  return status;
}

}  // namespace kvtier
