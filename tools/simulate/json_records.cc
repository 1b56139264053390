#include "tools/simulate/json_records.h"

#include "tools/simulate/hex_id.h"
#include "tools/trace/json_document.h"

#include <cmath>

namespace kvtier {
namespace {

constexpr std::size_t kFoundCharacters = 60;

std::string describe_token(std::string_view token) {
  while (!token.empty() && std::string_view(" \t\r\n").find(token.back()) != token.npos) {
    token.remove_suffix(1);
  }
  return printable(token, kFoundCharacters);
}

// What stands there, for people; arrays and objects by their kind. The value is still to be read.
std::string describe_json(JsonValue value) {
  simdjson::ondemand::json_type type{};
  if (value.type().get(type)) return "no JSON value";
  if (type == simdjson::ondemand::json_type::object) return "an object";
  if (type == simdjson::ondemand::json_type::array) return "an array";
  std::string_view token;
  if (simdjson::simdjson_result<std::string_view>(value.raw_json_token()).get(token)) {
    return "no JSON value";
  }
  return describe_token(token);
}

constexpr const char* kExpectedId = "a block id: a whole number of 64 bits or hexadecimal digits";

}  // namespace

std::string JsonRecords::path() const {
  std::string text;
  for (const Step& step : path_) {
    if (step.key.empty()) {
      text += fmt::format("[{}]", step.index);
    } else {
      text += fmt::format("{}{}", text.empty() ? "" : ".", step.key);
    }
  }
  return text.empty() ? "record" : text;
}

Status JsonRecords::fault(std::string_view field, std::string_view found,
                          std::string_view expected) const {
  return input_error(fmt::format("{}:{}", file_, line_), field, found, expected);
}

Status JsonRecords::mismatch(JsonValue value, std::string_view expected) {
  return fault(path(), describe_json(value), expected);
}

Status JsonRecords::mismatch_here(std::string_view key, std::string_view found,
                                  std::string_view expected) {
  const std::string where = path_.empty() ? std::string(key) : fmt::format("{}.{}", path(), key);
  return fault(where, found, expected);
}

Status JsonRecords::repeated() const {
  return fault(path(), "the key twice", "every key once per object");
}

Status JsonRecords::syntax_error(simdjson::error_code error) const {
  if (error == simdjson::CAPACITY || error == simdjson::MEMALLOC) {
    return no_space(fmt::format("{}:{}: no memory to parse it", file_, line_));
  }
  return fault(path(), "a syntax error", "a JSON object");
}

Status JsonRecords::read(JsonValue value, std::optional<std::uint64_t>& target) {
  if (target) return repeated();
  std::uint64_t number = 0;
  if (value.get_uint64().get(number)) return mismatch(value, "a whole number");
  target = number;
  return {};
}

Status JsonRecords::read(JsonValue value, std::optional<double>& target) {
  if (target) return repeated();
  double number = 0;
  if (value.get_double().get(number) || !std::isfinite(number) || number < 0) {
    return mismatch(value, "a number from 0");
  }
  target = number;
  return {};
}

Status JsonRecords::read(JsonValue value, std::optional<std::string>& target) {
  if (target) return repeated();
  std::string_view text;
  if (value.get_string().get(text)) return mismatch(value, "a string");
  target = std::string(text);
  return {};
}

Status JsonRecords::read_ids(JsonValue value, std::vector<std::uint64_t>& ids) {
  return elements(value, [&](JsonValue element) -> Status {
    std::uint64_t id = 0;
    if (!element.get_uint64().get(id)) {
      ids.push_back(id);
      return {};
    }
    std::int64_t signed_id = 0;
    if (!element.get_int64().get(signed_id)) {
      ids.push_back(static_cast<std::uint64_t>(signed_id));
      return {};
    }
    std::string_view token;
    std::string_view text;
    const bool has_token =
        !simdjson::simdjson_result<std::string_view>(element.raw_json_token()).get(token);
    if (!has_token || element.get_string().get(text)) return mismatch(element, kExpectedId);
    const auto hex = parse_hex_id(text);
    if (!hex) return fault(path(), describe_token(token), kExpectedId);
    ids.push_back(*hex);
    return {};
  });
}

}  // namespace kvtier
