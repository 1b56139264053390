#pragma once

#include "kernels/kv_view.h"
#include "selectors/recent_rows.h"
#include "selectors/selector.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace kvtier {

/// The newest keys of one layer as they came, for selectors that condense every `group_tokens`
/// consecutive tokens into something that cannot give a token back: `RecentRows` of the keys, seen
/// without the sinks, which are always attended and unlike all other keys.
///
/// What is kept, and when a group closes, is a function of the tokens alone, however they were
/// chunked. Everything is allocated when made. One thread at a time.
class RecentKeys {
 public:
  RecentKeys(const SelectorShape& shape, std::uint32_t group_tokens)
      : sinks_(shape.sinks),
        groups_max_(shape.tokens_max / group_tokens + 1),
        rows_({.heads = shape.kv_heads,
               .dim = shape.head_dim,
               .dtype = shape.dtype,
               .group_tokens = group_tokens,
               .keep_tokens = shape.window,
               .tokens_max = shape.tokens_max}) {}

  /// `close(group)` is called for each group that these tokens complete, in order, while its keys
  /// are here.
  template <typename Close>
  void append(const NewTokens& tokens, const Close& close) {
    rows_.append(NewRows::keys(tokens), close);
  }
  void truncate(std::uint32_t position) { rows_.truncate(position); }
  std::uint32_t truncate_floor(std::uint32_t position) const {
    return rows_.truncate_floor(position);
  }
  void save(StateWriter& writer) const { rows_.save(writer); }
  Status restore(StateReader& reader) { return rows_.restore(reader); }

  std::uint32_t group_tokens() const { return rows_.format().group_tokens; }
  std::uint32_t tokens() const { return rows_.tokens(); }
  /// Groups that are complete.
  std::uint32_t closed() const { return rows_.closed(); }
  /// Most groups there can be, the open one included.
  std::uint32_t groups_max() const { return groups_max_; }

  /// First token of a group that is not a sink; the group's end if all are.
  std::uint32_t first_token(std::uint32_t group) const {
    const std::uint32_t begin = group * group_tokens();
    return std::max(begin, std::min(sinks_, begin + group_tokens()));
  }
  /// Tokens of a group without sinks; the open group counts what it has.
  std::uint32_t tokens_in(std::uint32_t group) const {
    return end(group) - std::min(end(group), first_token(group));
  }
  /// Keys of those tokens, for a group whose keys are still kept: the one that closes, the open
  /// one.
  RowsView keys_of(std::uint32_t head, std::uint32_t group) const {
    return rows_.rows(head, first_token(group), end(group));
  }

  std::size_t metadata_bytes() const { return rows_.metadata_bytes(); }

 private:
  std::uint32_t end(std::uint32_t group) const {
    return std::min((group + 1) * group_tokens(), tokens());
  }

  std::uint32_t sinks_;
  std::uint32_t groups_max_;
  RecentRows rows_;
};

}  // namespace kvtier
