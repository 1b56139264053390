#pragma once

#include "kernels/kv_view.h"
#include "selectors/seen_tokens.h"
#include "selectors/selector.h"
#include "selectors/selector_state.h"

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace kvtier {

/// Every key of a layer, side by side per KV head: what selectors keep that score tokens by the
/// keys themselves. Room for `SelectorShape::tokens_max` is taken when made. One thread at a time,
/// reading apart.
class KeptKeys {
 public:
  explicit KeptKeys(const SelectorShape& shape)
      : heads_(shape.kv_heads),
        dim_(shape.head_dim),
        dtype_(shape.dtype),
        tokens_max_(shape.tokens_max),
        tokens_(shape.tokens_max),
        keys_(std::size_t{heads_} * tokens_max_ * row_bytes()) {}

  void append(const NewTokens& tokens) {
    tokens_.append(tokens);
    for (std::uint32_t head = 0; head < heads_; ++head) {
      std::byte* target = keys_.data() + offset(head, tokens.first_position);
      const std::byte* source = tokens.keys + head * tokens.key_head_stride;
      for (std::uint32_t t = 0; t < tokens.tokens; ++t) {
        std::memcpy(target + t * row_bytes(), source + t * tokens.key_token_stride, row_bytes());
      }
    }
  }
  void truncate(std::uint32_t position) { tokens_.truncate(position); }

  std::uint32_t count() const { return tokens_.count(); }
  /// Keys of tokens [begin, end) of one KV head.
  RowsView rows(std::uint32_t head, std::uint32_t begin, std::uint32_t end) const {
    return {keys_.data() + offset(head, begin), end - begin, dim_, row_bytes(), dtype_};
  }
  std::size_t bytes() const { return std::size_t{heads_} * tokens_.count() * row_bytes(); }

  void save(StateWriter& writer) const {
    tokens_.save(writer);
    for (std::uint32_t head = 0; head < heads_; ++head) {
      writer.put_array(keys_.part(offset(head, 0), tokens_.count() * row_bytes()));
    }
  }
  Status restore(StateReader& reader) {
    KVTIER_RETURN_IF_ERROR(tokens_.restore(reader));
    for (std::uint32_t head = 0; head < heads_; ++head) {
      KVTIER_RETURN_IF_ERROR(
          reader.get_exactly(keys_.part(offset(head, 0), tokens_.count() * row_bytes())));
    }
    return {};
  }

 private:
  std::size_t row_bytes() const { return dim_ * size_of(dtype_); }
  std::size_t offset(std::uint32_t head, std::uint32_t token) const {
    return (std::size_t{head} * tokens_max_ + token) * row_bytes();
  }

  std::uint32_t heads_;
  std::uint32_t dim_;
  DType dtype_;
  std::uint32_t tokens_max_;
  SeenTokens tokens_;
  FixedArray<std::byte> keys_;  ///< [KV heads, tokens_max, head_dim]
};

}  // namespace kvtier
