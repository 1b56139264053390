#pragma once

#include "memory/status.h"

#include <cstddef>
#include <span>
#include <string>

namespace kvtier {

/// A regular file mapped for reading. Move-only; unmaps when destroyed. Immutable, so safe to share
/// between threads. The bytes stay where they are when the object moves.
///
/// A file that another process cuts short while it is mapped ends this process with SIGBUS: traces
/// are inputs that nobody writes to during a run.
class MappedFile {
 public:
  /// Fails with `not_found` or `io_error`, in the form of `input_error`. Reads no byte yet.
  static Result<MappedFile> open(const std::string& path);

  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  ~MappedFile();

  const std::string& path() const { return path_; }
  std::span<const std::byte> bytes() const { return bytes_; }

 private:
  MappedFile(std::string path, std::span<const std::byte> bytes)
      : path_(std::move(path)), bytes_(bytes) {}

  std::string path_;
  std::span<const std::byte> bytes_;
};

}  // namespace kvtier
