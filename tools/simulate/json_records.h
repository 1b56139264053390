#pragma once

#include "memory/status.h"
#include "tools/simulate/line_reader.h"

#include <simdjson.h>

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace kvtier {

/// A JSON value that is read where it stands: once, and before anything behind it.
using JsonValue = simdjson::ondemand::value;

/// Reads JSON objects member by member, without building a document, and says where a value is not
/// what it must be: "FILE:LINE: requests[3].in: found "x", expected a whole number".
///
/// Only what is read is checked; of members that nobody asks for, just the brackets. Integers are
/// read as integers: 64-bit ids keep their low bits. One thread at a time.
///
/// The only header of ours that includes simdjson.
class JsonRecords {
 public:
  explicit JsonRecords(std::string file) : file_(std::move(file)) {}

  /// Parses `line` as one object and calls `visit(key, value) -> Status` for each member in order.
  template <typename Visit>
  Status read_object(const TextLine& line, Visit&& visit);
  /// The members of an object inside it.
  template <typename Visit>
  Status members(JsonValue value, Visit&& visit);
  /// The elements of an array inside it: `visit(value) -> Status`.
  template <typename Visit>
  Status elements(JsonValue value, Visit&& visit);

  // Each sets `target`, and fails when it was set before: a key that occurs twice.
  Status read(JsonValue value, std::optional<std::uint64_t>& target);
  Status read(JsonValue value, std::optional<double>& target);  ///< At least 0.
  Status read(JsonValue value, std::optional<std::string>& target);

  /// Appends the elements of an array of block ids: whole numbers of 64 bits with or without sign,
  /// or strings of hexadecimal digits, with or without "0x" (see `parse_hex_id`).
  Status read_ids(JsonValue value, std::vector<std::uint64_t>& ids);

  /// The failure that `value`, at the present place, is not `expected`.
  Status mismatch(JsonValue value, std::string_view expected);
  /// The failure of member `key` of the object that is being read.
  Status mismatch_here(std::string_view key, std::string_view found, std::string_view expected);
  /// The failure of a record as a whole or of one of its fields.
  Status fault(std::string_view field, std::string_view found, std::string_view expected) const;

 private:
  struct Step {
    std::string_view key;  ///< Empty: an element.
    std::size_t index = 0;
  };

  Status syntax_error(simdjson::error_code error) const;
  Status repeated() const;
  std::string path() const;

  std::string file_;
  std::uint64_t line_ = 0;
  std::vector<Step> path_;
  simdjson::ondemand::parser parser_;
};

template <typename Visit>
Status JsonRecords::read_object(const TextLine& line, Visit&& visit) {
  line_ = line.number;
  path_.clear();
  simdjson::ondemand::document document;
  const auto error =
      parser_.iterate(line.text.data(), line.text.size(), line.text.size() + LineReader::kPadding)
          .get(document);
  if (error) return syntax_error(error);
  JsonValue root;
  if (const auto no_value = document.get_value().get(root)) return syntax_error(no_value);
  KVTIER_RETURN_IF_ERROR(members(root, visit));
  const char* behind = nullptr;
  if (!document.current_location().get(behind))
    return fault("record", "something behind it", "one object per line");
  return {};
}

template <typename Visit>
Status JsonRecords::members(JsonValue value, Visit&& visit) {
  simdjson::ondemand::object object;
  if (value.get_object().get(object)) return mismatch(value, "an object");
  path_.push_back({});
  for (auto member : object) {
    simdjson::ondemand::field field;
    if (const auto error = std::move(member).get(field)) return syntax_error(error);
    std::string_view key;
    if (const auto error = field.unescaped_key().get(key)) return syntax_error(error);
    path_.back() = {key, 0};
    KVTIER_RETURN_IF_ERROR(visit(key, field.value()));
  }
  path_.pop_back();
  return {};
}

template <typename Visit>
Status JsonRecords::elements(JsonValue value, Visit&& visit) {
  simdjson::ondemand::array array;
  if (value.get_array().get(array)) return mismatch(value, "an array");
  path_.push_back({});
  for (auto element : array) {
    JsonValue item;
    if (const auto error = std::move(element).get(item)) return syntax_error(error);
    KVTIER_RETURN_IF_ERROR(visit(item));
    ++path_.back().index;
  }
  path_.pop_back();
  return {};
}

}  // namespace kvtier
