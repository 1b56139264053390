#pragma once

#include "memory/check.h"
#include "selectors/selector_state.h"

#include <fmt/format.h>

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace kvtier {

/// Versions to go back to for families that remember one thing: going back by single steps is
/// exact for so many.
inline constexpr std::size_t kQuestionVersions = 8;

/// What a selector remembers of its last questions, a version for each, newest last, so that a cut
/// can go back to what was remembered before the questions it forgets. Only the last `capacity`
/// are kept; a cut behind all of them leaves nothing remembered, as before the first question.
///
/// A step that verifies a draft asks once, at the draft's first position, so rejecting a draft
/// forgets nothing here.
///
/// Positions ascend: a question about a place forgets what was remembered at or behind it. `T` is
/// copied into places that exist already: with vectors of enough capacity nothing is allocated
/// after it was made. One thread at a time.
template <typename T>
class QuestionHistory {
 public:
  /// Every place begins as a copy of `blank`.
  QuestionHistory(std::size_t capacity, const T& blank) : slots_(capacity, {0, blank}) {
    KVTIER_CHECK(capacity > 0, "a history of no questions");
  }

  bool empty() const { return count_ == 0; }
  std::uint32_t count() const { return count_; }
  /// `back` = 0 is the newest.
  std::uint32_t position(std::uint32_t back = 0) const { return slot(back).first; }
  const T& version(std::uint32_t back = 0) const { return slot(back).second; }
  /// After the last question; null before the first.
  const T* newest() const { return count_ == 0 ? nullptr : &version(); }

  /// A place for the caller to fill with what is remembered after the question at `position`; the
  /// oldest gives way when there are too many.
  T& add(std::uint32_t position) {
    drop_from(position);
    if (count_ == slots_.size()) {
      first_ = (first_ + 1) % slots_.size();
    } else {
      ++count_;
    }
    auto& added = slots_[place(0)];
    added.first = position;
    return added.second;
  }
  /// Forgets every question at or behind `position`.
  void drop_from(std::uint32_t position) {
    while (count_ > 0 && this->position() >= position) --count_;
  }

  /// Calls `body(T&)` for every place, used or not: to give copies their capacity.
  template <typename Body>
  void for_each(const Body& body) {
    for (auto& slot : slots_) body(slot.second);
  }
  /// `put(writer, const T&)`; `get(reader, T&)` returns a status and checks what it reads.
  template <typename Put>
  void save(StateWriter& writer, const Put& put) const {
    writer.put(count_);
    for (std::uint32_t back = count_; back-- > 0;) {
      writer.put(position(back));
      put(writer, version(back));
    }
  }
  template <typename Get>
  Status restore(StateReader& reader, const Get& get) {
    std::uint32_t count = 0;
    KVTIER_RETURN_IF_ERROR(reader.get(count));
    if (count > slots_.size()) {
      return corrupt(fmt::format("selector state: found {} questions, expected at most {}", count,
                                 slots_.size()));
    }
    for (std::uint32_t i = 0; i < count; ++i) {
      std::uint32_t at = 0;
      KVTIER_RETURN_IF_ERROR(reader.get(at));
      if (!empty() && at <= position()) {
        return corrupt(
            fmt::format("selector state: found a question at {} behind one at {}", at, position()));
      }
      KVTIER_RETURN_IF_ERROR(get(reader, add(at)));
    }
    return {};
  }

 private:
  std::size_t place(std::uint32_t back) const {
    KVTIER_CHECK(back < count_, "question {} of {}", back, count_);
    return (first_ + count_ - 1 - back) % slots_.size();
  }
  const std::pair<std::uint32_t, T>& slot(std::uint32_t back) const { return slots_[place(back)]; }

  /// A ring of (position asked at, version): `count_` of them from `first_` on, oldest first.
  std::vector<std::pair<std::uint32_t, T>> slots_;
  std::size_t first_ = 0;
  std::uint32_t count_ = 0;
};

}  // namespace kvtier
