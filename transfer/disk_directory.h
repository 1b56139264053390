#pragma once

#include "transfer/open_file.h"
#include "transfer/store_directory.h"

#include <memory>
#include <string>

namespace kvtier {

struct DiskDirectoryOptions {
  FileBackend backend = FileBackend::kAuto;
  /// Operations in flight per file.
  std::uint32_t queue_depth = 32;
  bool direct = true;
  /// Make the folder (one level) when there is none.
  bool create = true;
  /// Look without touching: files are opened for reading, and nobody is locked out.
  bool read_only = false;
};

/// A folder on disk, mode 0700, that one process at a time holds: files 0600, no symbolic link is
/// followed and no name leaves the folder. The lock goes with the process, however it ends.
///
/// Errors: `busy` names the holder's process and host; `unsupported` when the folder is somebody
/// else's, open to others, or no folder; `not_found`, `io_error`.
Result<std::unique_ptr<StoreDirectory>> open_disk_directory(const std::string& path,
                                                            const DiskDirectoryOptions& options);

/// The same place with files that have no names: what `Durability::kNone` keeps its items in.
Result<std::unique_ptr<StoreDirectory>> open_nameless_directory(
    const std::string& path, const DiskDirectoryOptions& options);

/// Name of the file that the lock is held on; the lock's file is part of a store's size.
inline constexpr const char* kLockFileName = "lock";

}  // namespace kvtier
