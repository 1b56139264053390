#pragma once

#include "runtime/block_table.h"
#include "runtime/device_map.h"
#include "runtime/host_tier.h"
#include "runtime/look_ahead.h"
#include "runtime/runtime.h"
#include "runtime/wave_fetch.h"
#include "transfer/transfer_engine.h"

#include <algorithm>
#include <array>
#include <memory>
#include <vector>

namespace kvtier {

/// Blocks that are attended together in one piece when results must not depend on residency.
inline std::uint32_t blocks_per_chunk(const BlockLayout& layout) {
  return std::max(1u, kAttentionTileTokens / layout.tokens_per_block());
}

/// What a runtime owns, in order of dependence. Private to runtime/.
struct Runtime::State {
  RuntimeOptions options;
  Environment environment;
  BlockLayout layout;
  SelectorShape selector_shape;
  Region slab;
  Region frames;
  std::unique_ptr<TransferEngine> engine;
  MoverCounters counters{};
  std::unique_ptr<BlockTable> table{};
  std::unique_ptr<DeviceMap> map{};
  std::unique_ptr<HostTier> host{};
  std::unique_ptr<DeviceGuesses> device_guesses{};
  std::unique_ptr<LookAhead> look_ahead{};
  /// The wave that is attended and the one that is fetched meanwhile.
  std::array<std::unique_ptr<WaveFetch>, 2> waves{};

  std::array<std::uint64_t, kTierCount> hits{};
  std::uint64_t held_hits = 0;
  std::uint64_t metadata_bytes_peak = 0;
  std::uint64_t steps = 0;
  std::uint64_t wave_count = 0;
  std::uint64_t steps_measured = 0;
  std::uint64_t attends = 0;
  /// Slots held for outliers, and how many may be.
  std::uint32_t outliers_held = 0;
  std::uint32_t outliers_held_max = 0;
  std::uint32_t sequences_open = 0;
  std::uint32_t sequences_made = 0;
  bool closed = false;
  /// Held for whoever resolved them, until the next call.
  std::vector<SlotId> resolved_slots{};

  /// Every public call that changes anything begins with this.
  void begin_call() {
    if (look_ahead != nullptr) look_ahead->settle();
    for (SlotId slot : resolved_slots) map->unhold(slot);
    resolved_slots.clear();
  }
  /// Query heads that share one selection.
  std::uint32_t heads_per_group() const { return options.query_heads / layout.head_groups(); }
  std::uint32_t blocks_per_chunk() const { return kvtier::blocks_per_chunk(layout); }
  /// Tables, map, host tier and waves, once the engine is there.
  Status make_parts();
  /// Whether one sequence more may be open, and that it is.
  Status check_room() const;
  SequenceId add_sequence();
  /// Steps from one token to the next, of all sequences together.
  std::uint64_t steps_per_token() const {
    return std::uint64_t{options.layers} * std::max(1u, sequences_open);
  }
  PrefetchStats prefetch_stats() const;
  /// What a call waits for is counted between these.
  void begin_waits() {
    counters.waits = 0;
    counters.disk_wait = {};
  }
  void end_waits(StepTiming& timing) const {
    timing.waits = counters.waits;
    timing.disk_wait = counters.disk_wait;
  }
  Duration now() const { return environment.clock->now(); }
  void record(Track track, const char* name, Duration start, Duration end,
              std::uint64_t bytes) const {
    if (environment.timeline == nullptr) return;
    environment.timeline->record(
        {.track = track, .name = name, .start = start, .duration = end - start, .bytes = bytes});
  }
};

}  // namespace kvtier
