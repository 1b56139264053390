#include "selectors/coded_keys.h"

#include <algorithm>
#include <cstring>

namespace kvtier {

CodedKeys::CodedKeys(const SelectorShape& shape, std::uint32_t bits)
    : codes_{.bits = bits, .dim = shape.head_dim, .dtype = shape.dtype},
      sinks_max_(std::min(shape.sinks, shape.tokens_max)),
      runs_max_(shape.tokens_max / KeyCodes::kRunTokens),
      recent_({.heads = shape.kv_heads,
               .dim = shape.head_dim,
               .dtype = shape.dtype,
               .group_tokens = KeyCodes::kRunTokens,
               .keep_tokens = shape.window,
               .tokens_max = shape.tokens_max}),
      lines_(std::size_t{shape.kv_heads} * runs_max_ * codes_.run_lines()),
      sinks_(std::size_t{shape.kv_heads} * sinks_max_ * recent_.row_bytes()) {}

void CodedKeys::append(const NewTokens& tokens) {
  const std::uint32_t end = std::min(sinks_max_, tokens.first_position + tokens.tokens);
  for (std::uint32_t head = 0; head < recent_.format().heads; ++head) {
    for (std::uint32_t t = tokens.first_position; t < end; ++t) {
      std::memcpy(sinks_.data() + sink_offset(head) + t * recent_.row_bytes(),
                  tokens.keys + head * tokens.key_head_stride +
                      (t - tokens.first_position) * tokens.key_token_stride,
                  recent_.row_bytes());
    }
  }
  recent_.append(NewRows::keys(tokens), [this](std::uint32_t run) {
    const std::uint32_t begin = run * KeyCodes::kRunTokens;
    const std::uint32_t skip =
        std::min(sinks_max_ - std::min(sinks_max_, begin), std::uint32_t{KeyCodes::kRunTokens});
    for (std::uint32_t head = 0; head < recent_.format().heads; ++head) {
      quantise_run(codes_, recent_.rows(head, begin, begin + KeyCodes::kRunTokens), skip,
                   lines_.data() + line_offset(head, run));
    }
  });
}

void CodedKeys::read(std::uint32_t head, std::uint32_t begin, std::uint32_t end, std::byte* target,
                     std::size_t stride_bytes) const {
  KVTIER_CHECK(begin <= end && end <= tokens(), "keys {} to {} of {}", begin, end, tokens());
  for (std::uint32_t t = begin; t < end;) {
    std::byte* at = target + (t - begin) * stride_bytes;
    if (t >= sink_count() && t < coded_tokens()) {
      const std::uint32_t run_begin = t / KeyCodes::kRunTokens * KeyCodes::kRunTokens;
      const std::uint32_t stop = std::min(end, run_begin + KeyCodes::kRunTokens);
      read_coded_keys(codes_, run(head, t / KeyCodes::kRunTokens), t - run_begin, stop - t, at,
                      stride_bytes);
      t = stop;
      continue;
    }
    const std::byte* exact =
        t < sink_count() ? sinks(head).row(t) : recent_.rows(head, t, t + 1).row(0);
    std::memcpy(at, exact, recent_.row_bytes());
    ++t;
  }
}

RowsView CodedKeys::sinks(std::uint32_t head) const {
  return {sinks_.data() + sink_offset(head), sink_count(), codes_.dim, recent_.row_bytes(),
          codes_.dtype};
}

void CodedKeys::save(StateWriter& writer) const {
  recent_.save(writer);
  for (std::uint32_t head = 0; head < recent_.format().heads; ++head) {
    writer.put_array(sinks_.part(sink_offset(head), sink_count() * recent_.row_bytes()));
    writer.put_array(lines_.part(line_offset(head, 0), runs() * codes_.run_lines()));
  }
}

Status CodedKeys::restore(StateReader& reader) {
  KVTIER_RETURN_IF_ERROR(recent_.restore(reader));
  for (std::uint32_t head = 0; head < recent_.format().heads; ++head) {
    KVTIER_RETURN_IF_ERROR(
        reader.get_exactly(sinks_.part(sink_offset(head), sink_count() * recent_.row_bytes())));
    KVTIER_RETURN_IF_ERROR(
        reader.get_exactly(lines_.part(line_offset(head, 0), runs() * codes_.run_lines())));
  }
  return {};
}

std::size_t CodedKeys::metadata_bytes() const {
  return std::size_t{recent_.format().heads} * runs() * codes_.run_lines() * sizeof(CodeLine) +
         sinks_.size() + recent_.metadata_bytes();
}

}  // namespace kvtier
