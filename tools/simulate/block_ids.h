#pragma once

#include <cstdint>
#include <vector>

namespace kvtier {

/// A block of a trace: its number in the order of first appearance.
using BlockNumber = std::uint32_t;
/// The number of no block.
inline constexpr BlockNumber kNoBlock = 0xFFFFFFFF;

/// Numbers block ids in the order in which they are first seen. An id means something only inside
/// its scope: a session, a model, or, re-keyed through a trie, the block before it.
///
/// Allocates when it grows; 32 bytes per block at the fullest, 64 just after growing.
///
/// Invariant: an entry lies at or behind the place its hash names, with no empty one in between,
/// and at most half of the table is used. Ids that differ only in their last 5 bits are neighbours,
/// since traces count ids up: one request then walks through memory instead of jumping.
class BlockIds {
 public:
  BlockIds() : entries_(kLeastEntries) {}

  std::uint32_t size() const { return size_; }

  BlockNumber intern(std::uint32_t scope, std::uint64_t id) {
    std::size_t place = place_of(scope, id);
    while (entries_[place].number != 0) {
      if (entries_[place].id == id && entries_[place].scope == scope) {
        return entries_[place].number - 1;
      }
      place = (place + 1) & (entries_.size() - 1);
    }
    entries_[place] = {id, scope, ++size_};
    if (2 * std::size_t{size_} > entries_.size()) grow();
    return size_ - 1;
  }

 private:
  static constexpr std::size_t kLeastEntries = 1024;
  static constexpr unsigned kNeighbourBits = 5;

  struct Entry {
    std::uint64_t id = 0;
    std::uint32_t scope = 0;
    std::uint32_t number = 0;  ///< 0: empty; otherwise the block's number plus 1.
  };

  std::size_t place_of(std::uint32_t scope, std::uint64_t id) const {
    // The finaliser of MurmurHash3 spreads whatever bits differ over all 64.
    std::uint64_t hash = (id >> kNeighbourBits) ^ (std::uint64_t{scope} * 0x9E3779B97F4A7C15u);
    hash = (hash ^ (hash >> 33)) * 0xFF51AFD7ED558CCDu;
    hash = (hash ^ (hash >> 33)) * 0xC4CEB9FE1A85EC53u;
    hash ^= hash >> 33;
    const std::uint64_t neighbours = (std::uint64_t{1} << kNeighbourBits) - 1;
    return static_cast<std::size_t>((hash << kNeighbourBits) | (id & neighbours)) &
           (entries_.size() - 1);
  }

  void grow() {
    std::vector<Entry> old(2 * entries_.size());
    old.swap(entries_);
    for (const Entry& entry : old) {
      if (entry.number == 0) continue;
      std::size_t place = place_of(entry.scope, entry.id);
      while (entries_[place].number != 0) place = (place + 1) & (entries_.size() - 1);
      entries_[place] = entry;
    }
  }

  std::vector<Entry> entries_;
  std::uint32_t size_ = 0;
};

}  // namespace kvtier
