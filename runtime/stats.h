#pragma once

#include "memory/clock.h"
#include "memory/ids.h"
#include "memory/region.h"
#include "runtime/guess_source.h"
#include "transfer/transfer_engine.h"

#include <array>
#include <cstdint>
#include <string>

namespace kvtier {

/// One tier's bounds and uses. Bytes are of whole slots, frames and extents: what is really taken.
struct TierStats {
  std::uint64_t capacity_bytes = 0;
  std::uint64_t used_bytes = 0;
  std::uint64_t peak_bytes = 0;
  /// Attended blocks that were found here when the step asked (each counts on one tier only);
  /// sinks, window and outliers held on the device are counted apart.
  std::uint64_t hits = 0;
  std::uint64_t held_hits = 0;
  std::uint64_t evictions = 0;
};

/// What verification saw, in blocks.
struct VerificationStats {
  std::uint64_t verified = 0;
  std::uint64_t mismatched = 0;  ///< Checks that failed.
  std::uint64_t recovered = 0;   ///< Wanted, wrong or unreadable at first, then obtained intact.
  std::uint64_t failed = 0;      ///< Wanted and not to be had: named in a step's report.
};

/// What became of guesses: bytes whose move was started, and of those the bytes that were used
/// before they had to leave, and those that left, or were there at the end, unused.
struct GuessStats {
  std::uint64_t issued_bytes = 0;
  std::uint64_t useful_bytes = 0;
  std::uint64_t wasted_bytes = 0;

  GuessStats& operator+=(const GuessStats& other) {
    issued_bytes += other.issued_bytes;
    useful_bytes += other.useful_bytes;
    wasted_bytes += other.wasted_bytes;
    return *this;
  }
};

/// The guesses of one source, and what its measured usefulness has made of its budget.
struct GuessSourceStats {
  GuessStats to_host;    ///< Disk to host, in whole extents.
  GuessStats to_device;  ///< Host to device, in whole blocks.
  /// What a step may start at the moment, by link.
  std::uint64_t to_host_budget_bytes = 0;
  std::uint64_t to_device_budget_bytes = 0;
  /// How often a budget of either link was halved and doubled (`GuessBudget` has the rule).
  std::uint64_t halvings = 0;
  std::uint64_t doublings = 0;
};

/// What look-ahead did.
struct PrefetchStats {
  // Disk to host, all sources together.
  std::uint64_t issued_bytes = 0;
  std::uint64_t useful_bytes = 0;  ///< Used at least once before the frame was needed elsewhere.
  std::uint64_t wasted_bytes = 0;  ///< Dropped unused, or unused at the end.
  /// Extents that were predicted for this step but left out by the budgets, and then had to be read
  /// on demand. A function of the calls, like every other decision; how often the step really
  /// waited is `StepTiming::waits`.
  std::uint64_t late = 0;
  /// Extents that a step had to read on demand and that nothing had predicted for it. With `late`,
  /// all demand reads of steps.
  std::uint64_t unforeseen = 0;
  GuessStats to_device;  ///< Host to device, all sources together.
  std::array<GuessSourceStats, kGuessSourceCount> sources;
};

/// Snapshot of a runtime's counters since it was opened.
struct RuntimeStats {
  std::array<TierStats, kTierCount> tiers;
  std::array<RouteStats, kRouteCount> routes;
  VerificationStats verification;
  PrefetchStats prefetch;
  std::uint64_t metadata_bytes = 0;  ///< Of all selectors together, at its peak.
  std::uint64_t steps = 0;
  std::uint64_t waves = 0;
  /// Steps (of a query, where each has its own selection) that attended a sample of the rest, to
  /// learn whether estimating the rest helps. What they moved is in `routes`, what they found is
  /// not in the hits of `tiers`.
  std::uint64_t steps_measured = 0;
  std::uint64_t attends = 0;  ///< Calls of `Sequence::attend`.
  std::uint64_t disk_reads_repeated = 0;
  std::uint64_t disk_writes_failed = 0;
  RegionStats slab;
  RegionStats frames;
};

/// What one sequence occupies at the moment. Blocks and extents that it shares with others count in
/// full for each of them, so the sum over sequences can exceed what the tiers hold.
struct SequenceStats {
  std::uint64_t blocks = 0;           ///< Sealed and open ones, of all layers and head groups.
  std::uint64_t blocks_resident = 0;  ///< Of these, on the device.
  std::uint64_t device_bytes = 0;     ///< Of their slots.
  std::uint64_t host_bytes = 0;       ///< Of the frames that hold its extents.
  std::uint64_t disk_bytes = 0;       ///< Of the places that its extents have on disk.
  std::uint64_t shared_bytes = 0;     ///< Of its extents that other sequences share.
  std::uint64_t metadata_bytes = 0;   ///< Of its selectors.
};

/// Where one step's time went.
struct StepTiming {
  Duration select{};
  Duration resolve{};
  Duration fetch{};  ///< Waiting for blocks that were not resident.
  Duration attend{};
  Duration merge{};
  Duration rest{};  ///< Estimating what was not attended, and measuring whether that helps.
  Duration look_ahead{};
  Duration total{};
  /// Of all of these, waiting for the disk: for reads that were not in, and for frames that a read
  /// or a write still occupied.
  Duration disk_wait{};
  std::uint32_t waits = 0;  ///< Transfers that were not in when the step needed them.
};

}  // namespace kvtier
