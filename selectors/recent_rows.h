#pragma once

#include "kernels/kv_view.h"
#include "selectors/seen_tokens.h"
#include "selectors/selector.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

namespace kvtier {

/// Rows of new tokens: their keys or their values.
struct NewRows {
  const NewTokens& tokens;
  const std::byte* rows = nullptr;
  std::size_t token_stride = 0;
  std::size_t head_stride = 0;

  static NewRows keys(const NewTokens& tokens) {
    return {tokens, tokens.keys, tokens.key_token_stride, tokens.key_head_stride};
  }
  static NewRows values(const NewTokens& tokens) {
    return {tokens, tokens.values, tokens.value_token_stride, tokens.value_head_stride};
  }
};

/// The newest rows of every KV head as they came, for what keeps one record per group of tokens
/// (codes of a run, a mean): a record cannot give a token back. Group i is tokens
/// [i * group_tokens, (i+1) * group_tokens); the rows of the open last group and of at least the
/// last `keep_tokens` tokens are here, which makes cuts among those exact.
///
/// A ring: token t lies at place t % capacity, the capacity being whole groups, so the rows of a
/// group are contiguous and nothing is ever moved. Allocates when made. One thread at a time.
class RecentRows {
 public:
  struct Format {
    std::uint32_t heads = 1;
    std::uint32_t dim = 64;
    DType dtype = DType::kF16;
    std::uint32_t group_tokens = 64;
    std::uint32_t keep_tokens = 64;
    std::uint32_t tokens_max = 0;
  };

  explicit RecentRows(const Format& format)
      : format_(format),
        row_bytes_(format.dim * size_of(format.dtype)),
        capacity_((format.keep_tokens + format.group_tokens - 1) / format.group_tokens *
                      format.group_tokens +
                  2 * format.group_tokens),
        tokens_(format.tokens_max),
        rows_(std::size_t{format.heads} * capacity_ * row_bytes_) {}

  /// Takes rows and calls `close(group)` whenever a group is complete: the same calls in the same
  /// order whatever the chunking.
  template <typename Close>
  void append(const NewRows& source, const Close& close) {
    const std::uint32_t first = source.tokens.first_position;
    tokens_.append(source.tokens);
    for (std::uint32_t t = first; t < tokens_.count();) {
      const std::uint32_t group = t / format_.group_tokens;
      const std::uint32_t end = std::min(tokens_.count(), (group + 1) * format_.group_tokens);
      keep(source, t, end);
      if (end == (group + 1) * format_.group_tokens) close(group);
      t = end;
    }
  }

  void truncate(std::uint32_t position) {
    KVTIER_CHECK(truncate_floor(position) == position,
                 "a cut at {} needs rows that are gone: cut at {} and append the rest again",
                 position, truncate_floor(position));
    tokens_.truncate(position);
    begin_ = std::min(begin_, closed() * format_.group_tokens);
  }
  std::uint32_t truncate_floor(std::uint32_t position) const {
    const std::uint32_t group_begin = position / format_.group_tokens * format_.group_tokens;
    return group_begin >= begin_ ? position : group_begin;
  }

  std::uint32_t tokens() const { return tokens_.count(); }
  /// Complete groups.
  std::uint32_t closed() const { return tokens_.count() / format_.group_tokens; }
  const Format& format() const { return format_; }
  std::size_t row_bytes() const { return row_bytes_; }

  /// Rows [begin, end) of one head, all of one group.
  RowsView rows(std::uint32_t head, std::uint32_t begin, std::uint32_t end) const {
    begin = std::min(begin, end);
    return {rows_.data() + offset(head, begin), end - begin, format_.dim, row_bytes_,
            format_.dtype};
  }

  void save(StateWriter& writer) const {
    tokens_.save(writer);
    writer.put(begin_);
    for (std::uint32_t part = 0; part < parts(); ++part) {
      const auto [at, bytes] = part_of(part);
      writer.put_array(rows_.part(at, bytes));
    }
  }
  Status restore(StateReader& reader) {
    KVTIER_RETURN_IF_ERROR(tokens_.restore(reader));
    KVTIER_RETURN_IF_ERROR(reader.get(begin_));
    if (begin_ % format_.group_tokens != 0 || begin_ > closed() * format_.group_tokens ||
        tokens_.count() - begin_ > capacity_) {
      return corrupt(
          fmt::format("selector state: found rows from {} of {} tokens", begin_, tokens_.count()));
    }
    for (std::uint32_t part = 0; part < parts(); ++part) {
      const auto [at, bytes] = part_of(part);
      KVTIER_RETURN_IF_ERROR(reader.get_exactly(rows_.part(at, bytes)));
    }
    return {};
  }

  /// The room for the rows.
  std::size_t metadata_bytes() const { return rows_.size(); }

 private:
  std::size_t offset(std::uint32_t head, std::uint32_t token) const {
    return (std::size_t{head} * capacity_ + token % capacity_) * row_bytes_;
  }

  void keep(const NewRows& source, std::uint32_t begin, std::uint32_t end) {
    if (end > begin_ + capacity_) {
      const std::uint32_t lost = end - capacity_;
      begin_ = (lost + format_.group_tokens - 1) / format_.group_tokens * format_.group_tokens;
    }
    const std::size_t first = begin - source.tokens.first_position;
    for (std::uint32_t head = 0; head < format_.heads; ++head) {
      const std::byte* from = source.rows + head * source.head_stride + first * source.token_stride;
      std::byte* target = rows_.data() + offset(head, begin);
      for (std::uint32_t t = 0; t < end - begin; ++t) {
        std::memcpy(target + t * row_bytes_, from + t * source.token_stride, row_bytes_);
      }
    }
  }

  /// What is saved: the rows kept, a group of one head at a time.
  std::uint32_t parts() const {
    const std::uint32_t groups =
        (tokens_.count() - begin_ + format_.group_tokens - 1) / format_.group_tokens;
    return groups * format_.heads;
  }
  /// Offset and length in bytes.
  std::pair<std::size_t, std::size_t> part_of(std::uint32_t part) const {
    const std::uint32_t token = begin_ + part / format_.heads * format_.group_tokens;
    const std::uint32_t count = std::min(format_.group_tokens, tokens_.count() - token);
    return {offset(part % format_.heads, token), count * row_bytes_};
  }

  Format format_;
  std::size_t row_bytes_;
  std::uint32_t capacity_;
  SeenTokens tokens_;
  std::uint32_t begin_ = 0;     ///< First token kept; a multiple of `group_tokens`.
  FixedArray<std::byte> rows_;  ///< [heads, capacity, dim]
};

}  // namespace kvtier
