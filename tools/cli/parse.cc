#include "tools/cli/parse.h"

#include <algorithm>
#include <charconv>
#include <cmath>

namespace kvtier {
namespace {

struct Unit {
  std::string_view name;
  std::uint64_t bytes;
};
constexpr Unit kUnits[] = {
    {"KiB", std::uint64_t{1} << 10},
    {"MiB", std::uint64_t{1} << 20},
    {"GiB", std::uint64_t{1} << 30},
    {"TiB", std::uint64_t{1} << 40},
};
constexpr std::size_t kShareDecimals = 6;
constexpr std::uint64_t kMaxPercent = 1000;

Status refuse(std::string_view text, std::string_view expected) {
  return invalid_argument(fmt::format("found '{}', expected {}", text, expected));
}

// Digits only, unlike from_chars for signed types or strtoull, which take signs and spaces.
bool read_digits(std::string_view text, std::uint64_t& value) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  return !text.empty() && error == std::errc() && end == text.data() + text.size();
}

}  // namespace

Result<std::uint64_t> parse_count(std::string_view text) {
  std::uint64_t value = 0;
  if (!read_digits(text, value)) return refuse(text, "a whole number such as 512");
  return value;
}

Result<double> parse_number(std::string_view text) {
  double value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || !std::isfinite(value)) {
    return refuse(text, "a number such as 0.5 or 1e-3");
  }
  return value;
}

Result<std::uint64_t> parse_bytes(std::string_view text) {
  constexpr std::string_view kExpected = "bytes such as 4096, 128KiB, 64MiB, 1GiB or 2TiB";
  std::string_view digits = text;
  std::uint64_t unit_bytes = 1;
  for (const Unit& unit : kUnits) {
    if (!text.ends_with(unit.name)) continue;
    digits.remove_suffix(unit.name.size());
    unit_bytes = unit.bytes;
  }
  std::uint64_t value = 0;
  if (!read_digits(digits, value)) return refuse(text, kExpected);
  if (__builtin_mul_overflow(value, unit_bytes, &value)) {
    return refuse(text, "bytes that fit 64 bits");
  }
  return value;
}

Result<std::vector<std::string>> split_list(std::string_view text) {
  std::vector<std::string> items(1);
  int depth = 0;
  for (const char character : text) {
    if (character == '(') ++depth;
    if (character == ')' && --depth < 0) break;
    if (character == ',' && depth == 0) {
      items.emplace_back();
    } else {
      items.back() += character;
    }
  }
  if (depth != 0) return refuse(text, "every parenthesis closed");
  for (const std::string& item : items) {
    if (item.empty()) return refuse(text, "items separated by single commas");
  }
  return items;
}

std::string format_bytes(std::uint64_t bytes) {
  const Unit* unit = nullptr;
  for (const Unit& candidate : kUnits) {
    if (bytes >= candidate.bytes) unit = &candidate;
  }
  if (unit == nullptr) return fmt::format("{} B", bytes);
  return fmt::format("{:.1f} {}", static_cast<double>(bytes) / static_cast<double>(unit->bytes),
                     unit->name);
}

Result<Share> Share::parse(std::string_view text) {
  const std::string expected =
      fmt::format("a percentage from 0% to {}% such as 2% or 0.5%", kMaxPercent);
  if (!text.ends_with('%')) return refuse(text, expected);
  const std::string_view number = text.substr(0, text.size() - 1);
  const std::size_t point = std::min(number.find('.'), number.size());
  std::uint64_t whole = 0;
  if (!read_digits(number.substr(0, point), whole)) return refuse(text, expected);
  std::uint64_t decimals = 0;
  if (point < number.size()) {
    std::string padded(number.substr(point + 1));
    if (padded.empty() || padded.size() > kShareDecimals) return refuse(text, expected);
    padded.resize(kShareDecimals, '0');
    if (!read_digits(padded, decimals)) return refuse(text, expected);
  }
  if (whole > kMaxPercent || (whole == kMaxPercent && decimals > 0)) return refuse(text, expected);
  return Share(whole * (kWhole / 100) + decimals);
}

std::uint64_t Share::of(std::uint64_t whole) const {
  // Split so that the product fits 64 bits for every whole up to 2^60.
  return whole / kWhole * millionths_ + whole % kWhole * millionths_ / kWhole;
}

Result<Capacity> Capacity::parse(std::string_view text) {
  if (text.ends_with('%')) {
    KVTIER_ASSIGN_OR_RETURN(const Share share, Share::parse(text));
    return Capacity(text, share);
  }
  const Result<std::uint64_t> bytes = parse_bytes(text);
  if (bytes.ok()) return Capacity(text, *bytes);
  return refuse(text, "bytes such as 64MiB or a share of the KV bytes such as 10%");
}

std::uint64_t Capacity::bytes(std::uint64_t kv_bytes) const {
  const Share* share = std::get_if<Share>(&amount_);
  return share != nullptr ? share->of(kv_bytes) : std::get<std::uint64_t>(amount_);
}

Result<Budget> Budget::parse(std::string_view text) {
  constexpr std::string_view kExpected =
      "tokens such as 512 or a share of the visible tokens such as 2%, more than 0 and at most "
      "100%";
  if (text.ends_with('%')) {
    const Result<Share> share = Share::parse(text);
    if (!share.ok() || share->is_zero() || share->fraction() > 1) return refuse(text, kExpected);
    return Budget(text, *share);
  }
  std::uint64_t tokens = 0;
  if (!read_digits(text, tokens) || tokens == 0) return refuse(text, kExpected);
  return Budget(text, tokens);
}

std::uint64_t Budget::tokens(std::uint64_t visible) const {
  const Share* share = std::get_if<Share>(&amount_);
  return share != nullptr ? share->of(visible)
                          : std::min(std::get<std::uint64_t>(amount_), visible);
}

}  // namespace kvtier
