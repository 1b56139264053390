#pragma once

#include "memory/status.h"

#include <string>

namespace kvtier {

/// How every verb of `kvtier` ends; scripts rely on these numbers.
enum class ExitCode : int {
  kDone = 0,      ///< Done, and what had to be verified was.
  kFailed = 1,    ///< The machine failed the run: I/O error, no memory, no space in mid-run.
  kUsage = 2,     ///< Wrong options; nothing was started.
  kBadInput = 3,  ///< The input is invalid or lacks what the question needs.
  kRequirementFailed = 4,  ///< It ran, but a requirement or a verification failed.
  kHardwareMissing = 5,    ///< Needs hardware or packages that this machine lacks.
};

/// Writes "kvtier: MESSAGE" to stderr and returns `code`.
ExitCode fail(ExitCode code, const Status& status);

/// Writes a result to stdout. A full disk or a closed pipe is `kFailed`, said on stderr.
ExitCode print_result(const std::string& text, ExitCode code);

}  // namespace kvtier
