#include "tools/cli/exit_codes.h"

#include <cerrno>
#include <cstdio>
#include <system_error>

namespace kvtier {

ExitCode fail(ExitCode code, const Status& status) {
  fmt::print(stderr, "kvtier: {}\n", status.message());
  return code;
}

ExitCode print_result(const std::string& text, ExitCode code) {
  const bool written = std::fwrite(text.data(), 1, text.size(), stdout) == text.size();
  if (written && std::fflush(stdout) == 0) return code;
  return fail(ExitCode::kFailed, io_error(fmt::format("cannot write the result: {}",
                                                      std::generic_category().message(errno))));
}

}  // namespace kvtier
