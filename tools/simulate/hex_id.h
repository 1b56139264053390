#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

namespace kvtier {

/// Up to 16 hexadecimal digits are the number they write; more are hashed to 64 bits (XXH3), which
/// keeps a billion different ids apart with a probability of 97 %.
std::optional<std::uint64_t> parse_hex_id(std::string_view text);

}  // namespace kvtier
