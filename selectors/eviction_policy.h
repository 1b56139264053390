#pragma once

#include "memory/status.h"

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

namespace kvtier {

/// Why something was taken into a tier.
enum class Admission {
  kUsed,       ///< It is being used now.
  kPredicted,  ///< It may be used soon; `touch` says when it was.
  kStreamed,   ///< It is used once, in passing: the first to leave again, unless `touch` says more.
};

/// A policy that tells guesses from uses keeps one place in this many for guesses. Whoever admits
/// guesses and wants them to be there when their time comes admits no more.
inline constexpr std::uint32_t kPredictedShare = 8;

/// Chooses what leaves a full tier. Works on places (slots or frames, 0 .. capacity-1) and on the
/// ids of what lies there, and never touches a byte of it.
///
/// The answers depend on the calls alone. One thread at a time; allocates only when made.
class EvictionPolicy {
 public:
  virtual ~EvictionPolicy() = default;

  /// `id` now lies in `place`, which was free or has been evicted.
  virtual void admit(std::uint32_t place, std::uint64_t id, Admission why) = 0;
  /// What lies in `place` was used.
  virtual void touch(std::uint32_t place) = 0;
  /// What lies in `place` is gone for a reason of its own (its sequence ended); nothing is learnt.
  virtual void remove(std::uint32_t place) = 0;
  /// Picks a place whose `held` count is zero, forgets it and returns it; none when all are held.
  /// `held` has one entry per place.
  virtual std::optional<std::uint32_t> evict(std::span<const std::uint16_t> held) = 0;
};

/// "lru", "lrfu": `invalid_argument` lists the known names.
Result<std::unique_ptr<EvictionPolicy>> make_eviction_policy(std::string_view name,
                                                             std::uint32_t capacity);
std::vector<std::string_view> known_eviction_policies();

}  // namespace kvtier
