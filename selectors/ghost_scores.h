#pragma once

#include "memory/check.h"

#include <bit>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

namespace kvtier {

/// The ids that left a cache last, at most `capacity` of them, each with the score it left with: a
/// ring in the order they left, and a hash table that finds them. Both are allocated once; every
/// operation is O(1).
///
/// Invariants: the table maps an id to its ticket (the count of ids pushed before it), and has an
/// entry for exactly the ids that are remembered. A ring cell whose id was taken out, or pushed
/// again, is stale: the table no longer has its ticket. The table is at most half full, with linear
/// probing and no tombstones: erasing shifts later entries back.
class GhostScores {
 public:
  explicit GhostScores(std::uint32_t capacity)
      : ring_(capacity), table_(std::bit_ceil(std::size_t{capacity} * 2 + 2)) {}

  void push(std::uint64_t id, double score) {
    if (ring_.empty()) return;
    take(id);
    std::uint64_t& cell = ring_[next_ % ring_.size()];
    if (next_ >= ring_.size()) {
      const std::size_t oldest = find(cell);
      if (table_[oldest].ticket == next_ - ring_.size() + 1) erase(oldest);
    }
    cell = id;
    ++next_;
    table_[find(id)] = {id, next_, score};
  }

  /// Forgets `id`; its score, if it was remembered.
  std::optional<double> take(std::uint64_t id) {
    const std::size_t at = find(id);
    if (table_[at].ticket == 0) return std::nullopt;
    const double score = table_[at].score;
    erase(at);
    return score;
  }

 private:
  struct Entry {
    std::uint64_t id = 0;
    std::uint64_t ticket = 0;  ///< From 1; 0 is an empty entry.
    double score = 0;
  };

  std::size_t mask() const { return table_.size() - 1; }
  std::size_t home(std::uint64_t id) const {
    const std::uint64_t mixed = (id ^ (id >> 32)) * 0x9e3779b97f4a7c15u;
    return static_cast<std::size_t>(mixed >> 20) & mask();
  }
  /// Where `id` is, or the empty entry where it would go.
  std::size_t find(std::uint64_t id) const {
    std::size_t at = home(id);
    while (table_[at].ticket != 0 && table_[at].id != id) at = (at + 1) & mask();
    return at;
  }
  void erase(std::size_t hole) {
    for (std::size_t at = (hole + 1) & mask(); table_[at].ticket != 0; at = (at + 1) & mask()) {
      // An entry may move back into the hole unless its home lies behind the hole.
      if (((at - home(table_[at].id)) & mask()) >= ((at - hole) & mask())) {
        table_[hole] = table_[at];
        hole = at;
      }
    }
    table_[hole] = {};
  }

  std::vector<std::uint64_t> ring_;
  std::vector<Entry> table_;
  std::uint64_t next_ = 0;
};

}  // namespace kvtier
