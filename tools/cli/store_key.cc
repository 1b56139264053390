#include "tools/cli/store_key.h"

#include <cstdlib>
#include <span>
#include <string_view>

namespace kvtier {

Result<std::optional<PageCipher>> store_key(const std::string& key_file) {
  if (!key_file.empty()) {
    KVTIER_ASSIGN_OR_RETURN(PageCipher cipher, PageCipher::read(key_file));
    return std::optional<PageCipher>(std::move(cipher));
  }
  const char* const text = std::getenv(kStoreKeyVariable);
  if (text == nullptr || *text == '\0') return std::optional<PageCipher>();
  auto cipher = PageCipher::parse(std::as_bytes(std::span(std::string_view(text))));
  if (!cipher.ok()) {
    return invalid_argument(fmt::format("{}: {}", kStoreKeyVariable, cipher.status().message()));
  }
  return std::optional<PageCipher>(std::move(*cipher));
}

}  // namespace kvtier
