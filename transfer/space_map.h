#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

namespace kvtier {

/// Which parts of a store's segments are free: places of one, two or four units of 64 KiB, each
/// aligned to its own size within a chunk of four (256 KiB).
///
/// Best fit: a place is cut from the chunk that has the least room and still fits it, so that holes
/// are filled before whole chunks are broken. Every call takes constant time. What random deletion
/// scatters nobody can gather without moving something: `propose_move` says what, and the owner
/// moves it. Memory: ten bytes per chunk, all of it taken when made. Not thread-safe.
class SpaceMap {
 public:
  static constexpr std::size_t kUnitBytes = 64 * 1024;
  static constexpr std::uint32_t kChunkUnits = 4;
  static constexpr std::size_t kChunkBytes = kChunkUnits * kUnitBytes;

  /// Units of the smallest place that holds `bytes`: 1, 2 or 4; 0 when none does.
  static constexpr std::uint32_t units_for(std::size_t bytes) {
    if (bytes == 0 || bytes > kChunkBytes) return 0;
    return bytes <= kUnitBytes ? 1 : bytes <= 2 * kUnitBytes ? 2 : 4;
  }

  /// All free.
  explicit SpaceMap(std::uint32_t chunks);

  /// First unit of a free place of 1, 2 or 4 units, which is then taken; none when there is none.
  std::optional<std::uint32_t> take(std::uint32_t units);
  /// Takes this very place: for a map that is rebuilt. False, and nothing changes, when it is
  /// misaligned, outside the map or not wholly free.
  bool claim(std::uint32_t unit, std::uint32_t units);
  /// The place was taken with the same number of units.
  void give_back(std::uint32_t unit, std::uint32_t units);

  std::uint64_t units() const { return std::uint64_t{kChunkUnits} * masks_.size(); }
  std::uint64_t free_units() const { return free_units_; }
  /// Chunks that are wholly free: what a place of 256 KiB can be taken from.
  std::uint64_t free_chunks() const { return counts_[0]; }

  /// A place whose move would bring a chunk nearer to being wholly free.
  struct Move {
    std::uint32_t source;
    std::uint32_t target;
    std::uint32_t units;
  };
  /// The target is taken already: copy the bytes, then give back the source (or, when nothing was
  /// moved, the target). None when no move helps. May look at a few dozen chunks.
  std::optional<Move> propose_move();

 private:
  static constexpr std::uint32_t kNone = 0xFFFFFFFF;
  static constexpr std::uint32_t kMasks = 16;

  void set_mask(std::uint32_t chunk, std::uint8_t mask);
  void link(std::uint32_t chunk);
  void unlink(std::uint32_t chunk);
  std::optional<Move> move_out_of(std::uint32_t chunk);

  // Invariant: chunk c is in the list of its mask (bit u: unit u is taken), and counts_ has the
  // length of each list. Bit u of starts_[c]: a place begins at unit u.
  std::vector<std::uint8_t> masks_;
  std::vector<std::uint8_t> starts_;
  std::vector<std::uint32_t> next_;
  std::vector<std::uint32_t> previous_;
  std::array<std::uint32_t, kMasks> first_;
  std::array<std::uint32_t, kMasks> counts_{};
  std::uint64_t free_units_ = 0;
};

}  // namespace kvtier
