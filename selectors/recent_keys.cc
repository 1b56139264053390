#include "selectors/recent_keys.h"

#include <fmt/format.h>

#include <cstring>

namespace kvtier {

RecentKeys::RecentKeys(const SelectorShape& shape, std::uint32_t group_tokens)
    : shape_(shape),
      group_tokens_(group_tokens),
      groups_max_(shape.tokens_max / group_tokens + 1),
      row_bytes_(shape.head_dim * size_of(shape.dtype)),
      tokens_(shape.tokens_max),
      keep_((shape.window + group_tokens - 1) / group_tokens * group_tokens),
      capacity_(keep_ + 4 * group_tokens),
      recent_(std::size_t{shape.kv_heads} * capacity_ * row_bytes_) {}

void RecentKeys::keep(const NewTokens& tokens, std::uint32_t from, std::uint32_t count) {
  if (from + count > begin_ + capacity_) drop_oldest();
  const std::size_t source_row = from - tokens.first_position;
  for (std::uint32_t head = 0; head < shape_.kv_heads; ++head) {
    const std::byte* source =
        tokens.keys + head * tokens.key_head_stride + source_row * tokens.key_token_stride;
    std::byte* target =
        recent_.data() + (std::size_t{head} * capacity_ + (from - begin_)) * row_bytes_;
    for (std::uint32_t t = 0; t < count; ++t) {
      std::memcpy(target + t * row_bytes_, source + t * tokens.key_token_stride, row_bytes_);
    }
  }
}

void RecentKeys::drop_oldest() {
  // Called when the room is full up to a group's edge or inside the open group: what stays is the
  // open group and `keep_` tokens before it.
  const std::uint32_t open = closed_ * group_tokens_;
  const std::uint32_t begin = open - std::min(open, keep_);
  const std::uint32_t dropped = begin - begin_;
  const std::uint32_t kept = capacity_ - dropped;
  for (std::uint32_t head = 0; head < shape_.kv_heads; ++head) {
    std::byte* first = recent_.data() + std::size_t{head} * capacity_ * row_bytes_;
    std::memmove(first, first + dropped * row_bytes_, kept * row_bytes_);
  }
  begin_ = begin;
}

void RecentKeys::truncate(std::uint32_t position) {
  KVTIER_CHECK(truncate_floor(position) == position,
               "a cut at {} needs keys that are gone: cut at {} and append the rest again",
               position, truncate_floor(position));
  tokens_.truncate(position);
  closed_ = std::min(closed_, position / group_tokens_);
  begin_ = std::min(begin_, closed_ * group_tokens_);
}

std::uint32_t RecentKeys::truncate_floor(std::uint32_t position) const {
  const std::uint32_t group_begin = position / group_tokens_ * group_tokens_;
  return group_begin >= begin_ ? position : group_begin;
}

std::uint32_t RecentKeys::first_token(std::uint32_t group) const {
  const std::uint32_t begin = group * group_tokens_;
  return std::max(begin, std::min(shape_.sinks, begin + group_tokens_));
}

std::uint32_t RecentKeys::tokens_in(std::uint32_t group) const {
  const std::uint32_t end = std::min((group + 1) * group_tokens_, tokens_.count());
  return end - std::min(end, first_token(group));
}

RowsView RecentKeys::keys_of(std::uint32_t head, std::uint32_t group) const {
  const std::uint32_t count = tokens_in(group);
  // An empty view starts at the front: the sinks may reach beyond what is kept.
  const std::uint32_t row = count == 0 ? 0 : first_token(group) - begin_;
  return {recent_.data() + (std::size_t{head} * capacity_ + row) * row_bytes_, count,
          shape_.head_dim, row_bytes_, shape_.dtype};
}

void RecentKeys::save(StateWriter& writer) const {
  tokens_.save(writer);
  writer.put(closed_);
  writer.put(begin_);
  const std::size_t kept = tokens_.count() - begin_;
  for (std::uint32_t head = 0; head < shape_.kv_heads; ++head) {
    writer.put_array(recent_.part(std::size_t{head} * capacity_ * row_bytes_, kept * row_bytes_));
  }
}

Status RecentKeys::restore(StateReader& reader) {
  KVTIER_RETURN_IF_ERROR(tokens_.restore(reader));
  KVTIER_RETURN_IF_ERROR(reader.get(closed_));
  KVTIER_RETURN_IF_ERROR(reader.get(begin_));
  const std::uint32_t count = tokens_.count();
  if (closed_ != count / group_tokens_ || begin_ > closed_ * group_tokens_ ||
      begin_ % group_tokens_ != 0 || count - begin_ > capacity_) {
    return corrupt(fmt::format("selector state: found {} groups and keys from {} of {} tokens",
                               closed_, begin_, count));
  }
  for (std::uint32_t head = 0; head < shape_.kv_heads; ++head) {
    KVTIER_RETURN_IF_ERROR(reader.get_exactly(
        recent_.part(std::size_t{head} * capacity_ * row_bytes_, (count - begin_) * row_bytes_)));
  }
  return {};
}

}  // namespace kvtier
