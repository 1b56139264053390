#include "memory/check.h"
#include "runtime/host_tier.h"

#include <algorithm>
#include <cstring>

// Of the host tier, what happens to an extent whose tokens end or part ways: it is given up, cut,
// or copied as far as two sequences agree.

namespace kvtier {

void HostTier::release(ExtentId id) {
  if (table_.unshare(id)) return;
  Extent& extent = table_.row(id);
  if (extent.state == HomeState::kWriting) end_write(id);
  if (extent.state == HomeState::kReading) abandon_read(id);
  counters_.end_guess(extent, layout_.extent_bytes(), false);
  table_.release(id);
}

void HostTier::reopen(ExtentId id, std::uint32_t first_cut) {
  Extent& extent = table_.row(id);
  settle_write(id);
  // Without a copy on disk that counts, the frame must stay: kBoth was free to go until now.
  if (extent.state == HomeState::kBoth) table_.hold_frame(id);
  table_.advance(id, HomeEvent::kReopen);
  table_.give_back_place(id);
  // The header may be that of another extent of this layer and head group, read in the place of
  // this one: what it says of damaged blocks is not carried on.
  ExtentHeader header = table_.header(id);
  for (std::uint32_t place = 0; place < extent.sealed; ++place) {
    if (place >= first_cut || table_.is_damaged(layout_.block_id(id, place))) {
      header.clear_entry(place);
    }
  }
  extent.sealed = std::min(extent.sealed, first_cut);
  counters_.end_guess(extent, layout_.extent_bytes(), true);
}

Status HostTier::adopt(ExtentId id) {
  Extent& extent = table_.row(id);
  const ExtentHeader header = table_.header(id);
  KVTIER_RETURN_IF_ERROR(header.verify(extent.owner.layer, extent.owner.head_group));
  const Origin origin = header.entry(0).identity.origin;
  for (std::uint32_t place = 0; place < layout_.blocks_per_extent(); ++place) {
    const ExtentEntry entry = header.entry(place);
    const BlockIdentity expected{origin, extent.owner.layer, extent.owner.head_group,
                                 BlockIndex{extent.owner.first_block.value + place}};
    if (entry.length_bytes != layout_.payload_bytes() || entry.identity != expected) {
      return corrupt(fmt::format("place {} of an extent holds block {}, expected {}", place,
                                 entry.identity.index.value, expected.index.value));
    }
    const BlockId block = layout_.block_id(id, place);
    table_.set_generation(block, entry.generation);
    table_.set_damaged(block, false);
  }
  extent.owner.origin = origin;
  // The store has verified each block whole.
  for (std::uint32_t place = 0; place < layout_.blocks_per_extent(); ++place) {
    const BlockId block = layout_.block_id(id, place);
    if (!table_.keeps_values_checksums()) break;
    table_.set_values_checksum(block, sum_values(block, table_.block_bytes(block).data()));
  }
  extent.sealed = layout_.blocks_per_extent();
  return complete(id);
}

void HostTier::copy_blocks(ExtentId source, ExtentId target, std::uint32_t blocks,
                           Generation generation) {
  for (std::uint32_t place = 0; place < blocks; ++place) {
    const BlockId block = layout_.block_id(target, place);
    std::byte* bytes = table_.block_bytes(block).data();
    table_.set_generation(block, generation);
    const bool intact = copy_block(layout_.block_id(source, place), bytes);
    table_.set_damaged(block, !intact);
    if (intact) set_checksums(block, bytes);
  }
  table_.row(target).sealed = blocks;
}

// From the frame, or, where that has gone bad, from the device.
bool HostTier::copy_block(BlockId source, std::byte* target) {
  if (!table_.is_damaged(source)) {
    std::memcpy(target, table_.block_bytes(source).data(), layout_.block_bytes());
    ++counters_.verification.verified;
    if (check(source, target).ok) return true;
    ++counters_.verification.mismatched;
  }
  if (!map_.has_whole(source)) return false;
  const CopySpan span{
      .source = map_.address(map_.find(source)), .target = target, .bytes = layout_.block_bytes()};
  for (int attempt = 0; attempt < kCopyAttempts; ++attempt) {
    Result<Transfer> transfer =
        engine_.submit({.route = Route::kDeviceToHost, .spans = {&span, 1}});
    if (!transfer.ok() || !transfer->wait().ok()) continue;
    ++counters_.verification.verified;
    if (check(source, target).ok) {
      ++counters_.verification.recovered;
      return true;
    }
    ++counters_.verification.mismatched;
  }
  return false;
}

}  // namespace kvtier
