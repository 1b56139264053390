#pragma once

#include "memory/status.h"

#include <cstdint>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

namespace kvtier {

// How option values are written. Nothing is guessed: a value is understood to its last character or
// refused with `invalid_argument`, and the message says what would be accepted.

/// A whole number in decimal digits: "512".
Result<std::uint64_t> parse_count(std::string_view text);
/// A finite number: "0.5", "1e-3".
Result<double> parse_number(std::string_view text);
/// Bytes: "4096", "128KiB", "64MiB", "1GiB", "2TiB".
Result<std::uint64_t> parse_bytes(std::string_view text);
/// "a,b(c,d),e" is {"a", "b(c,d)", "e"}: commas inside parentheses belong to the item. Neither
/// empty items nor unbalanced parentheses are accepted.
Result<std::vector<std::string>> split_list(std::string_view text);
/// "13.1 MiB": for people; figures for machines are plain bytes.
std::string format_bytes(std::uint64_t bytes);

/// A percentage, kept exactly to six decimals so that every machine computes the same shares.
class Share {
 public:
  /// "2%", "0.5%"; from 0% to 1000%.
  static Result<Share> parse(std::string_view text);

  /// The share of `whole`, rounded down: 100% is `whole`.
  std::uint64_t of(std::uint64_t whole) const;
  bool is_zero() const { return millionths_ == 0; }
  double fraction() const { return static_cast<double>(millionths_) / kWhole; }

 private:
  static constexpr std::uint64_t kWhole = 100'000'000;  // 100 percent in millionths of one percent.
  explicit Share(std::uint64_t millionths) : millionths_(millionths) {}

  std::uint64_t millionths_;
};

/// Capacity of a tier: bytes ("64MiB") or a share of the trace's KV bytes ("10%"). Value type.
class Capacity {
 public:
  static Result<Capacity> parse(std::string_view text);

  /// As it was written.
  const std::string& text() const { return text_; }
  std::uint64_t bytes(std::uint64_t kv_bytes) const;

 private:
  Capacity(std::string_view text, std::variant<std::uint64_t, Share> amount)
      : text_(text), amount_(amount) {}

  std::string text_;
  std::variant<std::uint64_t, Share> amount_;
};

/// Tokens attended at a step: a count ("512") or a share of the tokens visible then ("2%"). More
/// than nothing and at most 100%. Value type.
class Budget {
 public:
  static Result<Budget> parse(std::string_view text);

  /// As it was written.
  const std::string& text() const { return text_; }
  /// Never more than `visible`.
  std::uint64_t tokens(std::uint64_t visible) const;

 private:
  Budget(std::string_view text, std::variant<std::uint64_t, Share> amount)
      : text_(text), amount_(amount) {}

  std::string text_;
  std::variant<std::uint64_t, Share> amount_;
};

}  // namespace kvtier
