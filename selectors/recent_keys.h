#pragma once

#include "kernels/kv_view.h"
#include "selectors/seen_tokens.h"
#include "selectors/selector.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace kvtier {

/// The newest keys of one layer as they came, for selectors that condense every `group_tokens`
/// consecutive tokens into something that cannot give a token back. They make cuts within the
/// window exact, and a group's keys are here when it closes.
///
/// Group i holds tokens [i * group_tokens, (i+1) * group_tokens) without the sinks, which are
/// always attended and unlike all other keys. Kept are at least the window and the open group. What
/// is kept, and when a group closes, is a function of the tokens alone, however they were chunked.
///
/// Everything is allocated when made. One thread at a time.
class RecentKeys {
 public:
  RecentKeys(const SelectorShape& shape, std::uint32_t group_tokens);

  /// `close(group)` is called for each group that these tokens complete, in order, while its keys
  /// are here; `closed()` does not count it yet.
  template <typename Close>
  void append(const NewTokens& tokens, const Close& close) {
    tokens_.append(tokens);
    const std::uint32_t end = tokens_.count();
    // In pieces that end where a group does.
    for (std::uint32_t t = tokens.first_position; t < end;) {
      const std::uint32_t piece = std::min(end, (closed_ + 1) * group_tokens_) - t;
      keep(tokens, t, piece);
      t += piece;
      if (t < (closed_ + 1) * group_tokens_) continue;
      close(closed_);
      ++closed_;
    }
  }
  void truncate(std::uint32_t position);
  std::uint32_t truncate_floor(std::uint32_t position) const;
  void save(StateWriter& writer) const;
  Status restore(StateReader& reader);

  std::uint32_t group_tokens() const { return group_tokens_; }
  std::uint32_t tokens() const { return tokens_.count(); }
  /// Groups that are complete.
  std::uint32_t closed() const { return closed_; }
  /// Most groups there can be, the open one included.
  std::uint32_t groups_max() const { return groups_max_; }

  /// First token of a group that is not a sink; the group's end if all are.
  std::uint32_t first_token(std::uint32_t group) const;
  /// Tokens of a group without sinks; the open group counts what it has.
  std::uint32_t tokens_in(std::uint32_t group) const;
  /// Keys of those tokens, for a group whose keys are still kept: the one that closes, the open
  /// one.
  RowsView keys_of(std::uint32_t head, std::uint32_t group) const;

  std::size_t metadata_bytes() const { return recent_.size(); }

 private:
  void keep(const NewTokens& tokens, std::uint32_t from, std::uint32_t count);
  void drop_oldest();

  SelectorShape shape_;
  std::uint32_t group_tokens_;
  std::uint32_t groups_max_;
  std::size_t row_bytes_;
  SeenTokens tokens_;
  std::uint32_t closed_ = 0;
  std::uint32_t keep_;  ///< Tokens before the open group that `drop_oldest` leaves.
  std::uint32_t capacity_;
  std::uint32_t begin_ = 0;       ///< First token kept; a multiple of `group_tokens`.
  FixedArray<std::byte> recent_;  ///< [KV heads, capacity, head_dim]
};

}  // namespace kvtier
