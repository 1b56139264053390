#include "selectors/landmark_rows.h"

#include "kernels/score_rows.h"

#include <algorithm>
#include <cstring>

namespace kvtier {

LandmarkRows::LandmarkRows(const SelectorShape& shape, std::uint32_t group_tokens)
    : shape_(shape),
      group_tokens_(group_tokens),
      groups_max_(shape.tokens_max / group_tokens + 1),
      row_bytes_(shape.head_dim * size_of(shape.dtype)),
      tokens_(shape.tokens_max),
      means_(std::size_t{shape.kv_heads} * groups_max_ * row_bytes_),
      cosines_(std::size_t{shape.head_groups()} * groups_max_),
      recent_keep_((shape.window + group_tokens - 1) / group_tokens * group_tokens),
      recent_capacity_(recent_keep_ + 4 * group_tokens),
      recent_(std::size_t{shape.kv_heads} * recent_capacity_ * row_bytes_) {}

void LandmarkRows::append(const NewTokens& tokens) {
  tokens_.append(tokens);
  const std::uint32_t end = tokens_.count();
  // In pieces that end where a group does, so that a group closes at the same moment whatever the
  // chunking, and its keys are then among the recent ones.
  for (std::uint32_t t = tokens.first_position; t < end;) {
    const std::uint32_t piece = std::min(end, (closed_ + 1) * group_tokens_) - t;
    if (t + piece > recent_begin_ + recent_capacity_) drop_oldest();
    keep(tokens, t, piece);
    t += piece;
    if (t == (closed_ + 1) * group_tokens_) close_group();
  }
}

void LandmarkRows::keep(const NewTokens& tokens, std::uint32_t from, std::uint32_t count) {
  const std::size_t source_row = from - tokens.first_position;
  for (std::uint32_t head = 0; head < shape_.kv_heads; ++head) {
    const std::byte* source =
        tokens.keys + head * tokens.key_head_stride + source_row * tokens.key_token_stride;
    std::byte* target =
        recent_.data() +
        (std::size_t{head} * recent_capacity_ + (from - recent_begin_)) * row_bytes_;
    for (std::uint32_t t = 0; t < count; ++t) {
      std::memcpy(target + t * row_bytes_, source + t * tokens.key_token_stride, row_bytes_);
    }
  }
}

void LandmarkRows::drop_oldest() {
  // Called when the room is full up to a group's edge or inside the open group: what stays is the
  // open group and `recent_keep_` tokens before it.
  const std::uint32_t open = closed_ * group_tokens_;
  const std::uint32_t begin = open - std::min(open, recent_keep_);
  const std::uint32_t dropped = begin - recent_begin_;
  const std::uint32_t kept = recent_capacity_ - dropped;
  for (std::uint32_t head = 0; head < shape_.kv_heads; ++head) {
    std::byte* first = recent_.data() + std::size_t{head} * recent_capacity_ * row_bytes_;
    std::memmove(first, first + dropped * row_bytes_, kept * row_bytes_);
  }
  recent_begin_ = begin;
}

void LandmarkRows::close_group() {
  const std::uint32_t group = closed_;
  const std::uint32_t end = (group + 1) * group_tokens_;
  for (std::uint32_t head_group = 0; head_group < shape_.head_groups(); ++head_group) {
    float worst = 1.0f;
    for (std::uint32_t i = 0; i < shape_.heads_per_group; ++i) {
      const std::uint32_t head = head_group * shape_.heads_per_group + i;
      average(head, group, end);
      const RowsView keys = recent(head, first_token(group), end);
      if (keys.rows == 0) continue;
      float cosine = 1.0f;
      min_cosine_to_mean(keys, group_tokens_, mean(head, group), std::span(&cosine, 1));
      // Not a number where squares overflow: such keys are no landmark's.
      worst = cosine >= -1.0f ? std::min(worst, cosine) : -1.0f;
    }
    cosines_[std::size_t{head_group} * groups_max_ + group] = worst;
  }
  ++closed_;
}

void LandmarkRows::average(std::uint32_t head, std::uint32_t group, std::uint32_t end) {
  const RowsView keys = recent(head, first_token(group), end);
  if (keys.rows == 0) {
    std::memset(mean(head, group), 0, row_bytes_);  // Sinks only: never ranked.
  } else {
    mean_rows(keys, group_tokens_, mean(head, group));
  }
}

void LandmarkRows::average_open_group() {
  for (std::uint32_t head = 0; head < shape_.kv_heads; ++head) {
    average(head, closed_, tokens_.count());
  }
}

void LandmarkRows::truncate(std::uint32_t position) {
  KVTIER_CHECK(truncate_floor(position) == position,
               "a cut at {} needs keys that are gone: cut at {} and append the rest again",
               position, truncate_floor(position));
  tokens_.truncate(position);
  closed_ = std::min(closed_, position / group_tokens_);
  recent_begin_ = std::min(recent_begin_, closed_ * group_tokens_);
}

std::uint32_t LandmarkRows::truncate_floor(std::uint32_t position) const {
  const std::uint32_t group_begin = position / group_tokens_ * group_tokens_;
  return group_begin >= recent_begin_ ? position : group_begin;
}

std::uint32_t LandmarkRows::first_token(std::uint32_t group) const {
  const std::uint32_t begin = group * group_tokens_;
  return std::max(begin, std::min(shape_.sinks, begin + group_tokens_));
}

std::uint32_t LandmarkRows::tokens_in(std::uint32_t group) const {
  const std::uint32_t end = std::min((group + 1) * group_tokens_, tokens_.count());
  return end - std::min(end, first_token(group));
}

RowsView LandmarkRows::recent(std::uint32_t head, std::uint32_t begin, std::uint32_t end) const {
  begin = std::min(begin, end);
  return {recent_.data() +
              (std::size_t{head} * recent_capacity_ + (begin - recent_begin_)) * row_bytes_,
          end - begin, shape_.head_dim, row_bytes_, shape_.dtype};
}

std::size_t LandmarkRows::mean_offset(std::uint32_t head, std::uint32_t group) const {
  return (std::size_t{head} * groups_max_ + group) * row_bytes_;
}

std::byte* LandmarkRows::mean(std::uint32_t head, std::uint32_t group) {
  return means_.data() + mean_offset(head, group);
}

RowsView LandmarkRows::rows(std::uint32_t head, std::uint32_t first, std::uint32_t count) const {
  return {means_.data() + mean_offset(head, first), count, shape_.head_dim, row_bytes_,
          shape_.dtype};
}

void LandmarkRows::save(StateWriter& writer) const {
  tokens_.save(writer);
  writer.put(closed_);
  writer.put(recent_begin_);
  const std::size_t recent_tokens = tokens_.count() - recent_begin_;
  for (std::uint32_t head = 0; head < shape_.kv_heads; ++head) {
    writer.put_array(means_.part(mean_offset(head, 0), closed_ * row_bytes_));
    writer.put_array(recent_.part(std::size_t{head} * recent_capacity_ * row_bytes_,
                                  recent_tokens * row_bytes_));
  }
  for (std::uint32_t i = 0; i < shape_.head_groups(); ++i) writer.put_array(cosines(i));
}

Status LandmarkRows::restore(StateReader& reader) {
  KVTIER_RETURN_IF_ERROR(tokens_.restore(reader));
  KVTIER_RETURN_IF_ERROR(reader.get(closed_));
  KVTIER_RETURN_IF_ERROR(reader.get(recent_begin_));
  const std::uint32_t count = tokens_.count();
  if (closed_ != count / group_tokens_ || recent_begin_ > closed_ * group_tokens_ ||
      count - recent_begin_ > recent_capacity_) {
    return corrupt(fmt::format("selector state: found {} groups and keys from {} of {} tokens",
                               closed_, recent_begin_, count));
  }
  for (std::uint32_t head = 0; head < shape_.kv_heads; ++head) {
    KVTIER_RETURN_IF_ERROR(
        reader.get_exactly(means_.part(mean_offset(head, 0), closed_ * row_bytes_)));
    KVTIER_RETURN_IF_ERROR(reader.get_exactly(recent_.part(
        std::size_t{head} * recent_capacity_ * row_bytes_, (count - recent_begin_) * row_bytes_)));
  }
  for (std::uint32_t i = 0; i < shape_.head_groups(); ++i) {
    KVTIER_RETURN_IF_ERROR(
        reader.get_exactly(std::span(cosines_).subspan(std::size_t{i} * groups_max_, closed_)));
  }
  return {};
}

std::size_t LandmarkRows::metadata_bytes() const {
  return std::size_t{closed_} *
             (shape_.kv_heads * row_bytes_ + shape_.head_groups() * sizeof(float)) +
         std::size_t{shape_.kv_heads} * recent_capacity_ * row_bytes_;
}

}  // namespace kvtier
