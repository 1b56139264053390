#include "selectors/landmark_rows.h"

#include "kernels/score_rows.h"

#include <algorithm>
#include <cstring>

namespace kvtier {

LandmarkRows::LandmarkRows(const SelectorShape& shape, std::uint32_t group_tokens)
    : shape_(shape),
      row_bytes_(shape.head_dim * size_of(shape.dtype)),
      recent_(shape, group_tokens),
      means_(std::size_t{shape.kv_heads} * recent_.groups_max() * row_bytes_),
      cosines_(std::size_t{shape.head_groups()} * recent_.groups_max()) {}

void LandmarkRows::append(const NewTokens& tokens) {
  recent_.append(tokens, [this](std::uint32_t group) { close_group(group); });
}

void LandmarkRows::close_group(std::uint32_t group) {
  for (std::uint32_t head_group = 0; head_group < shape_.head_groups(); ++head_group) {
    float worst = 1.0f;
    for (std::uint32_t i = 0; i < shape_.heads_per_group; ++i) {
      const std::uint32_t head = head_group * shape_.heads_per_group + i;
      average(head, group);
      const RowsView keys = recent_.keys_of(head, group);
      if (keys.rows == 0) continue;
      float cosine = 1.0f;
      min_cosine_to_mean(keys, group_tokens(), mean(head, group), std::span(&cosine, 1));
      // Not a number where squares overflow: such keys are no landmark's.
      worst = cosine >= -1.0f ? std::min(worst, cosine) : -1.0f;
    }
    cosines_[std::size_t{head_group} * groups_max() + group] = worst;
  }
}

void LandmarkRows::average(std::uint32_t head, std::uint32_t group) {
  const RowsView keys = recent_.keys_of(head, group);
  if (keys.rows == 0) {
    std::memset(mean(head, group), 0, row_bytes_);  // Sinks only: never ranked.
  } else {
    mean_rows(keys, group_tokens(), mean(head, group));
  }
}

void LandmarkRows::average_open_group() {
  for (std::uint32_t head = 0; head < shape_.kv_heads; ++head) average(head, closed());
}

std::size_t LandmarkRows::mean_offset(std::uint32_t head, std::uint32_t group) const {
  return (std::size_t{head} * groups_max() + group) * row_bytes_;
}

std::byte* LandmarkRows::mean(std::uint32_t head, std::uint32_t group) {
  return means_.data() + mean_offset(head, group);
}

RowsView LandmarkRows::rows(std::uint32_t head, std::uint32_t first, std::uint32_t count) const {
  return {means_.data() + mean_offset(head, first), count, shape_.head_dim, row_bytes_,
          shape_.dtype};
}

void LandmarkRows::save(StateWriter& writer) const {
  recent_.save(writer);
  for (std::uint32_t head = 0; head < shape_.kv_heads; ++head) {
    writer.put_array(means_.part(mean_offset(head, 0), closed() * row_bytes_));
  }
  for (std::uint32_t i = 0; i < shape_.head_groups(); ++i) writer.put_array(cosines(i));
}

Status LandmarkRows::restore(StateReader& reader) {
  KVTIER_RETURN_IF_ERROR(recent_.restore(reader));
  for (std::uint32_t head = 0; head < shape_.kv_heads; ++head) {
    KVTIER_RETURN_IF_ERROR(
        reader.get_exactly(means_.part(mean_offset(head, 0), closed() * row_bytes_)));
  }
  for (std::uint32_t i = 0; i < shape_.head_groups(); ++i) {
    KVTIER_RETURN_IF_ERROR(
        reader.get_exactly(std::span(cosines_).subspan(std::size_t{i} * groups_max(), closed())));
  }
  return {};
}

std::size_t LandmarkRows::metadata_bytes() const {
  return std::size_t{closed()} *
             (shape_.kv_heads * row_bytes_ + shape_.head_groups() * sizeof(float)) +
         recent_.metadata_bytes();
}

}  // namespace kvtier
