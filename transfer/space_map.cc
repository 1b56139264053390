#include "transfer/space_map.h"

#include "memory/check.h"

#include <bit>
#include <cstdint>

namespace kvtier {
namespace {

constexpr std::uint8_t kFullMask = 0xF;

// Units [unit, unit + units) of a chunk as bits.
constexpr std::uint8_t bits_of(std::uint32_t unit, std::uint32_t units) {
  return static_cast<std::uint8_t>(((1u << units) - 1) << unit);
}

// For each size: masks with room for it, those with the least room first, and of these the ones
// where no larger hole is broken. Written by hand, since the order is the policy.
constexpr std::array<std::uint8_t, 14> kFitsOne = {
    // One unit free.
    0b1110, 0b1101, 0b1011, 0b0111,
    // Two free, not a pair: no larger hole is lost.
    0b1010, 0b0110, 0b1001, 0b0101,
    // A pair and a single one free: the single one is taken.
    0b0100, 0b1000, 0b0001, 0b0010,
    // A pair.
    0b1100, 0b0011};
constexpr std::array<std::uint8_t, 7> kFitsTwo = {0b1100, 0b0011, 0b0100, 0b1000,
                                                  0b0001, 0b0010, 0b0000};

// Where in a chunk with this mask a place of `units` goes; a pair is broken only when nothing else
// is left.
std::uint32_t place_in(std::uint8_t mask, std::uint32_t units) {
  std::uint32_t fallback = SpaceMap::kChunkUnits;
  for (std::uint32_t unit = 0; unit < SpaceMap::kChunkUnits; unit += units) {
    if ((mask & bits_of(unit, units)) != 0) continue;
    if (units > 1) return unit;
    if ((mask & bits_of(unit & ~1u, 2)) != 0) return unit;
    if (fallback == SpaceMap::kChunkUnits) fallback = unit;
  }
  return fallback;
}

}  // namespace

SpaceMap::SpaceMap(std::uint32_t chunks)
    : masks_(chunks, 0), starts_(chunks, 0), next_(chunks), previous_(chunks) {
  first_.fill(kNone);
  // Linked from the last to the first, so that an empty map is filled from its beginning.
  for (std::uint32_t chunk = chunks; chunk > 0; --chunk) link(chunk - 1);
  free_units_ = units();
}

void SpaceMap::link(std::uint32_t chunk) {
  const std::uint8_t mask = masks_[chunk];
  previous_[chunk] = kNone;
  next_[chunk] = first_[mask];
  if (first_[mask] != kNone) previous_[first_[mask]] = chunk;
  first_[mask] = chunk;
  ++counts_[mask];
}

void SpaceMap::unlink(std::uint32_t chunk) {
  const std::uint8_t mask = masks_[chunk];
  (previous_[chunk] == kNone ? first_[mask] : next_[previous_[chunk]]) = next_[chunk];
  if (next_[chunk] != kNone) previous_[next_[chunk]] = previous_[chunk];
  --counts_[mask];
}

void SpaceMap::set_mask(std::uint32_t chunk, std::uint8_t mask) {
  unlink(chunk);
  free_units_ += static_cast<std::uint64_t>(std::popcount(masks_[chunk]));
  masks_[chunk] = mask;
  free_units_ -= static_cast<std::uint64_t>(std::popcount(mask));
  link(chunk);
}

std::optional<std::uint32_t> SpaceMap::take(std::uint32_t units) {
  KVTIER_CHECK(units == 1 || units == 2 || units == 4, "a place of {} units", units);
  std::uint32_t chunk = kNone;
  if (units == 1) {
    for (std::size_t i = 0; i < kFitsOne.size() && chunk == kNone; ++i) chunk = first_[kFitsOne[i]];
  } else if (units == 2) {
    for (std::size_t i = 0; i < kFitsTwo.size() && chunk == kNone; ++i) chunk = first_[kFitsTwo[i]];
  }
  if (chunk == kNone) chunk = first_[0];
  if (chunk == kNone) return std::nullopt;
  const std::uint32_t unit = place_in(masks_[chunk], units);
  set_mask(chunk, static_cast<std::uint8_t>(masks_[chunk] | bits_of(unit, units)));
  starts_[chunk] = static_cast<std::uint8_t>(starts_[chunk] | bits_of(unit, 1));
  return chunk * kChunkUnits + unit;
}

bool SpaceMap::claim(std::uint32_t unit, std::uint32_t units) {
  if ((units != 1 && units != 2 && units != 4) || unit % units != 0) return false;
  const std::uint32_t chunk = unit / kChunkUnits;
  if (chunk >= masks_.size()) return false;
  const std::uint32_t first = unit % kChunkUnits;
  const std::uint8_t bits = bits_of(first, units);
  if ((masks_[chunk] & bits) != 0) return false;
  set_mask(chunk, static_cast<std::uint8_t>(masks_[chunk] | bits));
  starts_[chunk] = static_cast<std::uint8_t>(starts_[chunk] | bits_of(first, 1));
  return true;
}

void SpaceMap::give_back(std::uint32_t unit, std::uint32_t units) {
  const std::uint32_t chunk = unit / kChunkUnits;
  const std::uint32_t first = unit % kChunkUnits;
  const std::uint8_t bits = bits_of(first, units);
  KVTIER_CHECK(chunk < masks_.size() && unit % units == 0 && (masks_[chunk] & bits) == bits &&
                   (starts_[chunk] & bits) == bits_of(first, 1),
               "{} units at {} were not taken as one place", units, unit);
  set_mask(chunk, static_cast<std::uint8_t>(masks_[chunk] & ~bits));
  starts_[chunk] = static_cast<std::uint8_t>(starts_[chunk] & ~bits_of(first, 1));
}

// A place of the chunk, if another chunk that is fuller, or becomes so, has a hole for it. Each
// such move makes the sum of the squares of what chunks hold grow, so moving comes to an end.
std::optional<SpaceMap::Move> SpaceMap::move_out_of(std::uint32_t chunk) {
  const std::uint8_t mask = masks_[chunk];
  for (std::uint32_t unit = 0; unit < kChunkUnits; ++unit) {
    if ((starts_[chunk] & bits_of(unit, 1)) == 0) continue;
    std::uint32_t units = 1;
    while (unit + units < kChunkUnits && (mask & bits_of(unit + units, 1)) != 0 &&
           (starts_[chunk] & bits_of(unit + units, 1)) == 0) {
      ++units;
    }
    // Out of its list while a place is looked for, so that it does not find itself.
    unlink(chunk);
    const std::uint32_t whole = first_[0];
    first_[0] = kNone;
    std::optional<std::uint32_t> target = units < kChunkUnits ? take(units) : std::nullopt;
    if (target && std::popcount(masks_[*target / kChunkUnits]) <= std::popcount(mask)) {
      give_back(*target, units);
      target.reset();
    }
    first_[0] = whole;
    link(chunk);
    if (target) return Move{chunk * kChunkUnits + unit, *target, units};
  }
  return std::nullopt;
}

std::optional<SpaceMap::Move> SpaceMap::propose_move() {
  // Emptiest first: one move then frees a whole chunk, or two do.
  constexpr std::array<std::uint8_t, 14> kEmptiestFirst = {0b0001, 0b0010, 0b0100, 0b1000, 0b0011,
                                                           0b1100, 0b0101, 0b1010, 0b0110, 0b1001,
                                                           0b0111, 0b1011, 0b1101, 0b1110};
  constexpr int kLooksPerMask = 4;
  for (const std::uint8_t mask : kEmptiestFirst) {
    std::uint32_t chunk = first_[mask];
    for (int look = 0; look < kLooksPerMask && chunk != kNone; ++look) {
      if (std::optional<Move> move = move_out_of(chunk)) return move;
      chunk = next_[chunk];
    }
  }
  return std::nullopt;
}

}  // namespace kvtier
