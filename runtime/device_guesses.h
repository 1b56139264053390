#pragma once

#include "memory/block_layout.h"
#include "runtime/block_table.h"
#include "runtime/device_map.h"
#include "runtime/guess_budget.h"
#include "runtime/host_tier.h"
#include "transfer/transfer_engine.h"

#include <array>
#include <cstdint>
#include <vector>

namespace kvtier {

/// Brings blocks that a step may want from their host frames to the device while nothing asks for
/// them: the second hop of look-ahead.
///
/// Blocks become resident at the next `settle`, which waits for their copies, so that what is
/// resident never depends on how fast a copy was. Only blocks whose extent is in a frame, intact,
/// as the table has it, are taken: an extent that is still on its way there is not waited for. They
/// enter as guesses, the first to leave again, and take no more than the share of the slots that
/// eviction keeps for guesses. The budget of each source follows its measured usefulness
/// (`GuessBudget`). One thread at a time; allocates only when made.
class DeviceGuesses {
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
  DeviceGuesses(const Parts& parts, std::uint64_t bytes_per_step);

  bool enabled() const { return blocks_per_step_ > 0; }
  /// The budgets are whole again. Nothing is on its way.
  void begin_step();
  const GuessBudget& budget(GuessSource source) const {
    return budgets_[static_cast<std::size_t>(source)];
  }
  /// A block that is not on the device, whose extent is in a frame.
  void consider(BlockId block, float weight, GuessSource source);
  /// Starts copying what was considered since the last call, heaviest first, as far as the budgets
  /// go. Best effort.
  void promote();
  /// Waits for the copies: their blocks are resident afterwards, or absent where one did not arrive
  /// intact.
  void settle();

 private:
  struct Guess {
    BlockId block;
    float weight = 0.0f;
    GuessSource source = GuessSource::kPreviousSet;
  };
  struct Copy {
    BlockId block;
    SlotId slot;
    ExtentId extent;
  };
  bool start(const Guess& guess);
  void submit(std::size_t first);
  bool is_intact(const Copy& copy);

  BlockLayout layout_;
  BlockTable& table_;
  DeviceMap& map_;
  HostTier& host_;
  TransferEngine& engine_;
  VerifyMode verify_;
  MoverCounters& counters_;
  std::uint32_t blocks_per_step_;
  std::uint32_t blocks_left_ = 0;
  std::array<GuessBudget, kGuessSourceCount> budgets_;
  std::vector<Guess> considered_;
  std::vector<Copy> copies_;
  std::vector<CopySpan> spans_;  // Never moves: its capacity is what a step may start.
  struct Batch {
    Transfer transfer;
    std::size_t first = 0;
    std::size_t copies = 0;
  };
  std::vector<Batch> batches_;
};

}  // namespace kvtier
