#pragma once

#include "selectors/question_history.h"
#include "selectors/selector_state.h"

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace kvtier {

/// What a selector learnt from its last questions, where that is a row of floats and a number that
/// the family gives a meaning: a `QuestionHistory` of such rows. What was learnt at or behind a cut
/// is dropped, and the row below is what was known before.
///
/// Allocates when made. One thread at a time.
class QuestionLog {
 public:
  QuestionLog(std::uint32_t capacity, std::size_t row_floats)
      : capacity_(capacity),
        row_floats_(row_floats),
        rows_(capacity, {0, std::vector<float>(row_floats)}) {}

  bool empty() const { return rows_.empty(); }
  std::uint32_t count() const { return rows_.count(); }
  /// `back` = 0 is the newest.
  std::uint32_t position(std::uint32_t back = 0) const { return rows_.position(back); }
  std::uint32_t number(std::uint32_t back = 0) const { return rows_.version(back).number; }
  std::span<const float> row(std::uint32_t back = 0) const { return rows_.version(back).floats; }

  /// Drops what was learnt at or behind `position`.
  void drop_from(std::uint32_t position) { rows_.drop_from(position); }
  /// A row for the caller to fill; see `QuestionHistory::add`.
  std::span<float> add(std::uint32_t position, std::uint32_t number) {
    Row& row = rows_.add(position);
    row.number = number;
    return row.floats;
  }

  void save(StateWriter& writer) const {
    rows_.save(writer, [](StateWriter& to, const Row& row) {
      to.put(row.number);
      to.put_array(std::span(row.floats));
    });
  }
  Status restore(StateReader& reader) {
    return rows_.restore(reader, [](StateReader& from, Row& row) {
      KVTIER_RETURN_IF_ERROR(from.get(row.number));
      return from.get_exactly(std::span(row.floats));
    });
  }

  /// Of the numbers, positions and floats.
  std::size_t bytes() const {
    return capacity_ * (2 * sizeof(std::uint32_t) + row_floats_ * sizeof(float));
  }

 private:
  struct Row {
    std::uint32_t number = 0;
    std::vector<float> floats;
  };

  std::uint32_t capacity_;
  std::size_t row_floats_;
  QuestionHistory<Row> rows_;
};

}  // namespace kvtier
