#include "transfer/store.h"

#include "transfer/store_state.h"

#include <algorithm>
#include <tuple>
#include <utility>

namespace kvtier {
namespace {

// Parts of a live item are sorted by this.
auto order_of(const ManifestPart& part) {
  return std::tuple(static_cast<int>(part.kind), part.first, part.second, part.third);
}

}  // namespace

std::string segment_name(std::uint32_t segment) { return fmt::format("segment-{:04}", segment); }

StoreOperation Store::State::operation(FileOperation::Kind kind, std::uint32_t unit,
                                       std::span<std::byte> buffer, std::size_t tag) const {
  StoreOperation operation;
  operation.io.kind = kind;
  operation.io.offset = offset_of(unit);
  operation.io.buffer = buffer;
  operation.file = segment_of(unit);
  operation.index = tag;
  return operation;
}

void Store::State::encrypt(const StoreOperation& operation, std::span<const std::byte> source) {
  options.cipher->encrypt(operation.file, operation.io.offset / PageCipher::kPageBytes, source,
                          operation.io.buffer.data());
}

void Store::State::decrypt(const StoreOperation& operation) {
  if (options.cipher == nullptr) return;
  options.cipher->decrypt(operation.file, operation.io.offset / PageCipher::kPageBytes,
                          operation.io.buffer, operation.io.buffer.data());
}

Status Store::State::read_place(std::uint32_t unit, std::span<std::byte> target) {
  StoreOperation read = operation(FileOperation::Kind::kRead, unit, target, 0);
  io->run({&read, 1}, [](StoreOperation&) {});
  stats.read_bytes += target.size();
  if (read.io.status.ok()) decrypt(read);
  return read.io.status;
}

Status Store::State::write_place(std::uint32_t unit, std::span<std::byte> staged_bytes) {
  StoreOperation write = operation(FileOperation::Kind::kWrite, unit, staged_bytes, 0);
  if (options.cipher != nullptr) encrypt(write, staged_bytes);
  dirty[write.file] = true;
  io->run({&write, 1}, [](StoreOperation&) {});
  stats.written_bytes += staged_bytes.size();
  stats.write_failures += !write.io.status.ok();
  return write.io.status;
}

Status Store::State::check_writable() const {
  if (options.read_only) return unsupported("the store was opened for reading");
  if (foreign_key) return unsupported(notice);
  return {};
}

std::uint32_t Store::State::new_item() {
  if (free_items.empty()) {
    items.emplace_back();
    return static_cast<std::uint32_t>(items.size() - 1);
  }
  const std::uint32_t index = free_items.back();
  free_items.pop_back();
  return index;
}

void Store::State::free_item(std::uint32_t index) {
  StoreItem& item = items[index];
  by_key.erase(item.key);
  unlink_child(index);
  item = StoreItem();
  free_items.push_back(index);
}

bool Store::State::is_evictable(const StoreItem& item) const {
  return item.phase == StoreItem::Phase::kLive && item.holds == 0 && !children.contains(item.key);
}

void Store::State::rank(std::uint32_t index) {
  const StoreItem& item = items[index];
  if (is_evictable(item)) ranks.insert({item.value, item.last_use, index});
}

void Store::State::unrank(std::uint32_t index) {
  const StoreItem& item = items[index];
  ranks.erase({item.value, item.last_use, index});
}

void Store::State::link_child(std::uint32_t index) {
  StoreItem& item = items[index];
  if (item.parent == StoreKey()) return;
  if (const auto found = by_key.find(item.parent); found != by_key.end()) unrank(found->second);
  const auto [first, is_only] = children.try_emplace(item.parent, StoreItem::kNone);
  item.next_child = first->second;
  if (!is_only) items[item.next_child].previous_child = index;
  first->second = index;
}

void Store::State::unlink_child(std::uint32_t index) {
  const StoreItem& item = items[index];
  if (item.parent == StoreKey()) return;
  if (item.next_child != StoreItem::kNone) {
    items[item.next_child].previous_child = item.previous_child;
  }
  if (item.previous_child != StoreItem::kNone) {
    items[item.previous_child].next_child = item.next_child;
    return;
  }
  const auto first = children.find(item.parent);
  first->second = item.next_child;
  if (first->second != StoreItem::kNone) return;
  children.erase(first);
  if (const auto found = by_key.find(item.parent); found != by_key.end()) rank(found->second);
}

std::uint64_t Store::State::units_of(const StoreItem& item) const {
  std::uint64_t units = item.units;
  for (const ManifestPart& part : item.parts) units += part.units;
  return units;
}

const ManifestPart* Store::State::find_part(const StoreItem& item, ManifestPart::Kind kind,
                                            std::uint32_t first, std::uint32_t second,
                                            std::uint32_t third) const {
  const auto wanted = std::tuple(static_cast<int>(kind), first, second, third);
  const auto found = std::lower_bound(
      item.parts.begin(), item.parts.end(), wanted,
      [](const ManifestPart& part, const auto& key) { return order_of(part) < key; });
  return found != item.parts.end() && order_of(*found) == wanted ? &*found : nullptr;
}

void Store::State::give_back_places(StoreItem& item) {
  for (const ManifestPart& part : item.parts) {
    if (part.units > 0) space->give_back(part.unit, part.units);
  }
  if (item.units > 0) space->give_back(item.unit, item.units);
  item.parts.clear();
  item.units = 0;
}

void Store::State::add_notice(const std::string& line) {
  notice += fmt::format("{}{}", notice.empty() ? "" : "; ", line);
}

Store::Store(std::unique_ptr<State> state) : state_(std::move(state)) {}

Store::~Store() { KVTIER_CHECK(state_->closed, "a store was destroyed without close()"); }

const std::string& Store::notice() const { return state_->notice; }
Durability Store::durability() const { return state_->options.durability; }

StoreStats Store::stats() const {
  StoreStats stats = state_->stats;
  stats.items = state_->by_key.size() - state_->open_fills;
  stats.capacity_bytes = state_->geometry.total_bytes();
  if (state_->space == nullptr) return stats;
  stats.data_bytes = state_->space->units() * SpaceMap::kUnitBytes;
  stats.free_bytes = state_->space->free_units() * SpaceMap::kUnitBytes;
  stats.free_256k_bytes = state_->space->free_chunks() * SpaceMap::kChunkBytes;
  return stats;
}

Status Store::register_buffers(std::span<const std::span<std::byte>> ranges) {
  for (const std::unique_ptr<File>& file : state_->segments) {
    KVTIER_RETURN_IF_ERROR(file->register_buffers(ranges));
  }
  return {};
}

bool Store::contains(const StoreKey& key) const {
  const auto found = state_->by_key.find(key);
  return found != state_->by_key.end() &&
         state_->items[found->second].phase == StoreItem::Phase::kLive;
}

std::vector<StoreKey> Store::continuations(const StoreKey& key) const {
  std::vector<StoreKey> keys;
  const auto first = state_->children.find(key);
  if (first == state_->children.end()) return keys;
  for (std::uint32_t i = first->second; i != StoreItem::kNone; i = state_->items[i].next_child) {
    if (state_->items[i].phase == StoreItem::Phase::kLive) keys.push_back(state_->items[i].key);
  }
  return keys;
}

void Store::for_each(const std::function<void(const StoreKey&)>& visit) const {
  for (const StoreItem& item : state_->items) {
    if (item.phase == StoreItem::Phase::kLive) visit(item.key);
  }
}

Status Store::close() {
  State& state = *state_;
  KVTIER_CHECK(!state.closed, "close() was called before");
  KVTIER_CHECK(state.open_fills == 0 && state.open_holds == 0, "close() under {} fills, {} items",
               state.open_fills, state.open_holds);
  state.closed = true;
  Status status;
  if (state.check_writable().ok() && state.options.durability != Durability::kNone) {
    status = state.sync_segments();
    if (status.ok()) status = state.rewrite_index(true);
  }
  const Status closed = state.close_files();
  return status.ok() ? closed : status;
}

StoreFill::StoreFill(StoreFill&& other) noexcept
    : store_(std::exchange(other.store_, nullptr)), index_(other.index_) {}

StoreFill& StoreFill::operator=(StoreFill&& other) noexcept {
  StoreFill moved(std::move(other));
  std::swap(store_, moved.store_);
  std::swap(index_, moved.index_);
  return *this;
}

StoreFill::~StoreFill() {
  if (store_ != nullptr) store_->state_->abandon(index_);
}

StoredItem::StoredItem(StoredItem&& other) noexcept
    : store_(std::exchange(other.store_, nullptr)), index_(other.index_) {}

StoredItem& StoredItem::operator=(StoredItem&& other) noexcept {
  StoredItem moved(std::move(other));
  std::swap(store_, moved.store_);
  std::swap(index_, moved.index_);
  return *this;
}

StoredItem::~StoredItem() {
  if (store_ == nullptr) return;
  Store::State& state = *store_->state_;
  --state.items[index_].holds;
  --state.open_holds;
  state.rank(index_);
}

const StoreKey& StoredItem::key() const { return store_->state_->items[index_].key; }
const StoreKey& StoredItem::parent() const { return store_->state_->items[index_].parent; }
std::uint32_t StoredItem::extent_bytes() const {
  return store_->state_->items[index_].extent_bytes;
}
std::uint64_t StoredItem::layout_fingerprint() const {
  return store_->state_->items[index_].layout_fingerprint;
}

std::uint32_t StoredItem::extents() const {
  const StoreItem& item = store_->state_->items[index_];
  return static_cast<std::uint32_t>(std::count_if(
      item.parts.begin(), item.parts.end(),
      [](const ManifestPart& part) { return part.kind == ManifestPart::Kind::kExtent; }));
}

std::optional<std::uint64_t> StoredItem::blob_bytes(std::uint32_t tag) const {
  std::optional<std::uint64_t> bytes;
  for (const ManifestPart& part : store_->state_->items[index_].parts) {
    if (part.kind == ManifestPart::Kind::kExtent || part.first != tag) continue;
    bytes = bytes.value_or(0) + part.third;
  }
  return bytes;
}

std::vector<std::uint32_t> StoredItem::blob_tags() const {
  std::vector<std::uint32_t> tags;
  for (const ManifestPart& part : store_->state_->items[index_].parts) {
    // Pieces of one blob are neighbours, and each blob has a first one.
    if (part.kind != ManifestPart::Kind::kExtent && part.second == 0) tags.push_back(part.first);
  }
  return tags;
}

std::size_t StoredItem::list_extents(std::span<StoreExtentKey> target) const {
  std::size_t count = 0;
  for (const ManifestPart& part : store_->state_->items[index_].parts) {
    if (part.kind != ManifestPart::Kind::kExtent || count == target.size()) break;
    target[count++] = {LayerIndex{part.first}, HeadGroup{part.second}, part.third};
  }
  return count;
}

}  // namespace kvtier
