#pragma once

#include <array>
#include <cstddef>
#include <memory>
#include <span>
#include <string>

namespace kvtier {

using Sha256Digest = std::array<std::byte, 32>;

/// SHA-256 of `bytes` as 64 lower-case hexadecimal digits.
std::string sha256_hex(std::span<const std::byte> bytes);

/// The same of bytes that come piece by piece. Move-only.
class Sha256 {
 public:
  Sha256();
  Sha256(Sha256&&) noexcept;
  Sha256& operator=(Sha256&&) noexcept;
  ~Sha256();

  void update(std::span<const std::byte> bytes);
  /// Of all that came so far; more may follow.
  Sha256Digest digest() const;
  /// The same as 64 lower-case hexadecimal digits.
  std::string hex() const;

 private:
  struct Context;
  std::unique_ptr<Context> context_;
};

}  // namespace kvtier
