#include "kernels/checksum.h"

// The secret is visible in the inlined form only.
#define XXH_INLINE_ALL
#include <xxhash.h>

#include <array>
#include <cstring>

namespace kvtier {
namespace {

/// Little-endian on every machine, because checksums lie on disk.
class WordWriter {
 public:
  void add(std::uint64_t word) {
    for (int shift = 0; shift < 64; shift += 8) {
      bytes_[used_++] = static_cast<std::byte>((word >> shift) & 0xFF);
    }
  }
  std::span<const std::byte> bytes() const { return std::span(bytes_).first(used_); }

 private:
  std::array<std::byte, 64> bytes_;
  std::size_t used_ = 0;
};

}  // namespace

std::uint64_t block_checksum(std::span<const std::byte> payload, const BlockIdentity& identity,
                             Generation generation) {
  return seeded_checksum(payload, block_seed(identity, generation));
}

std::uint64_t block_seed(const BlockIdentity& identity, Generation generation) {
  WordWriter words;
  words.add(identity.origin.high);
  words.add(identity.origin.low);
  words.add(identity.layer.value);
  words.add(identity.head_group.value);
  words.add(identity.index.value);
  words.add(generation.value);
  return checksum(words.bytes());
}

std::uint64_t seeded_checksum(std::span<const std::byte> payload, std::uint64_t seed) {
  return XXH3_64bits_withSeed(payload.data(), payload.size(), seed);
}

std::array<std::uint64_t, 24> checksum_secret() {
  std::array<std::uint64_t, 24> words;
  static_assert(sizeof(words) == sizeof(XXH3_kSecret));
  std::memcpy(words.data(), XXH3_kSecret, sizeof(words));
  return words;
}

std::uint64_t checksum(std::span<const std::byte> bytes) {
  return XXH3_64bits(bytes.data(), bytes.size());
}

}  // namespace kvtier
