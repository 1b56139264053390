#pragma once

#include "kernels/kv_view.h"
#include "selectors/seen_tokens.h"
#include "selectors/selector.h"

#include <cstddef>
#include <cstdint>

namespace kvtier {

/// The sentences of one layer and the mean key of each, per KV head, rounded to the keys' type and
/// without the sinks. A sentence ends with a token that is marked so, or after `cap` tokens.
///
/// Invariants. Sentences tile the context: unit i is [begin(i), begin(i + 1)), unit `closed()` is
/// the open one, which may be empty. Closed ones are final. The keys of the newest tokens (a window
/// and a cap) are kept as they came, so that a cut within the window can open a sentence again.
/// All of it is a function of the tokens alone, however they were chunked.
///
/// Everything is allocated when made; pages of sentences that never come are not touched. One
/// thread at a time.
class SentenceRows {
 public:
  SentenceRows(const SelectorShape& shape, std::uint32_t cap);

  void append(const NewTokens& tokens);
  void truncate(std::uint32_t position);
  std::uint32_t truncate_floor(std::uint32_t position) const;
  void save(StateWriter& writer) const;
  Status restore(StateReader& reader);

  std::uint32_t tokens() const { return tokens_.count(); }
  std::uint32_t closed() const { return closed_; }
  std::uint32_t begin(std::uint32_t unit) const { return begins_[unit]; }
  std::uint32_t end(std::uint32_t unit) const {
    return unit < closed_ ? begins_[unit + 1] : tokens_.count();
  }
  /// The unit that holds `position`; the open one for tokens still to come.
  std::uint32_t unit_of(std::uint32_t position) const;

  /// Writes the mean of the open sentence behind the closed ones'.
  void average_open() { average(closed_, tokens_.count()); }
  /// Means [first, first + count) of one KV head; the open one's only after `average_open`.
  RowsView rows(std::uint32_t head, std::uint32_t first, std::uint32_t count) const;

  std::size_t metadata_bytes() const;

 private:
  void average(std::uint32_t unit, std::uint32_t end);
  std::size_t mean_offset(std::uint32_t head, std::uint32_t unit) const {
    return (std::size_t{head} * units_max_ + unit) * row_bytes_;
  }
  std::size_t recent_offset(std::uint32_t head, std::uint32_t token) const {
    return (std::size_t{head} * recent_capacity_ + token % recent_capacity_) * row_bytes_;
  }

  SelectorShape shape_;
  std::uint32_t cap_;
  std::uint32_t units_max_;
  std::size_t row_bytes_;
  SeenTokens tokens_;
  std::uint32_t closed_ = 0;
  FixedArray<std::uint32_t> begins_;  ///< [units_max]: of the closed units and the open one.
  FixedArray<std::byte> means_;       ///< [KV heads, units_max, head_dim]
  std::uint32_t recent_capacity_;
  std::uint32_t recent_begin_ = 0;  ///< Keys of [recent_begin, tokens) are kept.
  FixedArray<std::byte> recent_;    ///< [KV heads, recent_capacity, head_dim], by token modulo.
  FixedArray<std::byte> gathered_;  ///< [cap, head_dim]: scratch.
};

}  // namespace kvtier
