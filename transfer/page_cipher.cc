#include "transfer/page_cipher.h"

#include "transfer/file_error.h"
#include "transfer/little_endian.h"
#include "transfer/sha256.h"

#include <fcntl.h>
#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <optional>
#include <utility>
#include <vector>

namespace kvtier {
namespace {

// A value of a hexadecimal digit, or none.
std::optional<unsigned> hex_digit(std::byte byte) {
  const char digit = static_cast<char>(byte);
  if (digit >= '0' && digit <= '9') return static_cast<unsigned>(digit - '0');
  if (digit >= 'a' && digit <= 'f') return static_cast<unsigned>(digit - 'a') + 10;
  if (digit >= 'A' && digit <= 'F') return static_cast<unsigned>(digit - 'A') + 10;
  return std::nullopt;
}

const unsigned char* as_octets(const std::byte* bytes) {
  return reinterpret_cast<const unsigned char*>(bytes);
}
unsigned char* as_octets(std::byte* bytes) { return reinterpret_cast<unsigned char*>(bytes); }

std::array<std::byte, 16> tweak_of(std::uint32_t segment, std::uint64_t page) {
  std::array<std::byte, 16> tweak{};
  store_little_endian(tweak.data(), page);
  store_little_endian(tweak.data() + 8, segment);
  return tweak;
}

// Key material does not stay behind in freed memory.
struct WipedBytes {
  std::vector<std::byte> bytes;
  ~WipedBytes() { OPENSSL_cleanse(bytes.data(), bytes.size()); }
};

}  // namespace

struct PageCipher::Context {
  EVP_CIPHER_CTX* encryption = EVP_CIPHER_CTX_new();
  EVP_CIPHER_CTX* decryption = EVP_CIPHER_CTX_new();
  Context() = default;
  ~Context() {
    EVP_CIPHER_CTX_free(encryption);
    EVP_CIPHER_CTX_free(decryption);
  }
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;
};

PageCipher::PageCipher(std::unique_ptr<Context> context) : context_(std::move(context)) {}
PageCipher::PageCipher(PageCipher&&) noexcept = default;
PageCipher& PageCipher::operator=(PageCipher&&) noexcept = default;
PageCipher::~PageCipher() = default;

Result<PageCipher> PageCipher::make(std::span<const std::byte> key) {
  if (key.size() != kKeyBytes) {
    return invalid_argument(
        fmt::format("a key of {} B, expected {} B (two keys of AES-256)", key.size(), kKeyBytes));
  }
  if (std::equal(key.begin(), key.begin() + kKeyBytes / 2, key.begin() + kKeyBytes / 2)) {
    return invalid_argument("the key's two halves are equal, which XTS does not allow");
  }
  auto context = std::make_unique<Context>();
  KVTIER_CHECK(context->encryption != nullptr && context->decryption != nullptr,
               "no memory for a cipher");
  const bool ready = EVP_EncryptInit_ex(context->encryption, EVP_aes_256_xts(), nullptr,
                                        as_octets(key.data()), nullptr) == 1 &&
                     EVP_DecryptInit_ex(context->decryption, EVP_aes_256_xts(), nullptr,
                                        as_octets(key.data()), nullptr) == 1;
  if (!ready) return unsupported("this OpenSSL has no AES-256-XTS");
  PageCipher cipher(std::move(context));
  Sha256 sha256;
  sha256.update(std::as_bytes(std::span("kvtier key id", 13)));
  sha256.update(key);
  const Sha256Digest digest = sha256.digest();
  std::copy_n(digest.begin(), cipher.id_.size(), cipher.id_.begin());
  return cipher;
}

Result<PageCipher> PageCipher::parse(std::span<const std::byte> text) {
  if (text.size() == kKeyBytes) return make(text);
  while (!text.empty() && (text.back() == std::byte{'\n'} || text.back() == std::byte{'\r'})) {
    text = text.first(text.size() - 1);
  }
  if (text.size() != 2 * kKeyBytes) {
    return invalid_argument(fmt::format(
        "a key of {} characters, expected 64 raw bytes or 128 hexadecimal digits", text.size()));
  }
  WipedBytes key;
  for (std::size_t i = 0; i < kKeyBytes; ++i) {
    const std::optional<unsigned> high = hex_digit(text[2 * i]);
    const std::optional<unsigned> low = hex_digit(text[2 * i + 1]);
    if (!high || !low) {
      return invalid_argument(fmt::format(
          "a key with something other than a hexadecimal digit near position {}", 2 * i));
    }
    key.bytes.push_back(static_cast<std::byte>(*high * 16 + *low));
  }
  return make(key.bytes);
}

Result<PageCipher> PageCipher::read(const std::string& path) {
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
  if (descriptor < 0) {
    const int error = errno;
    std::string message = fmt::format("key file {}: {}", path, error_text(error));
    return error == ENOENT ? not_found(std::move(message)) : io_error(std::move(message));
  }
  struct stat found {};
  const bool known = ::fstat(descriptor, &found) == 0;
  if (!known || !S_ISREG(found.st_mode) || (found.st_mode & 077) != 0) {
    ::close(descriptor);
    return unsupported(fmt::format(
        "key file {}: expected a plain file that only its owner may read (chmod 600)", path));
  }
  WipedBytes text;
  text.bytes.resize(2 * kKeyBytes + 3);
  ssize_t length = 0;
  do {
    length = ::read(descriptor, text.bytes.data(), text.bytes.size());
  } while (length < 0 && errno == EINTR);
  const int error = errno;
  ::close(descriptor);
  if (length < 0) return io_error(fmt::format("key file {}: {}", path, error_text(error)));
  Result<PageCipher> cipher = parse(std::span(text.bytes).first(static_cast<std::size_t>(length)));
  if (cipher.ok()) return cipher;
  return Status(cipher.status().code(),
                fmt::format("key file {}: {}", path, cipher.status().message()));
}

// One page after another, in the direction that the context was made for.
static void run_pages(EVP_CIPHER_CTX* context, std::uint32_t segment, std::uint64_t page,
                      std::span<const std::byte> source, std::byte* target) {
  constexpr std::size_t kPage = PageCipher::kPageBytes;
  KVTIER_CHECK(source.size() % kPage == 0, "{} B are no whole pages", source.size());
  for (std::size_t at = 0; at < source.size(); at += kPage, ++page) {
    const std::array<std::byte, 16> tweak = tweak_of(segment, page);
    int length = 0;
    const bool done =
        EVP_CipherInit_ex(context, nullptr, nullptr, nullptr, as_octets(tweak.data()), -1) == 1 &&
        EVP_CipherUpdate(context, as_octets(target + at), &length, as_octets(source.data() + at),
                         static_cast<int>(kPage)) == 1;
    KVTIER_CHECK(done && length == static_cast<int>(kPage), "AES-XTS gave {} B", length);
  }
}

void PageCipher::encrypt(std::uint32_t segment, std::uint64_t page,
                         std::span<const std::byte> source, std::byte* target) {
  run_pages(context_->encryption, segment, page, source, target);
}

void PageCipher::decrypt(std::uint32_t segment, std::uint64_t page,
                         std::span<const std::byte> source, std::byte* target) {
  run_pages(context_->decryption, segment, page, source, target);
}

}  // namespace kvtier
