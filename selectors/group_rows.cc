#include "selectors/group_rows.h"

#include "kernels/score_bounds.h"
#include "kernels/score_rows.h"

#include <algorithm>
#include <cstring>

namespace kvtier {

GroupRows::GroupRows(const SelectorShape& shape, Options options)
    : options_(options),
      sinks_(shape.sinks),
      groups_max_(shape.tokens_max / options.group_tokens + 1),
      recent_({.heads = shape.kv_heads,
               .dim = options.of_values ? shape.value_dim : shape.head_dim,
               .dtype = shape.dtype,
               .group_tokens = options.group_tokens,
               .keep_tokens = shape.window,
               .tokens_max = shape.tokens_max}),
      means_(mean_offset(shape.kv_heads, 0)),
      boxes_(options.boxes ? 2 * mean_offset(shape.kv_heads, 0) : 0) {}

void GroupRows::append(const NewTokens& tokens) {
  recent_.append(
      options_.of_values ? NewRows::values(tokens) : NewRows::keys(tokens),
      [this](std::uint32_t group) { record(group, (group + 1) * options_.group_tokens); });
}

void GroupRows::record_open_group(std::uint32_t end) {
  if (end > closed() * options_.group_tokens) record(closed(), end);
}

void GroupRows::record(std::uint32_t group, std::uint32_t end) {
  const std::uint32_t begin = std::min(std::max(group * options_.group_tokens, sinks_), end);
  for (std::uint32_t head = 0; head < recent_.format().heads; ++head) {
    const RowsView rows = recent_.rows(head, begin, end);
    std::byte* mean = means_.data() + mean_offset(head, group);
    std::byte* box = options_.boxes ? boxes_.data() + 2 * mean_offset(head, group) : nullptr;
    if (rows.rows == 0) {
      std::memset(mean, 0, recent_.row_bytes());
      if (box != nullptr) std::memset(box, 0, 2 * recent_.row_bytes());
      continue;
    }
    mean_rows(rows, options_.group_tokens, mean);
    if (box != nullptr) box_rows(rows, options_.group_tokens, box);
  }
}

RowsView GroupRows::means(std::uint32_t head, std::uint32_t first, std::uint32_t count) const {
  return {means_.data() + mean_offset(head, first), count, recent_.format().dim,
          recent_.row_bytes(), recent_.format().dtype};
}

RowsView GroupRows::boxes(std::uint32_t head, std::uint32_t first, std::uint32_t count) const {
  return {boxes_.data() + 2 * mean_offset(head, first), count, 2 * recent_.format().dim,
          2 * recent_.row_bytes(), recent_.format().dtype};
}

void GroupRows::save(StateWriter& writer) const {
  recent_.save(writer);
  const std::size_t bytes = closed() * recent_.row_bytes();
  for (std::uint32_t head = 0; head < recent_.format().heads; ++head) {
    writer.put_array(means_.part(mean_offset(head, 0), bytes));
    if (options_.boxes) writer.put_array(boxes_.part(2 * mean_offset(head, 0), 2 * bytes));
  }
}

Status GroupRows::restore(StateReader& reader) {
  KVTIER_RETURN_IF_ERROR(recent_.restore(reader));
  const std::size_t bytes = closed() * recent_.row_bytes();
  for (std::uint32_t head = 0; head < recent_.format().heads; ++head) {
    KVTIER_RETURN_IF_ERROR(reader.get_exactly(means_.part(mean_offset(head, 0), bytes)));
    if (!options_.boxes) continue;
    KVTIER_RETURN_IF_ERROR(reader.get_exactly(boxes_.part(2 * mean_offset(head, 0), 2 * bytes)));
  }
  return {};
}

std::size_t GroupRows::metadata_bytes() const {
  return std::size_t{recent_.format().heads} * closed() * recent_.row_bytes() *
             (options_.boxes ? 3 : 1) +
         recent_.metadata_bytes();
}

}  // namespace kvtier
