#pragma once

#include "memory/check.h"

#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <span>
#include <vector>

namespace kvtier {

/// Doubly linked lists over places 0 .. capacity-1, each place in at most one of them. Every
/// operation is O(1); memory is taken once.
///
/// Invariant: list l is the ring through its sentinel `capacity + l`; a place outside every list
/// has no neighbours.
class PlaceLists {
 public:
  static constexpr std::uint32_t kNone = std::numeric_limits<std::uint32_t>::max();

  PlaceLists(std::uint32_t capacity, std::uint32_t lists)
      : capacity_(capacity), links_(std::size_t{capacity} + lists), sizes_(lists) {
    for (std::uint32_t l = 0; l < lists; ++l) links_[capacity + l] = {capacity + l, capacity + l};
  }

  std::uint32_t capacity() const { return capacity_; }
  bool contains(std::uint32_t place) const {
    KVTIER_CHECK(place < capacity_, "place {} of {}", place, capacity_);
    return links_[place].next != kNone;
  }
  std::uint32_t size(std::uint32_t list) const { return sizes_[list]; }
  /// The place that was pushed first; `kNone` of an empty list.
  std::uint32_t back(std::uint32_t list) const {
    const std::uint32_t place = links_[capacity_ + list].previous;
    return place < capacity_ ? place : kNone;
  }
  /// The next place towards the front; `kNone` at the front.
  std::uint32_t ahead_of(std::uint32_t place) const {
    KVTIER_CHECK(contains(place), "place {} is empty", place);
    const std::uint32_t ahead = links_[place].previous;
    return ahead < capacity_ ? ahead : kNone;
  }

  void push_front(std::uint32_t list, std::uint32_t place) {
    KVTIER_CHECK(!contains(place), "place {} is taken", place);
    const std::uint32_t head = capacity_ + list;
    links_[place] = {links_[head].next, head};
    links_[links_[head].next].previous = place;
    links_[head].next = place;
    ++sizes_[list];
  }

  void erase(std::uint32_t list, std::uint32_t place) {
    KVTIER_CHECK(contains(place), "place {} is empty", place);
    const Link link = links_[place];
    links_[link.previous].next = link.next;
    links_[link.next].previous = link.previous;
    links_[place] = {};
    --sizes_[list];
  }

  void move_to_front(std::uint32_t list, std::uint32_t place) {
    erase(list, place);
    push_front(list, place);
  }

  /// Takes out the place that was pushed first of those whose `held` count is zero; none when all
  /// are held. Held places met on the way go to the front, so that each is passed over once and not
  /// at every call: O(1) amortised.
  std::optional<std::uint32_t> take_back(std::uint32_t list, std::span<const std::uint16_t> held) {
    for (std::uint32_t unseen = sizes_[list]; unseen > 0; --unseen) {
      const std::uint32_t place = links_[capacity_ + list].previous;
      if (held[place] == 0) {
        erase(list, place);
        return place;
      }
      move_to_front(list, place);
    }
    return std::nullopt;
  }

 private:
  struct Link {
    std::uint32_t next = kNone;
    std::uint32_t previous = kNone;
  };

  std::uint32_t capacity_;
  std::vector<Link> links_;
  std::vector<std::uint32_t> sizes_;
};

}  // namespace kvtier
