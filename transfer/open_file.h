#pragma once

#include "transfer/file.h"

#include <memory>
#include <string>

namespace kvtier {

enum class FileBackend : unsigned char { kAuto, kIoUring, kPosix };

struct FileOptions {
  /// Directory that holds the file.
  std::string directory;
  /// Reserved on disk before `open_file` returns (`fallocate`), so that a full disk shows at once.
  std::uint64_t bytes = 0;
  FileBackend backend = FileBackend::kAuto;
  std::uint32_t queue_depth = 64;
  /// Ask for O_DIRECT; where the file system refuses, the page cache is used and the traits say so.
  bool direct = true;
};

/// Opens a scratch file that has no name (`O_TMPFILE`, or created and unlinked at once), mode 0600:
/// whatever happens to the process, nothing is left behind.
///
/// `kAuto` takes io_uring with O_DIRECT and falls back to the posix thread pool where either is
/// refused (default containers, tmpfs, overlayfs), with the reason in the traits.
/// Errors: `no_space` (names path, bytes wanted and bytes free), `not_found` (no such directory),
/// `io_error`, `unsupported` (a backend that was asked for by name is refused).
Result<std::unique_ptr<File>> open_file(const FileOptions& options);

}  // namespace kvtier
