#include "tools/trace/sha256.h"

#include "memory/check.h"

#include <openssl/evp.h>

#include <array>

namespace kvtier {

std::string sha256_hex(std::span<const std::byte> bytes) {
  std::array<unsigned char, EVP_MAX_MD_SIZE> digest = {};
  unsigned int length = 0;
  const int done =
      EVP_Digest(bytes.data(), bytes.size(), digest.data(), &length, EVP_sha256(), nullptr);
  KVTIER_CHECK(done == 1 && length == 32, "SHA-256 gave {} with {} bytes", done, length);
  std::string hex;
  for (unsigned int i = 0; i < length; ++i) hex += fmt::format("{:02x}", digest[i]);
  return hex;
}

}  // namespace kvtier
