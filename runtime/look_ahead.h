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
/// by how far a transfer has come, and never takes a frame from what it has just promoted itself.
/// One thread at a time; allocates only when made.
class LookAhead {
 public:
  struct Parts {
    const BlockLayout* layout;
    BlockTable* table;
    DeviceMap* map;
    HostTier* host;
    MoverCounters* counters;
  };
  LookAhead(const Parts& parts, std::uint64_t bytes_per_step);

  bool enabled() const { return bytes_per_step_ > 0; }

  /// Starts a step: the byte budget is whole again.
  void begin_step(std::uint64_t step);
  /// Promotes the extents of these blocks, in order, as far as the budget goes; what it cannot pay
  /// for is remembered as predicted.
  void promote(std::span<const BlockId> blocks);
  /// A block has to be read from disk on demand: late, when it was predicted and left out.
  void note_demand(ExtentId extent);

 private:
  BlockLayout layout_;
  BlockTable& table_;
  DeviceMap& map_;
  HostTier& host_;
  MoverCounters& counters_;
  std::uint64_t bytes_per_step_;
  std::uint64_t bytes_left_ = 0;
  std::uint32_t frames_left_ = 0;
  std::uint64_t step_ = 0;
};

}  // namespace kvtier
