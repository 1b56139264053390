#include "runtime/runtime.h"
#include "runtime/sequence_state.h"

namespace kvtier {

Status Sequence::resolve(const StepRequest& request, ResolvedBlocks* resolved) {
  (void)request;
  (void)resolved;
  return unsupported("slots cannot be resolved yet");
}

SequenceStats Sequence::stats() const {
  const State& s = *state_;
  const Runtime::State& runtime = s.runtime;
  SequenceStats stats;
  for (const Stream& stream : s.streams) {
    const std::uint32_t sealed = stream.tokens / runtime.layout.tokens_per_block();
    const std::uint32_t blocks = sealed + (stream.tail.is_none() ? 0 : 1);
    stats.blocks += blocks;
    for (std::uint32_t i = 0; i < blocks; ++i) {
      const ResidencyState state = runtime.map->state(s.block_id(stream, BlockIndex{i}));
      if (state == ResidencyState::kResident || state == ResidencyState::kOpen) {
        ++stats.blocks_resident;
      }
    }
    for (const ExtentId id : stream.extents) {
      const Extent& extent = runtime.table->row(id);
      const std::uint64_t bytes = runtime.layout.extent_bytes();
      if (!extent.frame.is_none()) stats.host_bytes += bytes;
      if (!extent.place.is_none()) stats.disk_bytes += bytes;
      if (runtime.table->is_shared(id)) stats.shared_bytes += bytes;
    }
  }
  stats.device_bytes = stats.blocks_resident * runtime.layout.block_bytes();
  for (const auto& selector : s.selectors) stats.metadata_bytes += selector->metadata_bytes();
  return stats;
}

}  // namespace kvtier
