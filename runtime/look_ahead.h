#pragma once

#include "memory/block_layout.h"
#include "runtime/block_table.h"
#include "runtime/device_guesses.h"
#include "runtime/device_map.h"
#include "runtime/guess_budget.h"
#include "runtime/host_tier.h"

#include <array>
#include <cstdint>
#include <span>
#include <vector>

namespace kvtier {

/// What a layer's last step leaves behind as a forecast of its next: blocks by rank, those that
/// were attended first, then the band below the cut. View.
struct Forecast {
  std::span<const BlockId> ranked;
  std::uint32_t chosen = 0;  ///< ranked[0, chosen) were attended.
  /// Whose word it is for what was chosen; what ranked behind is the band, except for a hint.
  GuessSource source = GuessSource::kPreviousSet;
};

/// Promotes blocks towards the device before a step asks for them: extents from disk to host
/// frames, and blocks from frames to device slots, within a byte budget per link and step.
///
/// *What is expected.* Each block of a forecast that is not on the device counts with a weight that
/// falls with its rank (`weight_of`), an extent with the sum over its blocks, times one and the
/// number of times that steps have missed it lately, which fades by half every
/// `kMissesHalfLifeTokens`. The extents with most are promoted first. The figures come from
/// recorded traces (runtime/README.md says what else was tried).
///
/// *What bounds it.* The bytes of a step; for each source of guesses its own `GuessBudget`, which
/// follows how many of its guesses were used; three quarters of the frames that can be had. A frame
/// with a guess stays until the step has passed that the guess is for, unless nothing else is left
/// to leave.
///
/// *What it depends on.* The calls alone: what the tables say and what has been counted, never how
/// far a transfer has come. One thread at a time; allocates only when made.
class LookAhead {
 public:
  struct Parts {
    const BlockLayout* layout;
    BlockTable* table;
    DeviceMap* map;
    HostTier* host;
    DeviceGuesses* device;
    MoverCounters* counters;
  };
  struct Limits {
    std::uint64_t bytes_per_step = 0;
    /// Steps from one token to the next.
    std::uint32_t steps_per_token = 1;
  };
  /// Layers that a step looks ahead: the next, and with what that leaves of the budget the one
  /// behind it.
  static constexpr std::uint32_t kLayersAhead = 2;
  /// Tokens that are ranked below the cut, as a multiple of the budget. Blocks there are wanted
  /// next one time in twenty, so more would cost ranking and bring nothing.
  static constexpr std::uint32_t kBandBudgets = 3;
  static constexpr std::uint32_t kMissesHalfLifeTokens = 24;

  LookAhead(const Parts& parts, const Limits& limits);

  bool enabled() const { return limits_.bytes_per_step > 0 || device_.enabled(); }
  /// Tokens below the cut that a selection should rank for it.
  std::uint32_t band_tokens(std::uint32_t budget_tokens) const {
    return enabled() ? kBandBudgets * budget_tokens : 0;
  }
  /// How likely a block is to be attended next, by its place in the last ranking, whose first
  /// `chosen` were attended.
  static float weight_of(std::size_t rank, std::uint32_t chosen);

  /// Starts a step: the byte budgets are whole again, what was kept for earlier steps may leave.
  void begin_step(std::uint64_t step);
  /// Waits for what is on its way to the device: it is resident afterwards, or gone. Every call
  /// that looks at residency begins with this.
  void settle() { device_.settle(); }
  /// Takes a forecast into account.
  void consider(const Forecast& forecast);
  /// Promotes what was considered since the last call, for a step up to `until`, as far as the
  /// budgets go; what they cannot pay for is remembered as predicted. Returns the bytes it started
  /// to read from disk.
  std::uint64_t promote(std::uint64_t until);
  /// Whether anything more could be promoted in this step.
  bool has_budget() const { return bytes_left_ >= layout_.extent_bytes(); }

  /// A block has to be brought to the device on demand.
  void note_miss(ExtentId extent);
  /// An extent has to be read from disk on demand: late, when it was predicted for this step and
  /// left out, otherwise unforeseen.
  void note_demand(ExtentId extent);

 private:
  enum class Outcome : unsigned char { kGoOn, kStop };
  /// What is known of an extent while guesses are collected.
  struct Expectation {
    float weight = 0.0f;
    float heaviest = 0.0f;
    GuessSource source = GuessSource::kPreviousSet;  ///< Of the heaviest block.
  };

  void add(BlockId block, float weight, GuessSource source);
  float misses(const Extent& extent) const;
  void retain(ExtentId id, std::uint64_t until);
  Outcome promote_extent(ExtentId id, std::uint64_t until);

  BlockLayout layout_;
  BlockTable& table_;
  DeviceMap& map_;
  HostTier& host_;
  DeviceGuesses& device_;
  MoverCounters& counters_;
  Limits limits_;
  std::array<GuessBudget, kGuessSourceCount> budgets_;
  std::uint64_t bytes_left_ = 0;
  std::uint32_t frames_max_ = 0;
  std::uint64_t step_ = 0;
  // Invariant: considered_ lists the extents whose expected weight is not 0, each once.
  std::vector<ExtentId> considered_;
  std::vector<Expectation> expected_;  // By extent.
};

}  // namespace kvtier
