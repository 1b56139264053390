#include "runtime/wave_fetch.h"

#include "memory/check.h"

#include <algorithm>

namespace kvtier {

WaveFetch::WaveFetch(const Parts& parts, std::uint32_t misses_max)
    : layout_(*parts.layout),
      table_(*parts.table),
      map_(*parts.map),
      host_(*parts.host),
      engine_(*parts.engine),
      verify_(parts.verify),
      counters_(*parts.counters) {
  misses_.reserve(misses_max);
  spans_.reserve(misses_max);
  miss_of_span_.reserve(misses_max);
  wanted_.reserve(layout_.blocks_per_extent());
  reads_.reserve(table_.frames());
  held_frames_.reserve(table_.frames());
  copies_.reserve(table_.frames() + 1);
}

bool WaveFetch::has_frame_for(ExtentId extent, std::uint32_t spoken_for) const {
  if (!misses_.empty() && layout_.extent_of(misses_.back().block) == extent) return true;
  const bool taken = !table_.row(extent).frame.is_none() && table_.is_held(extent);
  return taken || table_.frames_available() > frames_planned_ + spoken_for;
}

// --- Planning.

Tier WaveFetch::add(const Miss& miss) {
  const ExtentId extent = layout_.extent_of(miss.block);
  const auto index = static_cast<std::uint32_t>(misses_.size());
  const bool same = !misses_.empty() && layout_.extent_of(misses_.back().block) == extent;
  KVTIER_CHECK(misses_.size() < misses_.capacity(), "{} misses in one wave", misses_.size());
  misses_.push_back(miss);
  if (!same) return add_extent(extent, index);
  if (!reads_.empty() && reads_.back().extent == extent) {
    ++reads_.back().misses;
    return reads_.back().started ? Tier::kHost : Tier::kDisk;
  }
  add_span(index);
  return Tier::kHost;
}

Tier WaveFetch::add_extent(ExtentId extent, std::uint32_t miss) {
  Extent& row = table_.row(extent);
  if (!row.frame.is_none()) {
    table_.hold_frame(extent);
    held_frames_.push_back(extent);
    if (why_ != Admission::kStreamed) table_.touch(extent);
    counters_.end_guess(row, layout_.extent_bytes(), true);
    if (is_in_frame(row.state) && table_.has_damage(extent)) host_.settle_write(extent);
  }
  const bool read_over = row.state == HomeState::kBoth && table_.has_damage(extent);
  if (is_in_frame(row.state) && !read_over) {
    add_span(miss);
    return Tier::kHost;
  }
  const bool started = row.state == HomeState::kReading;
  if (row.state == HomeState::kDisk) ++frames_planned_;
  reads_.push_back({.extent = extent, .first_miss = miss, .misses = 1, .started = started});
  return started ? Tier::kHost : Tier::kDisk;
}

void WaveFetch::add_span(std::uint32_t miss) {
  // Damage that could not be read over stays behind: `finish` refuses misses without a span.
  const Miss& wanted = misses_[miss];
  if (table_.is_damaged(wanted.block)) return;
  const std::size_t begin = wanted.part == BlockPart::kValues ? layout_.key_bytes() : 0;
  const std::size_t end =
      wanted.part == BlockPart::kKeys ? layout_.key_bytes() : layout_.block_bytes();
  spans_.push_back({.source = table_.block_bytes(wanted.block).data() + begin,
                    .target = map_.address(wanted.slot) + begin,
                    .bytes = end - begin});
  miss_of_span_.push_back(miss);
}

// --- Moving.

void WaveFetch::begin() {
  for (Arrival& arrival : reads_) {
    if (arrival.started) {
      host_.hasten_read(arrival.extent);
      continue;
    }
    const bool had_frame = !table_.row(arrival.extent).frame.is_none();
    arrival.status = host_.start_read(arrival.extent, Priority::kDemand,
                                      why_ == Admission::kStreamed ? why_ : Admission::kUsed);
    if (!arrival.status.ok() || had_frame) continue;
    table_.hold_frame(arrival.extent);
    held_frames_.push_back(arrival.extent);
  }
  frames_planned_ = 0;
  submit_copies();
}

void WaveFetch::submit_copies() {
  const auto spans = static_cast<std::uint32_t>(spans_.size());
  if (spans == spans_submitted_) return;
  Copy copy{
      .transfer = {},
      .first_span = spans_submitted_,
      .spans = spans - spans_submitted_,
  };
  Result<Transfer> transfer =
      engine_.submit({.route = Route::kHostToDevice,
                      .spans = std::span<const CopySpan>(spans_).subspan(spans_submitted_)});
  if (transfer.ok()) {
    copy.transfer = std::move(*transfer);
  } else {
    copy.status = transfer.status();
  }
  copies_.push_back(std::move(copy));
  spans_submitted_ = spans;
}

void WaveFetch::finish_reads(std::vector<BlockFailure>& failures) {
  for (const Arrival& arrival : reads_) {
    wanted_.clear();
    for (std::uint32_t i = 0; i < arrival.misses; ++i) {
      wanted_.push_back(misses_[arrival.first_miss + i].block);
    }
    if (!arrival.status.ok()) {
      for (BlockId block : wanted_) {
        ++counters_.verification.failed;
        failures.push_back(host_.describe(block, Tier::kDisk, arrival.status.code(), {},
                                          arrival.status.message()));
      }
      continue;
    }
    host_.finish_read(arrival.extent, wanted_, failures);
    if (!is_in_frame(table_.row(arrival.extent).state)) continue;
    for (std::uint32_t i = 0; i < arrival.misses; ++i) add_span(arrival.first_miss + i);
    submit_copies();
  }
}

void WaveFetch::finish(std::vector<BlockFailure>& failures) {
  finish_reads(failures);
  // Every copy ends before any is judged: reading an extent again must not meet a gather from it.
  for (Copy& copy : copies_) {
    if (!copy.transfer) continue;
    const TransferState state = copy.transfer.poll();
    if (state == TransferState::kQueued || state == TransferState::kInFlight) ++counters_.waits;
    copy.status = copy.transfer.wait();
  }
  for (const Copy& copy : copies_) {
    for (std::uint32_t span = copy.first_span; span < copy.first_span + copy.spans; ++span) {
      finish_copy(span, copy.status.ok(), failures);
    }
  }
  last_check_ = {};
  for (const Miss& miss : misses_) {
    const bool missing = miss.part == BlockPart::kKeys
                             ? !map_.is_whole(miss.slot)
                             : map_.state(miss.block) == ResidencyState::kArriving;
    if (missing) refuse(miss, Tier::kHost, failures);
  }
  for (ExtentId extent : held_frames_) {
    if (!table_.row(extent).frame.is_none()) table_.unhold_frame(extent);
  }
  misses_.clear();
  reads_.clear();
  held_frames_.clear();
  spans_.clear();
  miss_of_span_.clear();
  copies_.clear();
  spans_submitted_ = 0;
}

// --- Judging.

void WaveFetch::finish_copy(std::uint32_t span, bool moved, std::vector<BlockFailure>& failures) {
  const Miss& miss = misses_[miss_of_span_[span]];
  last_check_ = {};
  bool intact = moved && is_intact(span);
  int attempt = 1;
  for (; !intact && attempt < HostTier::kCopyAttempts; ++attempt) intact = copy_again(span);
  const std::size_t failures_before = failures.size();
  if (!intact && read_again(miss.block, failures)) intact = copy_again(span);
  if (intact) {
    if (attempt > 1) ++counters_.verification.recovered;
    settle(miss);
    return;
  }
  if (failures.size() == failures_before) {
    refuse(miss, Tier::kHost, failures);
  } else {
    give_up(miss);
  }
}

void WaveFetch::settle(const Miss& miss) {
  if (miss.part == BlockPart::kKeys) {
    map_.complete(miss.slot);
  } else {
    map_.arrive(miss.slot, why_);
  }
}

// Without its keys a block is what it was before they were wanted.
void WaveFetch::give_up(const Miss& miss) {
  if (miss.part != BlockPart::kKeys) map_.fail(miss.slot);
}

bool WaveFetch::is_intact(std::uint32_t span) {
  if (verify_ != VerifyMode::kAll) return true;
  ++counters_.verification.verified;
  const Miss& miss = misses_[miss_of_span_[span]];
  const std::byte* arrived = map_.address(miss.slot);
  const BlockCheck checked = miss.part == BlockPart::kValues
                                 ? host_.check_values(miss.block, arrived)
                                 : host_.check(miss.block, arrived);
  if (checked.ok) return true;
  ++counters_.verification.mismatched;
  last_check_ = checked;
  return false;
}

bool WaveFetch::copy_again(std::uint32_t span) {
  Result<Transfer> transfer =
      engine_.submit({.route = Route::kHostToDevice, .spans = {&spans_[span], 1}});
  return transfer.ok() && transfer->wait().ok() && is_intact(span);
}

// The frame's own copy may have gone bad; where the disk has another, it replaces the frame's.
bool WaveFetch::read_again(BlockId block, std::vector<BlockFailure>& failures) {
  const ExtentId extent = layout_.extent_of(block);
  host_.settle_write(extent);
  if (table_.row(extent).state != HomeState::kBoth) return false;
  if (host_.check(block, table_.block_bytes(block).data()).ok) return false;
  if (!host_.start_read(extent, Priority::kDemand).ok()) return false;
  host_.finish_read(extent, {&block, 1}, failures);
  return is_in_frame(table_.row(extent).state) && !table_.is_damaged(block);
}

void WaveFetch::refuse(const Miss& miss, Tier tier, std::vector<BlockFailure>& failures) {
  const ExtentId extent = layout_.extent_of(miss.block);
  const bool named = std::any_of(failures.begin(), failures.end(), [&](const BlockFailure& known) {
    return known.identity == table_.identity(miss.block);
  });
  if (!named) {
    ++counters_.verification.failed;
    // What arrived last, or, where nothing set out, what stands in the frame.
    BlockCheck checked = last_check_;
    if (checked.ok && is_in_frame(table_.row(extent).state)) {
      checked = host_.check(miss.block, table_.block_bytes(miss.block).data());
    }
    failures.push_back(host_.describe(miss.block, tier, StatusCode::kCorrupt, checked,
                                      "no intact copy reached the device"));
  }
  give_up(miss);
}

}  // namespace kvtier
