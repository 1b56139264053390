#pragma once

#include "memory/status.h"
#include "tools/simulate/input_stream.h"

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace kvtier {

/// One line of a file, without its end.
struct TextLine {
  std::uint64_t number = 0;  ///< From 1.
  /// At least `LineReader::kPadding` readable bytes lie behind its last character.
  std::string_view text;
};

/// The lines of a stream, one after the other. A line is valid until the next call. Blank lines are
/// skipped, but counted; a missing newline at the end of the file is no matter.
///
/// Memory grows to the longest line and a read's worth more.
class LineReader {
 public:
  /// Bytes behind every line that may be read, though they mean nothing: what the JSON parser asks.
  static constexpr std::size_t kPadding = 128;
  /// A longer line is no trace of ours; it ends reading instead of filling the memory.
  static constexpr std::size_t kLineBytesMax = std::size_t{1} << 31;

  explicit LineReader(InputStream input) : input_(std::move(input)), buffer_(kReadBytes) {}

  const std::string& path() const { return input_.path(); }
  /// Complete once `next` or `all` has come to the end.
  std::string digest() const { return input_.digest(); }

  /// None at the end of the file.
  Result<std::optional<TextLine>> next();
  /// The next line, which `next` will return again.
  Result<std::optional<TextLine>> peek();
  /// Everything that has not been returned yet, as one line; for files that are one document.
  Result<TextLine> all();

 private:
  static constexpr std::size_t kReadBytes = std::size_t{1} << 18;

  /// Reads more behind what is there; false at the end.
  Result<bool> fill();

  InputStream input_;
  std::vector<char> buffer_;
  std::size_t begin_ = 0;    ///< Of what has not been returned.
  std::size_t scanned_ = 0;  ///< Up to here there is no newline.
  std::size_t end_ = 0;
  bool at_end_ = false;
  std::uint64_t line_ = 0;
  std::optional<TextLine> peeked_;
};

}  // namespace kvtier
