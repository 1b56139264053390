#pragma once

#include "memory/check.h"

#include <algorithm>
#include <bit>
#include <cstdint>
#include <vector>

namespace kvtier {

/// A row of slots, each live or not, that can be counted from any slot on. New slots are appended
/// behind; this is the time axis of an exact LRU stack, with the most recent use at the end.
///
/// Cost: ranges of slots cost a word per 64 of them and a tree update per 512, so that a request's
/// run of blocks is as cheap as one block; counting is a tree query of log2(slots / 512) steps.
///
/// Invariant: tree_ is a Fenwick tree over the live slots of each group of 512.
class LiveSlots {
 public:
  explicit LiveSlots(std::uint32_t capacity)
      : words_((std::size_t{capacity} + kGroup - 1) / kGroup * kWordsPerGroup),
        tree_(words_.size() / kWordsPerGroup + 1),
        capacity_(capacity) {}

  std::uint32_t capacity() const { return capacity_; }
  std::uint32_t next() const { return next_; }
  std::uint32_t live() const { return live_; }
  bool is_live(std::uint32_t slot) const { return (words_[slot / 64] >> slot % 64 & 1) != 0; }

  /// Makes the next `count` slots live.
  void append(std::uint32_t count) {
    KVTIER_CHECK(count <= capacity_ - next_, "{} slots behind {} of {}", count, next_, capacity_);
    change(
        next_, count, [](std::uint64_t& word, std::uint64_t mask) { word |= mask; }, 1);
    next_ += count;
    live_ += count;
  }

  /// Ends `count` live slots from `first` on.
  void erase(std::uint32_t first, std::uint32_t count) {
    change(
        first, count, [](std::uint64_t& word, std::uint64_t mask) { word &= ~mask; }, ~0u);
    live_ -= count;
  }

  /// Live slots at `slot` and behind it.
  std::uint32_t count_from(std::uint32_t slot) const {
    std::uint32_t before = 0;
    for (std::uint32_t node = slot / kGroup; node > 0; node &= node - 1) before += tree_[node];
    const std::uint32_t word = slot / 64;
    for (std::uint32_t w = slot / kGroup * kWordsPerGroup; w < word; ++w) {
      before += static_cast<std::uint32_t>(std::popcount(words_[w]));
    }
    const std::uint64_t lower = (std::uint64_t{1} << slot % 64) - 1;
    before += static_cast<std::uint32_t>(std::popcount(words_[word] & lower));
    return live_ - before;
  }

 private:
  static constexpr std::uint32_t kGroup = 512;
  static constexpr std::uint32_t kWordsPerGroup = kGroup / 64;

  // `sign` is 1 or its two's complement: counts wrap around on purpose.
  template <typename Apply>
  void change(std::uint32_t first, std::uint32_t count, Apply apply, std::uint32_t sign) {
    while (count > 0) {
      const std::uint32_t group_end = (first / kGroup + 1) * kGroup;
      const std::uint32_t part = std::min(count, group_end - first);
      for (std::uint32_t slot = first; slot < first + part;) {
        const std::uint32_t bits = std::min(64 - slot % 64, first + part - slot);
        const std::uint64_t ones = bits == 64 ? ~std::uint64_t{0} : (std::uint64_t{1} << bits) - 1;
        apply(words_[slot / 64], ones << slot % 64);
        slot += bits;
      }
      for (std::size_t node = first / kGroup + 1; node < tree_.size(); node += node & (~node + 1)) {
        tree_[node] += sign * part;
      }
      first += part;
      count -= part;
    }
  }

  std::vector<std::uint64_t> words_;
  std::vector<std::uint32_t> tree_;
  std::uint32_t capacity_;
  std::uint32_t next_ = 0;
  std::uint32_t live_ = 0;
};

}  // namespace kvtier
