#pragma once

#include "memory/status.h"

#include <array>
#include <atomic>
#include <cstdint>
#include <string>
#include <string_view>

namespace kvtier {

/// Ways in which storage and links lie or fail.
enum class FaultKind : unsigned char {
  kBitFlip,     ///< A read (or copy) returns one flipped bit; the stored bytes are fine.
  kRot,         ///< A write stores one flipped bit: every later read is wrong.
  kShortRead,   ///< A read reports success with fewer bytes.
  kIoError,     ///< A read fails (`io_error`).
  kWriteError,  ///< A write fails (`io_error`), part of it may be stored.
  kNoSpace,     ///< A write fails (`no_space`): the disk filled up underneath.
  kMisplaced,   ///< A read returns the bytes of another aligned place.
  kLostWrite,   ///< A write reports success and stores nothing.
  kDelay,       ///< Completion is held back behind later ones: late and out of order.
};
inline constexpr int kFaultKindCount = 9;
/// "bitflip", "rot", "shortread", "eio", "writeeio", "enospc", "misplaced", "lostwrite", "delay".
const char* to_string(FaultKind kind);

/// What a fault plan applies to.
enum class FaultTarget : unsigned char { kDisk, kLink };

/// How often each fault happens, by seed. The answer for an operation depends on the seed, the
/// kind, its place and how often that place was used before, never on timing or on other
/// operations.
struct FaultPlan {
  std::array<double, kFaultKindCount> disk_rate{};
  double link_bitflip_rate = 0.0;
  std::uint64_t seed = 0;

  bool any() const;
  /// `kind[:target]:rate` joined by commas, and `seed=N`: "bitflip:disk:1e-3,eio:1e-4,seed=7".
  /// The target is `disk` by default; `link` takes `bitflip` only. `invalid_argument` names the
  /// part that is wrong and lists what is known.
  static Result<FaultPlan> parse(std::string_view spec);
  /// The same spec in canonical form.
  std::string to_string() const;
};

/// A uniform 64-bit number for one decision: `use` counts how often `place` was used before, `salt`
/// keeps several decisions about one operation apart.
std::uint64_t fault_draw(std::uint64_t seed, std::uint64_t salt, std::uint64_t place,
                         std::uint64_t use);
/// Whether a draw hits, for a rate from 0 (never) to 1 (always).
bool fault_hits(std::uint64_t draw, double rate);

/// Whether a failure was injected, and not met.
bool is_injected(const Status& status);

/// How often each kind really fired. Thread-safe.
struct FaultCounts {
  std::array<std::atomic<std::uint64_t>, kFaultKindCount> fired{};
};

}  // namespace kvtier
