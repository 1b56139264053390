#pragma once

#include "memory/check.h"
#include "selectors/selector_state.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace kvtier {

/// What a selector learnt from its last questions, newest last: a row of floats for each, with the
/// question's position and a number that the family gives a meaning. It is how a family that
/// follows questions goes back when tokens are cut: what was learnt at or behind the cut is
/// dropped, and the row below is what was known before. Only the last `capacity` rows are kept;
/// a cut that drops all of them is as if nothing had been asked.
///
/// Positions ascend. Allocates when made. One thread at a time.
class QuestionLog {
 public:
  QuestionLog(std::uint32_t capacity, std::size_t row_floats)
      : capacity_(capacity),
        row_floats_(row_floats),
        marks_(capacity),
        rows_(std::size_t{capacity} * row_floats) {}

  bool empty() const { return count_ == 0; }
  std::uint32_t count() const { return count_; }
  /// `back` = 0 is the newest.
  std::uint32_t position(std::uint32_t back = 0) const { return marks_[slot(back)].position; }
  std::uint32_t number(std::uint32_t back = 0) const { return marks_[slot(back)].number; }
  std::span<const float> row(std::uint32_t back = 0) const {
    return {rows_.data() + slot(back) * row_floats_, row_floats_};
  }

  /// Drops what was learnt at or behind `position`.
  void drop_from(std::uint32_t position) {
    while (count_ > 0 && this->position() >= position) --count_;
  }
  /// A row for the caller to fill; the oldest gives way when there are too many. What was learnt at
  /// or behind `position` goes: a question about it is asked again.
  std::span<float> add(std::uint32_t position, std::uint32_t number) {
    drop_from(position);
    if (count_ == capacity_) {
      first_ = (first_ + 1) % capacity_;
    } else {
      ++count_;
    }
    marks_[slot(0)] = {position, number};
    return {rows_.data() + slot(0) * row_floats_, row_floats_};
  }

  void save(StateWriter& writer) const {
    writer.put(count_);
    for (std::uint32_t back = count_; back-- > 0;) {
      writer.put(marks_[slot(back)]);
      writer.put_array(row(back));
    }
  }
  Status restore(StateReader& reader) {
    std::uint32_t count = 0;
    KVTIER_RETURN_IF_ERROR(reader.get(count));
    if (count > capacity_) {
      return corrupt(
          fmt::format("selector state: found {} questions, expected at most {}", count, capacity_));
    }
    for (std::uint32_t i = 0; i < count; ++i) {
      Mark mark;
      KVTIER_RETURN_IF_ERROR(reader.get(mark));
      if (i > 0 && mark.position <= position()) {
        return corrupt(fmt::format("selector state: found a question at {} behind one at {}",
                                   mark.position, position()));
      }
      KVTIER_RETURN_IF_ERROR(reader.get_exactly(add(mark.position, mark.number)));
    }
    return {};
  }

  std::size_t bytes() const { return capacity_ * (sizeof(Mark) + row_floats_ * sizeof(float)); }

 private:
  struct Mark {
    std::uint32_t position = 0;
    std::uint32_t number = 0;
  };
  std::size_t slot(std::uint32_t back) const {
    KVTIER_CHECK(back < count_ && capacity_ > 0, "question {} of {}", back, count_);
    return (first_ + count_ - 1 - back) % capacity_;
  }

  std::uint32_t capacity_;
  std::size_t row_floats_;
  std::uint32_t first_ = 0;
  std::uint32_t count_ = 0;
  std::vector<Mark> marks_;
  std::vector<float> rows_;  ///< [capacity, row_floats]
};

}  // namespace kvtier
