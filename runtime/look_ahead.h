#pragma once

#include "memory/block_layout.h"
#include "runtime/block_table.h"
#include "runtime/device_map.h"
#include "runtime/host_tier.h"

#include <cstdint>
#include <span>
#include <vector>

namespace kvtier {

/// Promotes extents from disk to host before a step asks for them, within a byte budget per step.
///
/// Predicts two things: that the next layer attends what it attended one token ago, and that this
/// layer soon attends the blocks ranked just below the cut. Decides by what the tables say, never
/// by how far a transfer has come, and promotes no more for one token than the share of the
/// frames (`kPredictedShare`) that eviction keeps for guesses: prediction must not empty the host
/// tier of what was asked for. One thread at a time; allocates only when made.
class LookAhead {
 public:
  struct Parts {
    const BlockLayout* layout;
    BlockTable* table;
    DeviceMap* map;
    HostTier* host;
    MoverCounters* counters;
  };
  struct Limits {
    std::uint64_t bytes_per_step = 0;
    /// Steps that a prediction is good for: one token's.
    std::uint32_t steps_ahead = 1;
  };
  LookAhead(const Parts& parts, const Limits& limits);

  bool enabled() const { return limits_.bytes_per_step > 0; }

  /// Starts a step: the byte budget is whole again.
  void begin_step(std::uint64_t step);
  /// Blocks that may be asked for: their extents are counted, where they are on disk alone.
  void consider(std::span<const BlockId> blocks);
  /// Promotes the extents considered since the last call, those with most blocks first, as far as
  /// the budget goes; what it cannot pay for is remembered as predicted.
  void promote();
  /// A block has to be read from disk on demand: late, when it was predicted for this step and left
  /// out.
  void note_demand(ExtentId extent);

 private:
  bool promote(ExtentId id);

  BlockLayout layout_;
  BlockTable& table_;
  DeviceMap& map_;
  HostTier& host_;
  MoverCounters& counters_;
  Limits limits_;
  std::uint64_t bytes_left_ = 0;
  std::uint32_t frames_left_ = 0;
  std::uint64_t step_ = 0;
  // Invariant: considered_ lists the extents whose blocks_considered_ is not 0, each once.
  std::vector<ExtentId> considered_;
  std::vector<std::uint32_t> blocks_considered_;
};

}  // namespace kvtier
