#include "runtime/host_tier.h"

#include "memory/check.h"

#include <algorithm>

namespace kvtier {

HostTier::HostTier(const Parts& parts)
    : layout_(*parts.layout),
      table_(*parts.table),
      map_(*parts.map),
      engine_(*parts.engine),
      clock_(*parts.clock),
      verify_(parts.verify),
      counters_(*parts.counters),
      reading_frames_(parts.reading_frames) {
  seals_.reserve(kSealsMax);
  seal_spans_.reserve(kSealsMax);
}

// --- Room.

Status HostTier::make_room() {
  while (table_.frames_used() == table_.frames()) {
    const std::optional<ExtentId> victim = table_.choose_victim();
    if (!victim) return out_of_frames();
    Extent& extent = table_.row(*victim);
    if (extent.state == HomeState::kWriting) end_write(*victim);
    if (extent.state == HomeState::kHost) {
      table_.keep(*victim);
      continue;
    }
    drop(*victim);
  }
  return {};
}

Status HostTier::out_of_frames() const {
  if (!disk_full_.ok()) return disk_full_;
  const std::string frames = fmt::format(
      "{} of {} host frames hold extents that have no copy on disk, {} are kept for reading",
      table_.frames() - table_.frames_available(), table_.frames(), reading_frames_);
  if (!write_failure_.ok()) {
    return no_space(fmt::format("{}; {} writes to disk failed, the first with: {}", frames,
                                counters_.disk_writes_failed, write_failure_.message()));
  }
  return no_space(fmt::format(
      "{}, and {} of {} places on disk are taken; give the host or disk tier more capacity", frames,
      table_.places_used(), table_.places()));
}

void HostTier::drop(ExtentId id) {
  Extent& extent = table_.row(id);
  if (extent.state == HomeState::kReading) {
    abandon_read(id);
  } else {
    table_.advance(id, HomeEvent::kDropFrame);
  }
  counters_.end_guess(extent, layout_.extent_bytes(), false);
  table_.detach_frame(id);
  ++counters_.host_evictions;
}

// A transfer of the disk that something waits for is no longer in the background.
Status HostTier::wait_for(Transfer& transfer) {
  transfer.raise(Priority::kDemand);
  const Duration start = clock_.now();
  Status status = transfer.wait();
  counters_.disk_wait += clock_.now() - start;
  return status;
}

// Not cancelled: whether a cancellation comes in time depends on timing, and what a file has seen
// must not (a faulty one counts its uses).
void HostTier::abandon_read(ExtentId id) {
  (void)wait_for(table_.row(id).transfer);  // Whatever came of it is not wanted any more.
  table_.advance(id, HomeEvent::kReadFailed);
}

void HostTier::end_write(ExtentId id) {
  Extent& extent = table_.row(id);
  Status written = wait_for(extent.transfer);
  for (int attempt = 1;
       !written.ok() && written.code() != StatusCode::kNoSpace && attempt < kWriteAttempts;
       ++attempt) {
    table_.change_place(id);
    written = submit_write(id);
    if (written.ok()) written = wait_for(extent.transfer);
  }
  if (written.ok()) {
    table_.advance(id, HomeEvent::kWriteDone);
    return;
  }
  // The frame stays the only home: the data is safe, but the tier below is not what it should be.
  table_.advance(id, HomeEvent::kWriteFailed);
  table_.give_back_place(id);
  ++counters_.disk_writes_failed;
  if (write_failure_.ok()) write_failure_ = written;
  if (disk_full_.ok() && written.code() == StatusCode::kNoSpace) disk_full_ = written;
}

void HostTier::settle_write(ExtentId id) {
  if (table_.row(id).state != HomeState::kWriting) return;
  end_write(id);
  if (table_.row(id).state == HomeState::kHost) table_.hold_frame(id);
}

// --- Writing through.

Result<ExtentId> HostTier::create(const ExtentOwner& owner) {
  if (table_.frames_available() <= reading_frames_) return out_of_frames();
  return create_for_cut(owner);
}

Result<ExtentId> HostTier::create_for_cut(const ExtentOwner& owner) {
  KVTIER_RETURN_IF_ERROR(make_room());
  const std::optional<FrameId> frame = table_.take_free_frame();
  KVTIER_CHECK(frame.has_value(), "room was made and none is there");
  const std::optional<ExtentId> id = table_.create(owner, *frame);
  KVTIER_CHECK(id.has_value(), "a frame without a row");
  return *id;
}

Status HostTier::write_through(BlockId id, SlotId slot) {
  if (seals_.size() == kSealsMax) {
    const Status settled = settle();
    // Nothing is known of this block's bytes in the frame.
    if (!settled.ok()) table_.set_damaged(id, true);
    KVTIER_RETURN_IF_ERROR(settled);
  }
  set_checksums(id, map_.address(slot));
  table_.set_damaged(id, false);
  map_.hold(slot);
  seals_.push_back({id, slot});
  seal_spans_.push_back({.source = map_.address(slot),
                         .target = table_.block_bytes(id).data(),
                         .bytes = layout_.block_bytes()});
  return {};
}

Status HostTier::copy_seals() {
  if (seal_spans_.empty()) return {};
  KVTIER_ASSIGN_OR_RETURN(Transfer transfer,
                          engine_.submit({.route = Route::kDeviceToHost, .spans = seal_spans_}));
  return transfer.wait();
}

Status HostTier::settle() {
  Status status;
  for (int attempt = 0; attempt < kCopyAttempts && !seals_.empty(); ++attempt) {
    status = copy_seals();
    if (status.code() == StatusCode::kCancelled || status.code() == StatusCode::kBusy) break;
    // What arrived intact is settled; the rest is copied again.
    std::size_t kept = 0;
    for (std::size_t i = 0; i < seals_.size(); ++i) {
      BlockCheck checked;
      if (status.ok() && verify_ == VerifyMode::kAll) {
        checked = check(seals_[i].block, seal_spans_[i].target);
        ++counters_.verification.verified;
        if (!checked.ok) ++counters_.verification.mismatched;
      }
      if (status.ok() && checked.ok) {
        if (attempt > 0) ++counters_.verification.recovered;
        map_.unhold(seals_[i].slot);
        continue;
      }
      seals_[kept] = seals_[i];
      seal_spans_[kept++] = seal_spans_[i];
    }
    seals_.resize(kept);
    seal_spans_.resize(kept);
  }
  if (seals_.empty()) return {};
  const BlockId lost = seals_.front().block;
  counters_.verification.failed += seals_.size();
  for (const Seal& seal : seals_) {
    table_.set_damaged(seal.block, true);
    map_.unhold(seal.slot);
  }
  seals_.clear();
  seal_spans_.clear();
  if (!status.ok()) return status;
  return corrupt(describe(lost, Tier::kHost, StatusCode::kCorrupt,
                          check(lost, table_.block_bytes(lost).data()),
                          "damaged on the way from the device")
                     .message);
}

Status HostTier::complete(ExtentId id) {
  // What did not reach the frame is marked, and found again when it is read; the extent goes its
  // way all the same, or its frame would never be free.
  const Status settled = settle();
  table_.advance(id, HomeEvent::kComplete);
  if (!table_.take_place(id)) return settled;
  if (verify_ == VerifyMode::kAll) {
    for (std::uint32_t place = 0; place < layout_.blocks_per_extent(); ++place) {
      const BlockId block = layout_.block_id(id, place);
      const BlockCheck checked = check(block, table_.block_bytes(block).data());
      ++counters_.verification.verified;
      if (checked.ok) continue;
      ++counters_.verification.mismatched;
      table_.set_damaged(block, true);
    }
  }
  table_.header(id).seal();
  const Status submitted = submit_write(id);
  if (!submitted.ok()) {
    table_.give_back_place(id);
    return submitted;
  }
  table_.advance(id, HomeEvent::kStartWrite);
  table_.unhold_frame(id);
  return settled.ok() ? disk_full_ : settled;
}

Status HostTier::submit_write(ExtentId id) {
  Extent& extent = table_.row(id);
  KVTIER_ASSIGN_OR_RETURN(extent.transfer,
                          engine_.submit({.route = Route::kHostToDisk,
                                          .priority = Priority::kWriteBack,
                                          .offset = table_.disk_offset(id),
                                          .buffer = table_.frame_bytes(extent.frame)}));
  return {};
}

// --- Reading.

Status HostTier::submit_read(ExtentId id, Priority priority) {
  Extent& extent = table_.row(id);
  KVTIER_ASSIGN_OR_RETURN(extent.transfer,
                          engine_.submit({.route = Route::kDiskToHost,
                                          .priority = priority,
                                          .offset = table_.disk_offset(id),
                                          .buffer = table_.frame_bytes(extent.frame)}));
  return {};
}

Status HostTier::start_read(ExtentId id, Priority priority, Admission why) {
  Extent& extent = table_.row(id);
  if (extent.state == HomeState::kBoth) {
    // Damaged in its frame: read over it.
    table_.advance(id, HomeEvent::kDropFrame);
  } else {
    KVTIER_RETURN_IF_ERROR(make_room());
    const std::optional<FrameId> frame = table_.take_free_frame();
    KVTIER_CHECK(frame.has_value(), "room was made and none is there");
    table_.admit(id, *frame, why);
  }
  table_.advance(id, HomeEvent::kStartRead);
  const Status submitted = submit_read(id, priority);
  if (submitted.ok()) return {};
  table_.advance(id, HomeEvent::kReadFailed);
  table_.lose_frame(id);
  return submitted;
}

Status HostTier::verify_arrival(ExtentId id) {
  if (verify_ == VerifyMode::kNone) return {};
  const Extent& extent = table_.row(id);
  const Status header = table_.header(id).verify(extent.owner.layer, extent.owner.head_group);
  if (!header.ok()) {
    counters_.verification.mismatched += extent.sealed;
    return header;
  }
  for (std::uint32_t place = 0; place < extent.sealed; ++place) {
    const BlockId block = layout_.block_id(id, place);
    const bool ok = check(block, table_.block_bytes(block).data()).ok;
    ++counters_.verification.verified;
    table_.set_damaged(block, !ok);
    if (ok) continue;
    ++counters_.verification.mismatched;
    repair_from_device(block);
  }
  return {};
}

// A damaged block that the device still has is copied back from there: the one case in which a
// cache outlives its home.
void HostTier::repair_from_device(BlockId id) {
  if (!map_.has_whole(id)) return;
  const std::byte* copy = map_.address(map_.find(id));
  if (!check(id, copy).ok) return;
  const CopySpan span{
      .source = copy, .target = table_.block_bytes(id).data(), .bytes = layout_.block_bytes()};
  Result<Transfer> transfer = engine_.submit({.route = Route::kDeviceToHost, .spans = {&span, 1}});
  if (!transfer.ok() || !transfer->wait().ok() || !check(id, span.target).ok) return;
  table_.set_damaged(id, false);
  ++counters_.verification.recovered;
}

std::uint32_t HostTier::count_damaged(std::span<const BlockId> wanted) const {
  return static_cast<std::uint32_t>(std::count_if(
      wanted.begin(), wanted.end(), [this](BlockId id) { return table_.is_damaged(id); }));
}

void HostTier::finish_read(ExtentId id, std::span<const BlockId> wanted,
                           std::vector<BlockFailure>& failures) {
  Extent& extent = table_.row(id);
  std::uint32_t worst = 0;
  Status status;
  for (int attempt = 1;; ++attempt) {
    const TransferState state = extent.transfer.poll();
    if (state == TransferState::kQueued || state == TransferState::kInFlight) ++counters_.waits;
    status = wait_for(extent.transfer);
    if (status.ok()) status = verify_arrival(id);
    const auto damaged =
        status.ok() ? count_damaged(wanted) : static_cast<std::uint32_t>(wanted.size());
    worst = std::max(worst, damaged);
    if (status.ok() && damaged == 0) {
      counters_.verification.recovered += worst;
      break;
    }
    if (attempt == kReadAttempts) break;
    ++counters_.disk_reads_repeated;
    const Status submitted = submit_read(id, Priority::kDemand);
    if (!submitted.ok()) {
      status = submitted;
      break;
    }
  }
  if (!status.ok()) {
    give_up(id, wanted, status, failures);
    return;
  }
  table_.advance(id, HomeEvent::kReadDone);
  const std::uint32_t left = count_damaged(wanted);
  counters_.verification.recovered += left == 0 ? 0 : worst - left;
  for (BlockId block : wanted) {
    if (!table_.is_damaged(block)) continue;
    ++counters_.verification.failed;
    failures.push_back(describe(block, Tier::kDisk, StatusCode::kCorrupt,
                                check(block, table_.block_bytes(block).data()),
                                "no other tier holds it"));
  }
}

void HostTier::give_up(ExtentId id, std::span<const BlockId> wanted, const Status& status,
                       std::vector<BlockFailure>& failures) {
  for (BlockId block : wanted) {
    ++counters_.verification.failed;
    failures.push_back(describe(block, Tier::kDisk, status.code(), {}, status.message()));
  }
  table_.advance(id, HomeEvent::kReadFailed);
  table_.lose_frame(id);
}

}  // namespace kvtier
