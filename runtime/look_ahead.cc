#include "runtime/look_ahead.h"

#include "selectors/eviction_policy.h"

#include <algorithm>

namespace kvtier {

LookAhead::LookAhead(const Parts& parts, const Limits& limits)
    : layout_(*parts.layout),
      table_(*parts.table),
      map_(*parts.map),
      host_(*parts.host),
      counters_(*parts.counters),
      limits_(limits),
      blocks_considered_(enabled() ? table_.rows() : 0) {
  considered_.reserve(blocks_considered_.size());
}

void LookAhead::begin_step(std::uint64_t step) {
  step_ = step;
  bytes_left_ = limits_.bytes_per_step;
  // What is promoted now shall still be there when the step comes that it is for.
  frames_left_ = std::max(1u, table_.frames_available() / (kPredictedShare * limits_.steps_ahead));
}

void LookAhead::consider(std::span<const BlockId> blocks) {
  for (BlockId block : blocks) {
    if (!map_.find(block).is_none()) continue;
    const ExtentId id = layout_.extent_of(block);
    if (table_.row(id).state != HomeState::kDisk) continue;
    if (blocks_considered_[id.value]++ == 0) considered_.push_back(id);
  }
}

void LookAhead::promote() {
  std::ranges::sort(considered_, [this](ExtentId a, ExtentId b) {
    const std::uint32_t of_a = blocks_considered_[a.value];
    const std::uint32_t of_b = blocks_considered_[b.value];
    return of_a != of_b ? of_a > of_b : a < b;
  });
  bool going_on = true;
  for (ExtentId id : considered_) {
    blocks_considered_[id.value] = 0;
    going_on = going_on && promote(id);
  }
  considered_.clear();
}

// Best effort: an engine that is busy, or a tier that is full, leaves this extent and the rest
// where they are.
bool LookAhead::promote(ExtentId id) {
  Extent& extent = table_.row(id);
  if (bytes_left_ < layout_.extent_bytes() || frames_left_ == 0) {
    extent.predicted_step = step_;
    return true;
  }
  if (!host_.start_read(id, Priority::kPrefetch, Admission::kPredicted).ok()) return false;
  extent.prefetched = true;
  extent.predicted_step = 0;
  counters_.prefetch.issued_bytes += layout_.extent_bytes();
  bytes_left_ -= layout_.extent_bytes();
  --frames_left_;
  return true;
}

void LookAhead::note_demand(ExtentId extent) {
  Extent& row = table_.row(extent);
  // Predictions are made during the step before (for the next layer) or a token ago (the band).
  if (row.predicted_step != 0 && row.predicted_step + limits_.steps_ahead >= step_) {
    ++counters_.prefetch.late;
  }
  row.predicted_step = 0;
}

}  // namespace kvtier
