#include "memory/check.h"

#include <cstdio>
#include <cstdlib>

namespace kvtier {

void check_failed(const char* file, int line, const char* condition, const std::string& message) {
  fmt::print(stderr, "{}:{}: check failed: {}: {}\n", file, line, condition, message);
  std::fflush(stderr);
  std::abort();
}

}  // namespace kvtier
