#pragma once

#include "memory/block_layout.h"
#include "runtime/block_failure.h"
#include "runtime/block_table.h"
#include "runtime/device_map.h"
#include "runtime/options.h"
#include "runtime/stats.h"
#include "transfer/transfer_engine.h"

#include <cstdint>
#include <span>
#include <vector>

namespace kvtier {

/// What the movers count; part of `RuntimeStats`.
struct MoverCounters {
  VerificationStats verification;
  PrefetchStats prefetch;
  std::uint64_t host_evictions = 0;
  std::uint64_t disk_reads_repeated = 0;
  std::uint64_t disk_writes_failed = 0;
  /// Transfers that were not in when they were needed, since the counter was last reset.
  std::uint32_t waits = 0;
  /// Time spent waiting for the disk, since the same.
  Duration disk_wait{};

  /// A guess came to its end: its extent was used, or left unused.
  void end_guess(Extent& extent, std::uint64_t bytes, bool used) {
    if (!extent.prefetched) return;
    extent.prefetched = false;
    GuessStats& source = prefetch.sources[static_cast<std::size_t>(extent.guess)].to_host;
    (used ? prefetch.useful_bytes : prefetch.wasted_bytes) += bytes;
    (used ? source.useful_bytes : source.wasted_bytes) += bytes;
  }
};

/// Checks one block's bytes against the checksum recorded when it sealed.
struct BlockCheck {
  bool ok = true;
  std::uint64_t expected = 0;
  std::uint64_t found = 0;
};

/// Moves extents between host frames and disk, and sealed blocks into their frames; verifies what
/// arrives. Carries out what `BlockTable` records; decides nothing but which damaged bytes to read
/// again.
///
/// One thread at a time. Allocates only when made, and to describe failures. Which calls wait is
/// said at each.
class HostTier {
 public:
  /// Reads of one extent before its blocks are given up.
  static constexpr int kReadAttempts = 3;
  /// Writes of one extent, each to another place where there is one.
  static constexpr int kWriteAttempts = 3;
  /// Copies of one block over the link before it is given up.
  static constexpr int kCopyAttempts = 3;
  /// Sealed blocks that are copied to their frames at once.
  static constexpr std::size_t kSealsMax = 64;

  struct Parts {
    const BlockLayout* layout;
    BlockTable* table;
    DeviceMap* map;
    TransferEngine* engine;
    const Clock* clock;  ///< For how long it waits.
    VerifyMode verify;
    MoverCounters* counters;
    /// Frames that a step must find free or droppable to read what it selects.
    std::uint32_t reading_frames;
  };
  explicit HostTier(const Parts& parts);

  // --- Writing through.

  /// A new extent in a fresh frame. `no_space` when nothing can be dropped, or when steps could no
  /// longer read from disk afterwards. May wait for a write or a read that occupies the frame
  /// chosen.
  Result<ExtentId> create(const ExtentOwner& owner);
  /// The same, from the frames that steps read into: for a truncation, which soon gives back the
  /// extent that it replaces.
  Result<ExtentId> create_for_cut(const ExtentOwner& owner);
  /// Records a sealed block; its bytes are copied from its slot to its frame by the next `settle`,
  /// which this calls when `kSealsMax` blocks wait. The slot is held until then.
  Status write_through(BlockId id, SlotId slot);
  /// Copies what `write_through` recorded and waits for it.
  Status settle();
  /// The frame of a new extent has been filled from a store that verified it: takes its blocks'
  /// identities and generations from its header, and completes it. `corrupt` when the header is not
  /// that of a full extent of this layer, head group and place.
  Status adopt(ExtentId id);
  /// Every block of the extent is sealed: settles, and starts writing it to disk where a place is
  /// left there.
  Status complete(ExtentId id);
  /// The first failure of a disk write that repeating did not mend: what it was to write stayed in
  /// its frame.
  const Status& write_failure() const { return write_failure_; }

  // --- Reading.

  /// Starts reading an extent from disk into a frame; `why` is what eviction is told of it. May
  /// wait for another to leave.
  Status start_read(ExtentId id, Priority priority, Admission why = Admission::kUsed);
  /// Somebody will soon wait for this extent's read: it overtakes those that nobody asked for.
  void hasten_read(ExtentId id) { table_.row(id).transfer.raise(Priority::kDemand); }
  /// Waits until the extent is in its frame and every block of it is verified. Reads again while a
  /// block of `wanted` (all of this extent) is damaged, then adds what cannot be had to `failures`.
  void finish_read(ExtentId id, std::span<const BlockId> wanted,
                   std::vector<BlockFailure>& failures);

  /// Checks the copy of a block that stands at `bytes` against the header in its frame.
  BlockCheck check(BlockId id, const std::byte* bytes) const;
  /// The same of the values of the block at `bytes` alone, of which only these are read; against
  /// the checksum that was made of them when the block sealed. Needs `keep_values_checksums`.
  BlockCheck check_values(BlockId id, const std::byte* bytes) const;
  BlockFailure describe(BlockId id, Tier tier, StatusCode code, const BlockCheck& check,
                        std::string_view reason) const;

  // --- Ending.

  /// One sequence less has the extent. The last waits for whatever moves it and gives it up: row,
  /// frame and place.
  void release(ExtentId id);
  /// Seals copies of the first `blocks` blocks of `source` into `target`, which is new: under the
  /// target's identity and `generation`. Both are in frames and stay there. Each copy is verified
  /// against the checksum of its original; a block of which no intact copy is left, in its frame or
  /// on the device, is marked as damaged in `target` as well.
  void copy_blocks(ExtentId source, ExtentId target, std::uint32_t blocks, Generation generation);
  /// Makes a complete extent a filling one again whose places from `first_cut` on are empty. It is
  /// in a frame; waits for a write under way.
  void reopen(ExtentId id, std::uint32_t first_cut);
  /// Waits for the extent's write, if one is under way.
  void settle_write(ExtentId id);

 private:
  Status make_room();
  bool copy_block(BlockId source, std::byte* target);
  Status out_of_frames() const;
  void drop(ExtentId id);
  Status wait_for(Transfer& transfer);
  void end_write(ExtentId id);
  void abandon_read(ExtentId id);
  Status submit_write(ExtentId id);
  Status submit_read(ExtentId id, Priority priority);
  /// Verifies header and blocks of what just arrived; marks the damaged ones.
  Status verify_arrival(ExtentId id);
  void repair_from_device(BlockId id);
  std::uint64_t sum_values(BlockId id, const std::byte* bytes) const;
  /// Of a block whose bytes are as they sealed: puts its checksums down.
  void set_checksums(BlockId id, const std::byte* bytes);
  std::uint32_t count_damaged(std::span<const BlockId> wanted) const;
  void give_up(ExtentId id, std::span<const BlockId> wanted, const Status& status,
               std::vector<BlockFailure>& failures);

  struct Seal {
    BlockId block;
    SlotId slot;
  };
  Status copy_seals();

  BlockLayout layout_;
  BlockTable& table_;
  DeviceMap& map_;
  TransferEngine& engine_;
  const Clock& clock_;
  VerifyMode verify_;
  MoverCounters& counters_;
  std::uint32_t reading_frames_;
  Status write_failure_;
  /// Sticky: a file that refused for lack of space is not asked again.
  Status disk_full_;
  std::vector<Seal> seals_;
  std::vector<CopySpan> seal_spans_;
};

}  // namespace kvtier
