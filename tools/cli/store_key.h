#pragma once

#include "memory/status.h"
#include "transfer/page_cipher.h"

#include <optional>
#include <string>

namespace kvtier {

/// Name of the environment variable that may hold a store's key as 128 hexadecimal digits.
inline constexpr const char* kStoreKeyVariable = "KVTIER_STORE_KEY";

/// The key from the file, where one is named, otherwise from the environment, otherwise none.
Result<std::optional<PageCipher>> store_key(const std::string& key_file);

}  // namespace kvtier
