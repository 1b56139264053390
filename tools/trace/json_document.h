#pragma once

#include "memory/status.h"

#include <nlohmann/json.hpp>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace kvtier {

/// One line for an input that is not what it must be: "FILE: FIELD: found X, expected Y (remedy)".
/// The code is `corrupt`. Control characters are escaped, so that no file can write to a terminal.
Status input_error(std::string_view file, std::string_view field, std::string_view found,
                   std::string_view expected, std::string_view remedy = {});

/// `text` with control characters and bytes that are not UTF-8 replaced, cut to `limit` characters.
std::string printable(std::string_view text, std::size_t limit = 200);

/// Parses one JSON document. Fails for syntax errors (with the byte), for a key that occurs twice
/// in one object, and for nesting deeper than any of our formats. `file` and `field` name it in
/// errors.
Result<nlohmann::json> parse_json(std::span<const std::byte> text, std::string_view file,
                                  std::string_view field);

/// A value inside a JSON document that knows its file and path, so that every failed expectation
/// says where it failed: "manifest.json: model.kv_heads: found 0, expected a count from 1 to 4096".
///
/// View: the document outlives it. Cheap to copy but for its path.
class JsonField {
 public:
  JsonField(const nlohmann::json& document, std::string file)
      : value_(&document), file_(std::move(file)) {}

  const nlohmann::json& value() const { return *value_; }
  /// The document's file, and the path of this value in it ("turns[0].evidence").
  const std::string& file() const { return file_; }
  const std::string& path() const { return path_; }

  /// Member `key` of an object; failing when this is no object or lacks it.
  Result<JsonField> member(std::string_view key) const;
  /// The same, but none when it is absent or null.
  Result<std::optional<JsonField>> optional_member(std::string_view key) const;
  /// The elements of an array; failing when this is no array.
  Result<std::vector<JsonField>> elements() const;

  Result<std::string> as_string() const;
  Result<bool> as_bool() const;
  /// A whole number from `least` to `most`.
  Result<std::uint64_t> as_count(std::uint64_t least, std::uint64_t most) const;
  /// Any finite number.
  Result<double> as_number() const;

  /// The failure that this value is not `expected`.
  Status mismatch(std::string_view expected, std::string_view remedy = {}) const;

 private:
  JsonField(const nlohmann::json& value, std::string file, std::string path)
      : value_(&value), file_(std::move(file)), path_(std::move(path)) {}

  const nlohmann::json* value_;
  std::string file_;
  std::string path_;
};

}  // namespace kvtier
