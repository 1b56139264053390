// Items leave: eviction, references, erasing. Places are moved together.

#include "transfer/store.h"
#include "transfer/store_state.h"

#include <algorithm>
#include <cmath>

namespace kvtier {

// Writes zeros over the first page of each manifest, so that a rebuild does not find it. Best
// effort: what is found all the same is verified like everything else, and loses its places to
// whoever was written later. The zeros are in the last place of the staging memory, since the first
// may hold a manifest that is about to be written.
void Store::State::zero_manifests(std::span<const std::uint32_t> victims) {
  const std::span<std::byte> zeros = staged(kStagedPlaces - 1).first(SegmentHeader::kBytes);
  std::fill(zeros.begin(), zeros.end(), std::byte{0});
  operations.clear();
  for (const std::uint32_t victim : victims) {
    operations.push_back(operation(FileOperation::Kind::kWrite, items[victim].unit, zeros, victim));
    dirty[operations.back().file] = true;
  }
  io->run(operations, [&](StoreOperation& done) { stats.write_failures += !done.io.status.ok(); });
}

Status Store::State::drop(std::span<const std::uint32_t> victims) {
  std::vector<IndexRecord> records;
  for (const std::uint32_t victim : victims) {
    records.push_back(record_of(items[victim], IndexRecord::Kind::kErase));
  }
  KVTIER_RETURN_IF_ERROR(append(records));
  if (logged()) zero_manifests(victims);
  for (const std::uint32_t victim : victims) {
    unrank(victim);
    give_back_places(items[victim]);
    free_item(victim);
  }
  return {};
}

// Drops the least valuable items until at least so many units more are free. One item at least.
Status Store::State::evict(std::uint64_t units_wanted) {
  while (true) {
    std::vector<std::uint32_t> victims;
    std::uint64_t units = 0;
    for (auto it = ranks.begin(); it != ranks.end() && units < units_wanted; ++it) {
      victims.push_back(it->item);
      units += units_of(items[it->item]);
    }
    if (victims.empty()) {
      return no_space(fmt::format(
          "{}: {} B wanted, {} B of {} B free, and what is stored is held, being written or "
          "continued by what is",
          directory->name(), units_wanted * SpaceMap::kUnitBytes,
          space->free_units() * SpaceMap::kUnitBytes, space->units() * SpaceMap::kUnitBytes));
    }
    for (const std::uint32_t victim : victims) {
      stats.evicted_items += 1;
      KVTIER_CHECK(is_evictable(items[victim]), "item {} is in use", victim);
    }
    KVTIER_RETURN_IF_ERROR(drop(victims));
    if (units >= units_wanted) return {};
    // What these items continued may go next.
    units_wanted -= units;
  }
}

Status Store::set_value(const StoreKey& key, double value) {
  if (std::isnan(value)) return invalid_argument("an item of which the value is NaN");
  if (!contains(key)) return not_found(fmt::format("item {}", key.short_text()));
  const std::uint32_t index = state_->by_key.at(key);
  state_->unrank(index);
  state_->items[index].value = value;
  state_->rank(index);
  return {};
}

Status Store::add_reference(const StoreKey& key) {
  State& state = *state_;
  KVTIER_RETURN_IF_ERROR(state.check_writable());
  if (!contains(key)) return not_found(fmt::format("item {}", key.short_text()));
  StoreItem& item = state.items[state.by_key.at(key)];
  ++item.references;
  const IndexRecord record = state.record_of(item, IndexRecord::Kind::kReferences);
  Status status = state.append({&record, 1});
  if (status.ok() && state.options.durability == Durability::kPower) status = state.index->sync();
  if (!status.ok()) --item.references;
  return status;
}

Status Store::drop_reference(const StoreKey& key) {
  State& state = *state_;
  KVTIER_RETURN_IF_ERROR(state.check_writable());
  if (!contains(key)) return not_found(fmt::format("item {}", key.short_text()));
  std::uint32_t index = state.by_key.at(key);
  const std::uint32_t before = state.items[index].references;
  state.items[index].references = before > 0 ? before - 1 : 0;
  const IndexRecord record = state.record_of(state.items[index], IndexRecord::Kind::kReferences);
  if (Status status = state.append({&record, 1}); !status.ok()) {
    // Whoever is told of a failure tries again: that must not cost another's reference.
    state.items[index].references = before;
    return status;
  }
  while (state.items[index].references == 0 && state.is_evictable(state.items[index])) {
    const StoreKey parent = state.items[index].parent;
    KVTIER_RETURN_IF_ERROR(state.drop({&index, 1}));
    ++state.stats.erased_items;
    if (!contains(parent)) break;
    index = state.by_key.at(parent);
  }
  if (state.options.durability != Durability::kPower) return {};
  KVTIER_RETURN_IF_ERROR(state.sync_segments());
  return state.index->sync();
}

Status Store::erase(const StoreKey& key) {
  State& state = *state_;
  KVTIER_RETURN_IF_ERROR(state.check_writable());
  if (!contains(key)) return not_found(fmt::format("item {}", key.short_text()));
  const std::uint32_t index = state.by_key.at(key);
  if (state.items[index].holds > 0) {
    return busy(
        fmt::format("item {} is held {} times", key.short_text(), state.items[index].holds));
  }
  KVTIER_RETURN_IF_ERROR(state.drop({&index, 1}));
  ++state.stats.erased_items;
  if (state.options.durability != Durability::kPower) return {};
  KVTIER_RETURN_IF_ERROR(state.sync_segments());
  return state.index->sync();
}

// The item's bytes at the source are copied to the target, and the item gets a manifest that says
// so; until the index lists that one, the old manifest and the old place are as they were.
Status Store::State::move_place(std::uint32_t index, const SpaceMap::Move& move) {
  StoreItem& item = items[index];
  const std::uint32_t old_unit = item.unit;
  std::uint32_t new_unit = 0;
  const bool is_manifest = old_unit == move.source;
  std::span<const std::byte> manifest;
  if (!is_manifest) {
    const std::optional<std::uint32_t> place = space->take(item.units);
    if (!place) return no_space("no place for the manifest");
    new_unit = *place;
    const std::span<std::byte> bytes = staged(1).first(move.units * SpaceMap::kUnitBytes);
    Status status = read_place(move.source, bytes);
    if (status.ok()) status = write_place(move.target, bytes);
    if (!status.ok()) {
      space->give_back(new_unit, item.units);
      return status;
    }
  } else {
    new_unit = move.target;
  }
  Status status = read_manifest(item, manifest);
  StoreItem moved = item;
  if (status.ok()) {
    for (ManifestPart& part : moved.parts) {
      if (part.units > 0 && part.unit == move.source) part.unit = move.target;
    }
    moved.unit = new_unit;
    moved.number = next_number++;
    const ManifestHeader header = {.store = id,
                                   .number = moved.number,
                                   .layout_fingerprint = moved.layout_fingerprint,
                                   .key = moved.key,
                                   .parent = moved.parent,
                                   .extent_bytes = moved.extent_bytes,
                                   .parts = static_cast<std::uint32_t>(moved.parts.size()),
                                   .bytes = moved.manifest_bytes};
    // Inline blobs stand where they stood: only a unit number in the parts has changed.
    const std::span<std::byte> bytes = staged(0).first(moved.manifest_bytes);
    encode_manifest(header, moved.parts, bytes);
    moved.manifest = manifest_checksum(bytes);
    const std::size_t pages = (bytes.size() + SegmentHeader::kBytes - 1) / SegmentHeader::kBytes;
    status = write_place(new_unit, staged(0).first(pages * SegmentHeader::kBytes));
  }
  if (status.ok() && options.durability == Durability::kPower) status = sync_segments();
  if (status.ok()) {
    const IndexRecord record = record_of(moved, IndexRecord::Kind::kPut);
    status = append({&record, 1});
  }
  if (status.ok() && options.durability == Durability::kPower) status = index_file->sync();
  if (!status.ok()) {
    if (!is_manifest) space->give_back(new_unit, item.units);
    return status;
  }
  if (logged()) zero_manifests({&index, 1});
  items[index] = std::move(moved);
  space->give_back(old_unit, items[index].units);
  if (!is_manifest) space->give_back(move.source, move.units);
  return {};
}

Result<std::uint32_t> Store::defragment(std::uint32_t moves_max) {
  State& state = *state_;
  KVTIER_RETURN_IF_ERROR(state.check_writable());
  std::unordered_map<std::uint32_t, std::uint32_t> owners;
  for (std::uint32_t i = 0; i < state.items.size(); ++i) {
    const StoreItem& item = state.items[i];
    if (item.phase != StoreItem::Phase::kLive) continue;
    if (item.units > 0) owners[item.unit] = i;
    for (const ManifestPart& part : item.parts) {
      if (part.units > 0) owners[part.unit] = i;
    }
  }
  std::uint32_t moves = 0;
  while (moves < moves_max) {
    const std::optional<SpaceMap::Move> move = state.space->propose_move();
    if (!move) break;
    const auto owner = owners.find(move->source);
    // A place of a fill stays where it is being written.
    Status status = owner == owners.end() ? busy("being written") : Status();
    const std::uint32_t old_manifest = owner == owners.end() ? 0 : state.items[owner->second].unit;
    if (status.ok()) status = state.move_place(owner->second, *move);
    if (!status.ok()) {
      state.space->give_back(move->target, move->units);
      if (status.code() == StatusCode::kBusy || status.code() == StatusCode::kNoSpace) break;
      return status;
    }
    const std::uint32_t index = owner->second;
    owners.erase(old_manifest);
    owners.erase(move->source);
    owners[move->target] = index;
    owners[state.items[index].unit] = index;
    ++moves;
  }
  return moves;
}

}  // namespace kvtier
