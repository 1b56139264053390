#pragma once

#include "runtime/block_failure.h"
#include "runtime/block_table.h"
#include "runtime/device_map.h"
#include "runtime/host_tier.h"

#include <cstdint>
#include <vector>

namespace kvtier {

/// A block on its way to a slot that the device map has reserved for it.
struct Miss {
  BlockId block;
  SlotId slot;
  /// The keys alone are for a slot whose values are there and readable.
  BlockPart part = BlockPart::kWhole;
};

/// Brings the missing blocks of one wave to the device: reads the extents that are on disk, copies
/// every block from its frame to its slot, checks what must be checked.
///
/// `add` blocks one by one (neighbours of one extent together, so that the extent is looked up
/// once), `begin` starts everything, `finish` waits and tells the device map what arrived. What
/// must not be dropped meanwhile is held from `add` to `finish`. Two can be under way at once.
/// Reused without allocating once it has grown.
class WaveFetch {
 public:
  struct Parts {
    const BlockLayout* layout;
    BlockTable* table;
    DeviceMap* map;
    HostTier* host;
    TransferEngine* engine;
    VerifyMode verify;
    MoverCounters* counters;
  };
  WaveFetch(const Parts& parts, std::uint32_t misses_max);

  /// Whether a frame is there for one more miss of `extent`, beside `spoken_for` others that are
  /// not added yet.
  bool has_frame_for(ExtentId extent, std::uint32_t spoken_for) const;
  /// Extents that this wave brings from disk, so far.
  std::uint32_t reads() const { return static_cast<std::uint32_t>(reads_.size()); }

  /// Before the first `add` of every wave: what eviction is told of what arrives. A frame that is
  /// only streamed from is not touched.
  void admit_as(Admission why) { why_ = why; }
  /// Adds a miss; returns the tier where its bytes are now (an extent that look-ahead is bringing
  /// counts as host).
  Tier add(const Miss& miss);
  /// Starts every read and copy.
  void begin();
  /// Whether the last block added is this one.
  bool ends_with(BlockId block) const { return !misses_.empty() && misses_.back().block == block; }
  /// Afterwards every added block is resident, or absent (or as it was, where only its keys were
  /// wanted) and named in `failures`.
  void finish(std::vector<BlockFailure>& failures);

 private:
  /// An extent that must be read, and its misses: consecutive in misses_.
  struct Arrival {
    ExtentId extent;
    std::uint32_t first_miss = 0;
    std::uint32_t misses = 0;
    bool started = false;  ///< Look-ahead has started the read already.
    Status status;
  };
  /// One submitted gather: consecutive spans.
  struct Copy {
    Transfer transfer;
    std::uint32_t first_span = 0;
    std::uint32_t spans = 0;
    Status status;
  };

  Tier add_extent(ExtentId extent, std::uint32_t miss);
  void add_span(std::uint32_t miss);
  void submit_copies();
  void finish_reads(std::vector<BlockFailure>& failures);
  void finish_copy(std::uint32_t span, bool moved, std::vector<BlockFailure>& failures);
  bool is_intact(std::uint32_t span);
  void settle(const Miss& miss);
  void give_up(const Miss& miss);
  bool copy_again(std::uint32_t span);
  bool read_again(BlockId block, std::vector<BlockFailure>& failures);
  void refuse(const Miss& miss, Tier tier, std::vector<BlockFailure>& failures);

  BlockLayout layout_;
  BlockTable& table_;
  DeviceMap& map_;
  HostTier& host_;
  TransferEngine& engine_;
  VerifyMode verify_;
  MoverCounters& counters_;

  std::vector<Miss> misses_;
  std::vector<Arrival> reads_;         // In order of `add`.
  std::vector<ExtentId> held_frames_;  // In order of `add`, and of arrival.
  std::vector<BlockId> wanted_;        // Scratch: the blocks of one arrival.
  std::vector<CopySpan> spans_;        // Never moves: its capacity is misses_max.
  std::vector<std::uint32_t> miss_of_span_;
  std::vector<Copy> copies_;
  std::uint32_t spans_submitted_ = 0;
  Admission why_ = Admission::kUsed;
  BlockCheck last_check_;             // The last that failed, of the span that is judged.
  std::uint32_t frames_planned_ = 0;  // Taken by `begin` for reads that are not started.
};

}  // namespace kvtier
