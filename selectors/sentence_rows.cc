#include "selectors/sentence_rows.h"

#include "kernels/score_rows.h"

#include <algorithm>
#include <cstring>

namespace kvtier {

SentenceRows::SentenceRows(const SelectorShape& shape, std::uint32_t cap)
    : shape_(shape),
      cap_(cap),
      units_max_(shape.tokens_max + 1),
      row_bytes_(shape.head_dim * size_of(shape.dtype)),
      tokens_(shape.tokens_max),
      begins_(units_max_),
      means_(std::size_t{shape.kv_heads} * units_max_ * row_bytes_),
      recent_capacity_(shape.window + cap + 1),
      recent_(std::size_t{shape.kv_heads} * recent_capacity_ * row_bytes_),
      gathered_(cap * row_bytes_) {
  begins_[0] = 0;
}

void SentenceRows::append(const NewTokens& tokens) {
  const std::uint32_t first = tokens.first_position;
  tokens_.append(tokens);
  for (std::uint32_t i = 0; i < tokens.tokens; ++i) {
    const std::uint32_t token = first + i;
    for (std::uint32_t head = 0; head < shape_.kv_heads; ++head) {
      std::memcpy(recent_.data() + recent_offset(head, token),
                  tokens.keys + head * tokens.key_head_stride + i * tokens.key_token_stride,
                  row_bytes_);
    }
    recent_begin_ = std::max(recent_begin_, token + 1 - std::min(token + 1, recent_capacity_));
    const bool marked = tokens.marks != nullptr && (tokens.marks[i] & kEndsSentence) != 0;
    if (!marked && token + 1 - begins_[closed_] < cap_) continue;
    average(closed_, token + 1);
    begins_[++closed_] = token + 1;
  }
}

void SentenceRows::average(std::uint32_t unit, std::uint32_t end) {
  const std::uint32_t first = std::max(begins_[unit], std::min(shape_.sinks, end));
  for (std::uint32_t head = 0; head < shape_.kv_heads; ++head) {
    std::byte* mean = means_.data() + mean_offset(head, unit);
    if (first >= end) {
      std::memset(mean, 0, row_bytes_);  // Sinks only, or nothing yet: never ranked.
      continue;
    }
    for (std::uint32_t t = first; t < end; ++t) {
      std::memcpy(gathered_.data() + (t - first) * row_bytes_,
                  recent_.data() + recent_offset(head, t), row_bytes_);
    }
    mean_rows({gathered_.data(), end - first, shape_.head_dim, row_bytes_, shape_.dtype},
              end - first, mean);
  }
}

std::uint32_t SentenceRows::unit_of(std::uint32_t position) const {
  const std::uint32_t* begins = begins_.data();
  return static_cast<std::uint32_t>(std::upper_bound(begins, begins + closed_ + 1, position) -
                                    begins) -
         1;
}

void SentenceRows::truncate(std::uint32_t position) {
  KVTIER_CHECK(truncate_floor(position) == position,
               "a cut at {} needs keys that are gone: cut at {} and append the rest again",
               position, truncate_floor(position));
  tokens_.truncate(position);
  closed_ = std::min(closed_, unit_of(position));
  recent_begin_ = std::min(recent_begin_, position);
}

std::uint32_t SentenceRows::truncate_floor(std::uint32_t position) const {
  const std::uint32_t begin = begins_[unit_of(position)];
  return begin >= recent_begin_ ? position : begin;
}

RowsView SentenceRows::rows(std::uint32_t head, std::uint32_t first, std::uint32_t count) const {
  return {means_.data() + mean_offset(head, first), count, shape_.head_dim, row_bytes_,
          shape_.dtype};
}

void SentenceRows::save(StateWriter& writer) const {
  tokens_.save(writer);
  writer.put(closed_);
  writer.put(recent_begin_);
  writer.put_array(begins_.part(0, closed_ + 1));
  for (std::uint32_t head = 0; head < shape_.kv_heads; ++head) {
    writer.put_array(means_.part(mean_offset(head, 0), closed_ * row_bytes_));
    for (std::uint32_t t = recent_begin_; t < tokens_.count(); ++t) {
      writer.put_array(recent_.part(recent_offset(head, t), row_bytes_));
    }
  }
}

Status SentenceRows::restore(StateReader& reader) {
  KVTIER_RETURN_IF_ERROR(tokens_.restore(reader));
  KVTIER_RETURN_IF_ERROR(reader.get(closed_));
  KVTIER_RETURN_IF_ERROR(reader.get(recent_begin_));
  const std::uint32_t count = tokens_.count();
  if (closed_ > count || recent_begin_ > count || count - recent_begin_ > recent_capacity_) {
    return corrupt(fmt::format("selector state: found {} sentences and keys from {} of {} tokens",
                               closed_, recent_begin_, count));
  }
  KVTIER_RETURN_IF_ERROR(reader.get_exactly(begins_.part(0, closed_ + 1)));
  for (std::uint32_t unit = 0; unit <= closed_; ++unit) {
    const std::uint64_t last = unit < closed_ ? begins_[unit + 1] : count;
    const bool sound = unit < closed_ ? last > begins_[unit] && last - begins_[unit] <= cap_
                                      : last >= begins_[unit] && last - begins_[unit] < cap_;
    if (begins_[0] == 0 && sound) continue;
    return corrupt(fmt::format("selector state: sentence {} begins at {} and ends at {}", unit,
                               begins_[unit], last));
  }
  // The open sentence's keys are needed for its mean.
  if (begins_[closed_] < recent_begin_) {
    return corrupt(fmt::format("selector state: keys from {}, but a sentence is open from {}",
                               recent_begin_, begins_[closed_]));
  }
  for (std::uint32_t head = 0; head < shape_.kv_heads; ++head) {
    KVTIER_RETURN_IF_ERROR(
        reader.get_exactly(means_.part(mean_offset(head, 0), closed_ * row_bytes_)));
    for (std::uint32_t t = recent_begin_; t < count; ++t) {
      KVTIER_RETURN_IF_ERROR(reader.get_exactly(recent_.part(recent_offset(head, t), row_bytes_)));
    }
  }
  return {};
}

std::size_t SentenceRows::metadata_bytes() const {
  return closed_ * (shape_.kv_heads * row_bytes_ + sizeof(std::uint32_t)) +
         std::size_t{shape_.kv_heads} * recent_capacity_ * row_bytes_;
}

}  // namespace kvtier
