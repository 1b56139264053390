#pragma once

#include "kernels/kv_view.h"
#include "selectors/recent_rows.h"
#include "selectors/selector.h"

#include <cstddef>
#include <cstdint>

namespace kvtier {

/// What is kept of the keys, or the values, of every `group_tokens` consecutive tokens: their mean
/// per KV head, rounded to their type, and on request the box around them. Sinks take no part: they
/// are always attended, and unlike all others. A group of sinks only has rows of zeros.
///
/// Groups are recorded when they are complete; the open one on request, over the tokens that are
/// asked for. Everything is allocated when made. One thread at a time.
class GroupRows {
 public:
  struct Options {
    std::uint32_t group_tokens = 16;
    bool of_values = false;  ///< Else of the keys.
    bool boxes = false;      ///< Also the largest and smallest element of each channel.
  };
  GroupRows(const SelectorShape& shape, Options options);

  void append(const NewTokens& tokens);
  void truncate(std::uint32_t position) { recent_.truncate(position); }
  std::uint32_t truncate_floor(std::uint32_t position) const {
    return recent_.truncate_floor(position);
  }
  void save(StateWriter& writer) const;
  Status restore(StateReader& reader);
  /// Means and boxes of the complete groups, and the room for the recent rows.
  std::size_t metadata_bytes() const;

  std::uint32_t group_tokens() const { return options_.group_tokens; }
  std::uint32_t closed() const { return recent_.closed(); }
  std::uint32_t groups_max() const { return groups_max_; }

  /// Records the open group over its tokens before `end`, behind the complete ones. Nothing to do
  /// when they are all in complete groups.
  void record_open_group(std::uint32_t end);

  /// Rows [first, first + count) of one KV head.
  RowsView means(std::uint32_t head, std::uint32_t first, std::uint32_t count) const;
  /// [dim] largest, then [dim] smallest elements.
  RowsView boxes(std::uint32_t head, std::uint32_t first, std::uint32_t count) const;

 private:
  void record(std::uint32_t group, std::uint32_t end);
  std::size_t mean_offset(std::uint32_t head, std::uint32_t group) const {
    return (std::size_t{head} * groups_max_ + group) * recent_.row_bytes();
  }

  Options options_;
  std::uint32_t sinks_;
  std::uint32_t groups_max_;
  RecentRows recent_;
  FixedArray<std::byte> means_;  ///< [KV heads, groups_max, dim]
  FixedArray<std::byte> boxes_;  ///< [KV heads, groups_max, 2, dim], or empty.
};

}  // namespace kvtier
