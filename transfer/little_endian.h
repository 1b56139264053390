#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>

namespace kvtier {

/// Integers as the formats of transfer/README.md have them, on any machine and at any address.

template <std::unsigned_integral Number>
void store_little_endian(std::byte* at, Number number) {
  for (std::size_t i = 0; i < sizeof(Number); ++i) {
    at[i] = static_cast<std::byte>((number >> (8 * i)) & 0xff);
  }
}

template <std::unsigned_integral Number>
Number load_little_endian(const std::byte* at) {
  Number number = 0;
  for (std::size_t i = 0; i < sizeof(Number); ++i) {
    number |= static_cast<Number>(static_cast<Number>(at[i]) << (8 * i));
  }
  return number;
}

}  // namespace kvtier
