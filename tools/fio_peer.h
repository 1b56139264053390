#pragma once

#include "memory/status.h"

#include <cstdint>
#include <string>
#include <vector>

namespace kvtier {

/// One measurement by fio, to stand beside one of ours.
struct FioJob {
  std::string path;     ///< The file that both use.
  std::string pattern;  ///< fio's word: "randread", "write", ...
  std::size_t io_bytes = 0;
  std::uint32_t depth = 1;
  std::uint64_t offset = 0;
  std::uint64_t bytes = 0;
  bool direct = true;
  /// "io_uring" with that depth, or "psync" with as many threads.
  std::string engine = "io_uring";
  bool fixed_buffers = false;  ///< Buffers (and the file) registered, as ours are.
  double seconds = 1.0;
};

/// The command line, for people to type and for `run_fio`.
std::vector<std::string> fio_arguments(const std::string& program, const FioJob& job);

/// "fio 3.33", or an empty string where there is no such program.
std::string fio_version(const std::string& program);

/// Runs fio and returns bytes per second. `io_error` with what fio said where it fails.
Result<double> run_fio(const std::string& program, const FioJob& job);

/// Bytes per second from fio's JSON output. `corrupt` when it holds none.
Result<double> read_fio_result(const std::string& json, bool write);

}  // namespace kvtier
