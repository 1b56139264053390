#include "tools/simulate/hex_id.h"

#include "kernels/checksum.h"

#include <charconv>
#include <span>

namespace kvtier {

std::optional<std::uint64_t> parse_hex_id(std::string_view text) {
  constexpr std::size_t kDigitsOf64Bits = 16;
  std::string_view digits = text;
  if (digits.starts_with("0x") || digits.starts_with("0X")) digits.remove_prefix(2);
  if (digits.empty() ||
      digits.find_first_not_of("0123456789abcdefABCDEF") != std::string_view::npos) {
    return std::nullopt;
  }
  if (digits.size() > kDigitsOf64Bits) return checksum(std::as_bytes(std::span(digits)));
  std::uint64_t id = 0;
  std::from_chars(digits.data(), digits.data() + digits.size(), id, 16);
  return id;
}

}  // namespace kvtier
