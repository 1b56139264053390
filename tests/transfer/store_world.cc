#include "tests/transfer/store_world.h"

#include "kernels/checksum.h"
#include "transfer/extent_format.h"
#include "transfer/file_error.h"
#include "transfer/operation_list.h"
#include "transfer/store_state.h"

#include <algorithm>
#include <cstring>

namespace kvtier::test {

/// A file of a `SimulatedDrive`; operations finish inside `submit`.
class SimulatedFile final : public File {
 public:
  SimulatedFile(SimulatedDrive* drive, std::string name) : drive_(drive), name_(std::move(name)) {
    traits_.backend = "simulated";
    traits_.queue_depth = 8;
  }

  const FileTraits& traits() const override { return traits_; }
  std::uint64_t size_bytes() const override { return stored().written.size(); }
  Status register_buffers(std::span<const std::span<std::byte>>) override { return {}; }

  std::size_t submit(std::span<FileOperation* const> operations) override {
    std::size_t accepted = 0;
    for (FileOperation* operation : operations) {
      if (in_flight_ == traits_.queue_depth) break;
      check_aligned(*operation, traits_.alignment);
      execute(*operation);
      finished_.push(operation);
      ++in_flight_;
      ++accepted;
    }
    return accepted;
  }

  std::size_t reap(std::span<FileOperation*> done, Duration) override {
    const std::size_t count = finished_.pop_into(done);
    in_flight_ -= static_cast<std::uint32_t>(count);
    return count;
  }

  void cancel(FileOperation*) override {}

  Status sync() override {
    if (!drive_->takes_one_more()) return io_error("the drive has stopped");
    if (!drive_->sync_failure.ok()) return drive_->sync_failure;
    ++drive_->syncs;
    std::erase_if(drive_->unsynced_, [this](const auto& write) {
      if (write.file != name_) return false;
      std::copy(write.bytes.begin(), write.bytes.end(),
                stored().synced.begin() + static_cast<std::ptrdiff_t>(write.offset));
      return true;
    });
    return {};
  }

  Status close() override { return {}; }

 private:
  SimulatedDrive::Stored& stored() const { return drive_->files_[name_]; }

  void execute(FileOperation& operation) {
    operation.status = Status();
    operation.transferred = 0;
    std::vector<std::byte>& bytes = stored().written;
    const bool is_index = name_ == kIndexFileName;
    const auto at = static_cast<std::ptrdiff_t>(operation.offset);
    if (operation.kind == FileOperation::Kind::kRead) {
      if (!is_index) operation.status = drive_->read_failure;
      if (!operation.status.ok()) return;
      operation.transferred = readable_bytes(operation, bytes.size());
      std::copy_n(bytes.begin() + (operation.transferred > 0 ? at : 0), operation.transferred,
                  operation.buffer.begin());
      return;
    }
    operation.status = is_index ? drive_->index_failure : drive_->write_failure;
    if (operation.status.ok() && !drive_->takes_one_more()) {
      operation.status = io_error("the drive has stopped");
    }
    if (operation.status.ok()) operation.status = check_fits(operation, bytes.size());
    if (!operation.status.ok()) return;
    drive_->unsynced_.push_back(
        {name_, operation.offset, {operation.buffer.begin(), operation.buffer.end()}});
    std::copy(operation.buffer.begin(), operation.buffer.end(), bytes.begin() + at);
    operation.transferred = operation.buffer.size();
  }

  SimulatedDrive* drive_;
  std::string name_;
  FileTraits traits_;
  OperationList<FileOperation> finished_;
  std::uint32_t in_flight_ = 0;
};

class SimulatedDirectory final : public StoreDirectory {
 public:
  explicit SimulatedDirectory(SimulatedDrive* drive) : drive_(drive) {}

  const std::string& name() const override { return name_; }
  Result<std::optional<std::uint64_t>> size_of(const std::string& file) override {
    const auto found = drive_->files_.find(file);
    if (found == drive_->files_.end()) return std::optional<std::uint64_t>();
    return std::optional<std::uint64_t>(found->second.written.size());
  }
  Result<std::unique_ptr<File>> create(const std::string& file, std::uint64_t bytes) override {
    drive_->files_[file].written.resize(bytes);
    drive_->files_[file].synced.resize(bytes);
    return std::unique_ptr<File>(new SimulatedFile(drive_, file));
  }
  Result<std::unique_ptr<File>> open(const std::string& file) override {
    if (!drive_->files_.contains(file)) return not_found(file);
    return std::unique_ptr<File>(new SimulatedFile(drive_, file));
  }
  Status remove(const std::string& file) override {
    drive_->files_.erase(file);
    return {};
  }
  Status check(const std::string& file) override {
    return drive_->files_.contains(file) ? Status() : io_error(file + " is gone");
  }
  Status sync() override { return {}; }
  Result<std::uint64_t> free_bytes() override { return drive_->free_bytes; }

 private:
  SimulatedDrive* drive_;
  std::string name_ = "drive";
};

std::unique_ptr<StoreDirectory> SimulatedDrive::open() {
  return std::make_unique<SimulatedDirectory>(this);
}

bool SimulatedDrive::takes_one_more() {
  if (left_ == 0) return false;
  if (left_ != kForever) --left_;
  return true;
}

std::uint64_t SimulatedDrive::total_bytes() const {
  std::uint64_t bytes = 0;
  for (const auto& [name, stored] : files_) bytes += stored.written.size();
  return bytes;
}

void SimulatedDrive::apply(const Write& write, std::mt19937_64& random, Misdirect misdirect) {
  std::string file = write.file;
  std::uint64_t offset = write.offset;
  std::uint64_t unit = write.bytes.size();
  switch (random() % 8) {
    case 0:
    case 1: return;  // Dropped.
    case 2: unit = 512; break;
    case 3: unit = 4096; break;
    case 4:
      if (misdirect == Misdirect::kAnywhere) {
        offset = random() % (files_[file].synced.size() / 4096) * 4096;
      } else {
        const Write& other = unsynced_[random() % unsynced_.size()];
        file = other.file;
        offset = other.offset;
        unit = std::min<std::uint64_t>(unit, other.bytes.size());
      }
      break;
    default: break;  // Kept.
  }
  std::vector<std::byte>& target = files_[file].synced;
  const bool is_torn = unit == 512 || (unit == 4096 && write.bytes.size() > 4096);
  const bool is_elsewhere = file != write.file || offset != write.offset;
  const std::uint64_t end = is_elsewhere && misdirect == Misdirect::kOntoUnsynced
                                ? unit
                                : std::uint64_t{write.bytes.size()};
  for (std::uint64_t at = 0; at < end && offset + at < target.size(); at += unit) {
    if (is_torn && !is_elsewhere && random() % 2 == 0) continue;
    const std::uint64_t length = std::min({unit, end - at, target.size() - offset - at});
    std::copy_n(write.bytes.begin() + static_cast<std::ptrdiff_t>(at), length,
                target.begin() + static_cast<std::ptrdiff_t>(offset + at));
  }
}

void SimulatedDrive::lose_power(std::uint64_t seed, Misdirect misdirect) {
  std::mt19937_64 random(seed);
  // Earlier and later writes of one place may change sides as well.
  std::vector<std::size_t> order(unsynced_.size());
  for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
  if (random() % 2 == 0) std::shuffle(order.begin(), order.end(), random);
  for (const std::size_t i : order) apply(unsynced_[i], random, misdirect);
  unsynced_.clear();
  for (auto& [name, stored] : files_) stored.written = stored.synced;
  restart();
}

BlockLayout small_layout(std::size_t extent_bytes) {
  BlockShape shape;
  shape.head_dim = 16;
  shape.value_dim = 16;
  shape.kv_heads = 2;
  shape.tokens_per_block = 4;
  shape.extent_bytes = extent_bytes;
  auto layout = BlockLayout::make(shape);
  KVTIER_CHECK(layout.ok(), "{}", layout.status().to_string());
  return *layout;
}

StoreKey key_of(std::uint64_t number) {
  StoreKey key;
  for (std::size_t i = 0; i < 4; ++i) {
    const std::uint64_t word = checksum(std::as_bytes(std::span(&number, 1))) * (2 * i + 1);
    std::memcpy(key.bytes.data() + 8 * i, &word, 8);
  }
  return key;
}

void fill_extent(std::span<std::byte> extent, const BlockLayout& layout, std::uint64_t number,
                 const StoreExtentKey& key) {
  std::fill(extent.begin(), extent.end(), std::byte{0});
  ExtentHeader header(extent.first(layout.extent_header_bytes()), layout);
  header.format(key.layer, key.head_group);
  for (std::uint32_t place = 0; place < layout.blocks_per_extent(); ++place) {
    const std::span<std::byte> payload =
        extent.subspan(layout.block_offset(place), layout.payload_bytes());
    const BlockIndex index{key.index * layout.blocks_per_extent() + place};
    fill_pattern(payload, number * 1000003 + key.layer.value * 8191 + key.head_group.value * 127 +
                              index.value);
    const BlockIdentity identity = {
        .origin = {number, 7}, .layer = key.layer, .head_group = key.head_group, .index = index};
    header.set_entry(place, {.identity = identity,
                             .generation = Generation{0},
                             .length_bytes = static_cast<std::uint32_t>(payload.size()),
                             .checksum = block_checksum(payload, identity, Generation{0})});
  }
  header.seal();
}

std::vector<std::byte> blob_of(std::uint64_t number, std::size_t bytes) {
  std::vector<std::byte> blob((bytes + 7) / 8 * 8);
  fill_pattern(blob, number ^ 0xb10b);
  blob.resize(bytes);
  return blob;
}

StoreOptions store_options(std::uint64_t capacity_bytes, Durability level) {
  StoreOptions options;
  options.durability = level;
  options.capacity_bytes = capacity_bytes;
  options.free_bytes_min = 0;
  return options;
}

namespace {

StoreExtentKey extent_key(std::uint32_t i) { return {LayerIndex{i / 2}, HeadGroup{i % 2}, 0}; }

}  // namespace

Status put_item(Store& store, const BlockLayout& layout, std::uint64_t number,
                const ItemShape& shape) {
  KVTIER_ASSIGN_OR_RETURN(
      StoreFill fill, store.fill({.key = key_of(number),
                                  .parent = shape.parent == 0 ? StoreKey() : key_of(shape.parent),
                                  .layout_fingerprint = layout.fingerprint(),
                                  .extents = shape.extents,
                                  .extent_bytes = layout.extent_bytes()}));
  const AlignedBuffer memory(shape.extents * layout.extent_bytes());
  std::vector<StoreExtentWrite> writes;
  for (std::uint32_t i = 0; i < shape.extents; ++i) {
    const auto bytes = memory.part(i * layout.extent_bytes(), layout.extent_bytes());
    fill_extent(bytes, layout, number, extent_key(i));
    writes.push_back({extent_key(i), bytes});
  }
  KVTIER_RETURN_IF_ERROR(store.write(fill, writes));
  const std::vector<std::byte> bytes = blob_of(number, shape.blob_bytes);
  const StoreBlob blob{.tag = 1, .bytes = bytes};
  const Store::Commit commit = {.fill = &fill, .blobs = {&blob, 1}, .value = shape.value};
  return store.commit({&commit, 1});
}

ItemVerdict read_item(Store& store, const BlockLayout& layout, std::uint64_t number,
                      const ItemShape& shape) {
  ItemVerdict verdict;
  Result<StoredItem> item = store.find(key_of(number));
  verdict.status = item.status();
  if (!item.ok()) return verdict;
  verdict.found = true;
  verdict.whole = item->extents() == shape.extents;
  const AlignedBuffer memory(layout.extent_bytes() * shape.extents);
  const AlignedBuffer expected(layout.extent_bytes());
  std::vector<StatusCode> blocks(layout.blocks_per_extent() * shape.extents);
  std::vector<StoreExtentRead> reads(shape.extents);
  for (std::uint32_t i = 0; i < shape.extents; ++i) {
    reads[i].item = &*item;
    reads[i].key = extent_key(i);
    reads[i].target = memory.part(i * layout.extent_bytes(), layout.extent_bytes());
    reads[i].blocks =
        std::span(blocks).subspan(i * layout.blocks_per_extent(), layout.blocks_per_extent());
  }
  store.read(reads);
  for (std::uint32_t i = 0; i < shape.extents; ++i) {
    fill_extent(expected.bytes(), layout, number, extent_key(i));
    if (!reads[i].status.ok()) {
      verdict.whole = false;
      verdict.status = reads[i].status;
    }
    for (std::uint32_t place = 0; place < layout.blocks_per_extent(); ++place) {
      const bool is_good = reads[i].blocks[place] == StatusCode::kOk;
      verdict.bad_blocks += !is_good;
      const std::size_t at = layout.block_offset(place);
      const bool same = std::memcmp(reads[i].target.data() + at, expected.bytes().data() + at,
                                    layout.payload_bytes()) == 0;
      if (is_good && !same) verdict.wrong = true;
      if (reads[i].status.ok() && !is_good) verdict.wrong = true;
    }
  }
  const std::vector<std::byte> blob = blob_of(number, shape.blob_bytes);
  std::vector<std::byte> found(item->blob_bytes(1).value_or(0));
  const Status status = store.read_blob(*item, 1, found);
  if (!status.ok()) {
    verdict.whole = false;
    if (verdict.status.ok()) verdict.status = status;
  } else if (found != blob) {
    verdict.wrong = true;
  }
  return verdict;
}

}  // namespace kvtier::test
