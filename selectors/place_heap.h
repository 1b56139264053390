#pragma once

#include "memory/check.h"

#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

namespace kvtier {

/// A binary heap over places 0 .. capacity-1 with the smallest score on top; of equal scores, the
/// lower place. O(log n) for each change; memory is taken once.
///
/// Invariants: heap_[i] comes no later than its children heap_[2i+1] and heap_[2i+2]; position_ is
/// the inverse of heap_, kAbsent for places outside.
class PlaceHeap {
 public:
  explicit PlaceHeap(std::uint32_t capacity) : scores_(capacity), position_(capacity, kAbsent) {
    heap_.reserve(capacity);
  }

  std::uint32_t capacity() const { return static_cast<std::uint32_t>(scores_.size()); }
  std::uint32_t size() const { return static_cast<std::uint32_t>(heap_.size()); }
  bool contains(std::uint32_t place) const {
    KVTIER_CHECK(place < capacity(), "place {} of {}", place, capacity());
    return position_[place] != kAbsent;
  }
  double score(std::uint32_t place) const {
    KVTIER_CHECK(contains(place), "place {} is empty", place);
    return scores_[place];
  }
  /// The heap must not be empty.
  std::uint32_t top() const {
    KVTIER_CHECK(!heap_.empty(), "the heap is empty");
    return heap_.front();
  }

  void push(std::uint32_t place, double score) {
    KVTIER_CHECK(!contains(place), "place {} is taken", place);
    scores_[place] = score;
    position_[place] = size();
    heap_.push_back(place);
    sift_up(position_[place]);
  }

  void update(std::uint32_t place, double score) {
    KVTIER_CHECK(contains(place), "place {} is empty", place);
    scores_[place] = score;
    sift_up(position_[place]);
    sift_down(position_[place]);
  }

  void erase(std::uint32_t place) {
    KVTIER_CHECK(contains(place), "place {} is empty", place);
    const std::uint32_t hole = position_[place];
    const std::uint32_t last = heap_.back();
    heap_.pop_back();
    position_[place] = kAbsent;
    if (last == place) return;
    heap_[hole] = last;
    position_[last] = hole;
    sift_up(hole);
    sift_down(position_[last]);
  }

 private:
  static constexpr std::uint32_t kAbsent = std::numeric_limits<std::uint32_t>::max();

  bool before(std::uint32_t a, std::uint32_t b) const {
    return std::pair(scores_[a], a) < std::pair(scores_[b], b);
  }
  void swap_at(std::uint32_t i, std::uint32_t j) {
    std::swap(heap_[i], heap_[j]);
    position_[heap_[i]] = i;
    position_[heap_[j]] = j;
  }
  void sift_up(std::uint32_t i) {
    while (i > 0 && before(heap_[i], heap_[(i - 1) / 2])) {
      swap_at(i, (i - 1) / 2);
      i = (i - 1) / 2;
    }
  }
  void sift_down(std::uint32_t i) {
    while (true) {
      std::uint32_t least = i;
      for (const std::uint32_t child : {2 * i + 1, 2 * i + 2}) {
        if (child < size() && before(heap_[child], heap_[least])) least = child;
      }
      if (least == i) return;
      swap_at(i, least);
      i = least;
    }
  }

  std::vector<double> scores_;
  std::vector<std::uint32_t> heap_;
  std::vector<std::uint32_t> position_;
};

}  // namespace kvtier
