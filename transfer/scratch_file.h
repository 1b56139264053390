#pragma once

#include "memory/status.h"
#include "transfer/open_file.h"

#include <cstdint>
#include <string>

namespace kvtier {

/// The nameless, reserved file under `UringFile` and `PosixFile`: its descriptor, and what the file
/// system agreed to. Move-only; closes the descriptor. Not thread-safe.
class ScratchFile {
 public:
  /// Errors as for `open_file`. Writes and reads one page to see whether direct I/O really works.
  static Result<ScratchFile> create(const FileOptions& options);

  ScratchFile(ScratchFile&& other) noexcept;
  ScratchFile& operator=(ScratchFile&& other) noexcept;
  ~ScratchFile();

  int descriptor() const { return descriptor_; }
  std::uint64_t size_bytes() const { return size_bytes_; }
  bool direct() const { return direct_; }
  /// The descriptor as other processes can open it, while this one lives.
  std::string reopen_path() const;
  /// Why I/O is not direct although it was asked for; otherwise empty.
  const std::string& direct_refusal() const { return direct_refusal_; }
  /// Why the space is not reserved; otherwise empty.
  const std::string& reservation_refusal() const { return reservation_refusal_; }

  /// Makes what was written durable.
  Status sync() const;
  /// Closes the descriptor; the space goes back to the file system.
  Status close();

 private:
  explicit ScratchFile(int descriptor) : descriptor_(descriptor) {}
  Status reserve(const FileOptions& options);
  Status try_direct(const FileOptions& options);

  int descriptor_;
  std::uint64_t size_bytes_ = 0;
  bool direct_ = false;
  std::string direct_refusal_;
  std::string reservation_refusal_;
};

}  // namespace kvtier
