#pragma once

#include "memory/status.h"

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

namespace kvtier {

/// Names a key without giving it away: the first half of a SHA-256 of it. All zero: no encryption.
using KeyId = std::array<std::byte, 16>;

/// AES-256-XTS over pages of 4 KiB, as disks use it: the size stays, each page is bound to its
/// place, and a page of zeros does not look like another one. It hides content; that content was
/// not exchanged by somebody who can write the file is not its promise (checksums find accidents).
///
/// Owns the expanded key. Not thread-safe; allocates only when made.
class PageCipher {
 public:
  static constexpr std::size_t kKeyBytes = 64;
  static constexpr std::size_t kPageBytes = 4096;

  /// `invalid_argument` unless the key is 64 bytes with two different halves (XTS needs that).
  static Result<PageCipher> make(std::span<const std::byte> key);
  /// A key as users keep it: 64 raw bytes, or 128 hexadecimal digits with or without a line end.
  static Result<PageCipher> parse(std::span<const std::byte> text);
  /// Reads such a key from a file that only its owner may read; no symbolic link is followed.
  static Result<PageCipher> read(const std::string& path);

  PageCipher(PageCipher&&) noexcept;
  PageCipher& operator=(PageCipher&&) noexcept;
  ~PageCipher();

  const KeyId& id() const { return id_; }

  /// `segment` and `page` (of the segment file) are the first page's place. Whole pages; source and
  /// target are the same or do not overlap.
  void encrypt(std::uint32_t segment, std::uint64_t page, std::span<const std::byte> source,
               std::byte* target);
  void decrypt(std::uint32_t segment, std::uint64_t page, std::span<const std::byte> source,
               std::byte* target);

 private:
  struct Context;
  explicit PageCipher(std::unique_ptr<Context> context);

  std::unique_ptr<Context> context_;
  KeyId id_{};
};

}  // namespace kvtier
