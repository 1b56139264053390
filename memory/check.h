#pragma once

#include <fmt/format.h>

#include <string>

namespace kvtier {

/// Prints where a broken promise was noticed and aborts. Called through `KVTIER_CHECK` only.
[[noreturn]] void check_failed(const char* file, int line, const char* condition,
                               const std::string& message);

}  // namespace kvtier

/// Stops the process when the code or its caller broke a promise; on in every build.
/// The message is an fmt format string with the values that matter.
#define KVTIER_CHECK(condition, ...)                                                      \
  do {                                                                                    \
    if (!(condition)) [[unlikely]] {                                                      \
      ::kvtier::check_failed(__FILE__, __LINE__, #condition, ::fmt::format(__VA_ARGS__)); \
    }                                                                                     \
  } while (false)
