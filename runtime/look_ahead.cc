#include "runtime/look_ahead.h"

namespace kvtier {

LookAhead::LookAhead(const Parts& parts, std::uint64_t bytes_per_step)
    : layout_(*parts.layout),
      table_(*parts.table),
      map_(*parts.map),
      host_(*parts.host),
      counters_(*parts.counters),
      bytes_per_step_(bytes_per_step) {}

void LookAhead::begin_step(std::uint64_t step) {
  step_ = step;
  bytes_left_ = bytes_per_step_;
  // Half of what can be dropped at most: prediction must not empty the host tier of what was asked
  // for, and with at least as many frames left it cannot drop its own.
  frames_left_ = table_.frames_available() / 2;
}

void LookAhead::promote(std::span<const BlockId> blocks) {
  if (!enabled()) return;
  for (BlockId block : blocks) {
    if (!map_.find(block).is_none()) continue;
    const ExtentId id = layout_.extent_of(block);
    Extent& extent = table_.row(id);
    if (extent.state != HomeState::kDisk) continue;
    if (bytes_left_ < layout_.extent_bytes() || frames_left_ == 0) {
      extent.predicted_step = step_;
      continue;
    }
    // Best effort: an engine that is busy, or a tier that is full, leaves the extent on disk.
    if (!host_.start_read(id, Priority::kPrefetch).ok()) return;
    extent.prefetched = true;
    counters_.prefetch.issued_bytes += layout_.extent_bytes();
    bytes_left_ -= layout_.extent_bytes();
    --frames_left_;
  }
}

void LookAhead::note_demand(ExtentId extent) {
  Extent& row = table_.row(extent);
  // Predictions are made during the step before (for the next layer) or a token ago (the band);
  // what has not been predicted since this extent was last read does not count.
  if (row.predicted_step != 0) ++counters_.prefetch.late;
  row.predicted_step = 0;
}

}  // namespace kvtier
