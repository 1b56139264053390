#pragma once

#include "kernels/kv_view.h"
#include "selectors/seen_tokens.h"
#include "selectors/selector.h"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

namespace kvtier {

/// The landmarks of one layer: for every `group_tokens` consecutive tokens the mean of their keys
/// per KV head, rounded to the keys' type, and per head group how badly it stands for them (the
/// smallest cosine between a key and the mean, over the heads). Group i holds tokens
/// [i * group_tokens, (i+1) * group_tokens) without the sinks, which are always attended and unlike
/// all other keys.
///
/// Invariants. `closed()` groups are complete and their rows final. The keys of the last tokens
/// (`recent`, at least the window and the open group) are kept as they came, because a mean cannot
/// give a token back: they make cuts within the window exact and the open group's mean possible.
/// All of it is a function of the tokens alone, however they were chunked.
///
/// Everything is allocated when made. One thread at a time.
class LandmarkRows {
 public:
  LandmarkRows(const SelectorShape& shape, std::uint32_t group_tokens);

  void append(const NewTokens& tokens);
  void truncate(std::uint32_t position);
  std::uint32_t truncate_floor(std::uint32_t position) const;
  void save(StateWriter& writer) const;
  Status restore(StateReader& reader);

  /// Writes the mean of the open group as far as it has come behind the closed rows.
  void average_open_group();

  std::uint32_t group_tokens() const { return group_tokens_; }
  std::uint32_t tokens() const { return tokens_.count(); }
  std::uint32_t closed() const { return closed_; }
  std::uint32_t groups_max() const { return groups_max_; }
  /// Tokens that the mean of `group` stands for; the open group counts what it has.
  std::uint32_t tokens_in(std::uint32_t group) const;

  /// Rows [first, first + count) of one KV head; the open group's only after `average_open_group`.
  RowsView rows(std::uint32_t head, std::uint32_t first, std::uint32_t count) const;
  /// Cosines of the closed groups of one head group.
  std::span<const float> cosines(std::uint32_t head_group) const {
    return {cosines_.data() + std::size_t{head_group} * groups_max_, closed_};
  }

  /// Means and cosines of the closed groups, and the room for the recent keys.
  std::size_t metadata_bytes() const;

 private:
  void keep(const NewTokens& tokens, std::uint32_t from, std::uint32_t count);
  void drop_oldest();
  void close_group();
  void average(std::uint32_t head, std::uint32_t group, std::uint32_t end);
  std::uint32_t first_token(std::uint32_t group) const;
  RowsView recent(std::uint32_t head, std::uint32_t begin, std::uint32_t end) const;
  std::size_t mean_offset(std::uint32_t head, std::uint32_t group) const;
  std::byte* mean(std::uint32_t head, std::uint32_t group);

  SelectorShape shape_;
  std::uint32_t group_tokens_;
  std::uint32_t groups_max_;
  std::size_t row_bytes_;
  SeenTokens tokens_;
  std::uint32_t closed_ = 0;
  FixedArray<std::byte> means_;  ///< [KV heads, groups_max, head_dim]
  std::vector<float> cosines_;   ///< [head groups, groups_max]
  std::uint32_t recent_keep_;    ///< Tokens that `drop_oldest` leaves, at least.
  std::uint32_t recent_capacity_;
  std::uint32_t recent_begin_ = 0;  ///< First token kept; a multiple of `group_tokens`.
  FixedArray<std::byte> recent_;    ///< [KV heads, recent_capacity, head_dim]
};

}  // namespace kvtier
