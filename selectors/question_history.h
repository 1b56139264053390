#pragma once

#include "selectors/selector_state.h"

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

namespace kvtier {

/// The last few versions of what a selector remembers of its questions, so that a cut can go back
/// to what was remembered before the questions it forgets.
///
/// A step that verifies a draft asks once, at the draft's first position, so rejecting a draft
/// forgets nothing here; going back by single steps is exact for `kQuestionVersions` of them. A cut
/// behind all of them leaves nothing remembered, as before the first question.
///
/// `T` is copied into places that exist already: with vectors of enough capacity nothing is
/// allocated. One thread at a time.
inline constexpr std::size_t kQuestionVersions = 8;

template <typename T>
class QuestionHistory {
 public:
  explicit QuestionHistory(const T& blank) : slots_(kQuestionVersions, {0, blank}) {}

  /// After the last question; null before the first.
  const T* newest() const { return count_ == 0 ? nullptr : &slots_[count_ - 1].second; }

  /// `now` is remembered after the question at `position`.
  void add(std::uint32_t position, const T& now) {
    if (count_ == slots_.size()) {
      std::rotate(slots_.begin(), slots_.begin() + 1, slots_.end());
      --count_;
    }
    slots_[count_].first = position;
    slots_[count_].second = now;
    ++count_;
  }
  /// Forgets every question at or behind `position`.
  void truncate(std::uint32_t position) {
    std::size_t kept = 0;
    for (std::size_t i = 0; i < count_; ++i) {
      if (slots_[i].first < position) std::swap(slots_[kept++], slots_[i]);
    }
    count_ = kept;
  }

  /// Calls `body(T&)` for every place, used or not: to give copies their capacity.
  template <typename Body>
  void for_each(const Body& body) {
    for (auto& slot : slots_) body(slot.second);
  }
  /// `put(writer, const T&)`; `get(reader, T&)` returns a status and checks what it reads.
  template <typename Put>
  void save(StateWriter& writer, const Put& put) const {
    writer.put(static_cast<std::uint32_t>(count_));
    for (std::size_t i = 0; i < count_; ++i) {
      writer.put(slots_[i].first);
      put(writer, slots_[i].second);
    }
  }
  template <typename Get>
  Status restore(StateReader& reader, const Get& get) {
    std::uint32_t count = 0;
    KVTIER_RETURN_IF_ERROR(reader.get(count));
    if (count > slots_.size()) {
      return corrupt(
          fmt::format("selector state: found {} remembered questions, expected at most "
                      "{}",
                      count, slots_.size()));
    }
    for (std::size_t i = 0; i < count; ++i) {
      KVTIER_RETURN_IF_ERROR(reader.get(slots_[i].first));
      KVTIER_RETURN_IF_ERROR(get(reader, slots_[i].second));
    }
    count_ = count;
    return {};
  }

 private:
  std::vector<std::pair<std::uint32_t, T>>
      slots_;  ///< [0, count): position asked at, oldest first.
  std::size_t count_ = 0;
};

}  // namespace kvtier
