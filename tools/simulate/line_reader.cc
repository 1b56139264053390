#include "tools/simulate/line_reader.h"

#include "tools/trace/json_document.h"

#include <cstring>

namespace kvtier {
namespace {

bool is_blank(std::string_view text) {
  return text.find_first_not_of(" \t\r") == std::string_view::npos;
}

}  // namespace

Result<bool> LineReader::fill() {
  if (at_end_) return false;
  // What was returned makes room before the buffer grows.
  if (begin_ > 0) {
    std::memmove(buffer_.data(), buffer_.data() + begin_, end_ - begin_);
    end_ -= begin_;
    scanned_ -= begin_;
    begin_ = 0;
  }
  if (end_ > kLineBytesMax) {
    return input_error(fmt::format("{}:{}", path(), line_ + 1), "line",
                       fmt::format("more than {} bytes", kLineBytesMax), "a shorter line");
  }
  if (buffer_.size() < end_ + kReadBytes + kPadding) {
    buffer_.resize(2 * end_ + kReadBytes + kPadding);
  }
  const std::span<char> space(buffer_.data() + end_, buffer_.size() - kPadding - end_);
  KVTIER_ASSIGN_OR_RETURN(const std::size_t count, input_.read(space));
  end_ += count;
  at_end_ = count == 0;
  return !at_end_;
}

Result<std::optional<TextLine>> LineReader::next() {
  if (peeked_) return std::exchange(peeked_, std::nullopt);
  while (true) {
    const void* newline = std::memchr(buffer_.data() + scanned_, '\n', end_ - scanned_);
    if (newline == nullptr) {
      scanned_ = end_;
      KVTIER_ASSIGN_OR_RETURN(const bool more, fill());
      if (more) continue;
      if (begin_ == end_) return std::optional<TextLine>();
    }
    const std::size_t line_end =
        newline != nullptr
            ? static_cast<std::size_t>(static_cast<const char*>(newline) - buffer_.data())
            : end_;
    std::string_view text(buffer_.data() + begin_, line_end - begin_);
    begin_ = scanned_ = newline != nullptr ? line_end + 1 : end_;
    ++line_;
    if (text.ends_with('\r')) text.remove_suffix(1);
    if (!is_blank(text)) return std::optional<TextLine>(TextLine{line_, text});
  }
}

Result<std::optional<TextLine>> LineReader::peek() {
  if (!peeked_) {
    KVTIER_ASSIGN_OR_RETURN(peeked_, next());
  }
  return peeked_;
}

Result<TextLine> LineReader::all() {
  // A peeked line still lies in front of what has not been returned.
  const std::size_t peeked_bytes =
      peeked_ ? static_cast<std::size_t>(buffer_.data() + begin_ - peeked_->text.data()) : 0;
  const std::uint64_t first = peeked_ ? peeked_->number : line_ + 1;
  begin_ -= peeked_bytes;
  peeked_.reset();
  while (true) {
    KVTIER_ASSIGN_OR_RETURN(const bool more, fill());
    if (!more) break;
  }
  const std::string_view text(buffer_.data() + begin_, end_ - begin_);
  begin_ = scanned_ = end_;
  return TextLine{first, text};
}

}  // namespace kvtier
