#pragma once

#include "kernels/kv_view.h"
#include "selectors/recent_keys.h"
#include "selectors/selector.h"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

namespace kvtier {

/// The landmarks of one layer: for every `group_tokens` consecutive tokens the mean of their keys
/// per KV head, rounded to the keys' type, and per head group how badly it stands for them (the
/// smallest cosine between a key and the mean, over the heads). Groups are those of `RecentKeys`,
/// which also keeps the newest keys, because a mean cannot give a token back.
///
/// Invariants. `closed()` groups are complete and their rows final. All of it is a function of the
/// tokens alone, however they were chunked.
///
/// Everything is allocated when made. One thread at a time.
class LandmarkRows {
 public:
  LandmarkRows(const SelectorShape& shape, std::uint32_t group_tokens);

  void append(const NewTokens& tokens);
  void truncate(std::uint32_t position) { recent_.truncate(position); }
  std::uint32_t truncate_floor(std::uint32_t position) const {
    return recent_.truncate_floor(position);
  }
  void save(StateWriter& writer) const;
  Status restore(StateReader& reader);

  /// Writes the mean of the open group as far as it has come behind the closed rows.
  void average_open_group();

  std::uint32_t group_tokens() const { return recent_.group_tokens(); }
  std::uint32_t tokens() const { return recent_.tokens(); }
  std::uint32_t closed() const { return recent_.closed(); }
  std::uint32_t groups_max() const { return recent_.groups_max(); }
  /// Tokens that the mean of `group` stands for; the open group counts what it has.
  std::uint32_t tokens_in(std::uint32_t group) const { return recent_.tokens_in(group); }

  /// Rows [first, first + count) of one KV head; the open group's only after `average_open_group`.
  RowsView rows(std::uint32_t head, std::uint32_t first, std::uint32_t count) const;
  /// Cosines of the closed groups of one head group.
  std::span<const float> cosines(std::uint32_t head_group) const {
    return {cosines_.data() + std::size_t{head_group} * groups_max(), closed()};
  }

  /// Means and cosines of the closed groups, and the room for the recent keys.
  std::size_t metadata_bytes() const;

 private:
  void close_group(std::uint32_t group);
  void average(std::uint32_t head, std::uint32_t group);
  std::size_t mean_offset(std::uint32_t head, std::uint32_t group) const;
  std::byte* mean(std::uint32_t head, std::uint32_t group);

  SelectorShape shape_;
  std::size_t row_bytes_;
  RecentKeys recent_;
  FixedArray<std::byte> means_;  ///< [KV heads, groups_max, head_dim]
  std::vector<float> cosines_;   ///< [head groups, groups_max]
};

}  // namespace kvtier
