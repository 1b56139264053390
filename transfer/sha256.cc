#include "transfer/sha256.h"

#include "memory/check.h"

#include <openssl/evp.h>

namespace kvtier {

struct Sha256::Context {
  EVP_MD_CTX* evp = EVP_MD_CTX_new();
  Context() = default;
  ~Context() { EVP_MD_CTX_free(evp); }
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;
};

Sha256::Sha256() : context_(std::make_unique<Context>()) {
  KVTIER_CHECK(context_->evp != nullptr, "no memory for SHA-256");
  KVTIER_CHECK(EVP_DigestInit_ex(context_->evp, EVP_sha256(), nullptr) == 1, "no SHA-256");
}
Sha256::Sha256(Sha256&&) noexcept = default;
Sha256& Sha256::operator=(Sha256&&) noexcept = default;
Sha256::~Sha256() = default;

void Sha256::update(std::span<const std::byte> bytes) {
  KVTIER_CHECK(EVP_DigestUpdate(context_->evp, bytes.data(), bytes.size()) == 1,
               "SHA-256 refused {} bytes", bytes.size());
}

Sha256Digest Sha256::digest() const {
  Context copy;
  KVTIER_CHECK(copy.evp != nullptr && EVP_MD_CTX_copy_ex(copy.evp, context_->evp) == 1,
               "no memory for SHA-256");
  Sha256Digest digest;
  unsigned int length = 0;
  const int done =
      EVP_DigestFinal_ex(copy.evp, reinterpret_cast<unsigned char*>(digest.data()), &length);
  KVTIER_CHECK(done == 1 && length == digest.size(), "SHA-256 gave {} with {} bytes", done, length);
  return digest;
}

std::string Sha256::hex() const {
  std::string hex;
  for (const std::byte byte : digest()) hex += fmt::format("{:02x}", std::to_integer<int>(byte));
  return hex;
}

std::string sha256_hex(std::span<const std::byte> bytes) {
  Sha256 sha256;
  sha256.update(bytes);
  return sha256.hex();
}

}  // namespace kvtier
