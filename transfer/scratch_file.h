#pragma once

#include "memory/status.h"
#include "transfer/open_file.h"

#include <cstdint>
#include <memory>
#include <string>

namespace kvtier {

/// The file under `UringFile` and `PosixFile`, nameless or (for a store) with a name: its
/// descriptor, and what the file system agreed to. Move-only; closes the descriptor. Not
/// thread-safe.
class ScratchFile {
 public:
  /// How a file that has a name comes to be opened.
  enum class Access : unsigned char { kCreate, kWrite, kRead };

  /// Errors as for `open_file`. Writes and reads one page to see whether direct I/O really works.
  static Result<ScratchFile> create(const FileOptions& options);
  /// A plain file of ours, mode 0600, in the folder that `folder` is a descriptor of; no symbolic
  /// link is followed. `kCreate` makes it, reserves `options.bytes` and fails when the name exists;
  /// otherwise the size is the file's own. `options.directory` is for messages. `not_found` when
  /// there is none, `unsupported` when it is not such a file; else as for `create`.
  static Result<ScratchFile> named(int folder, const std::string& name, Access access,
                                   const FileOptions& options);

  ScratchFile(ScratchFile&& other) noexcept;
  ScratchFile& operator=(ScratchFile&& other) noexcept;
  ~ScratchFile();

  int descriptor() const { return descriptor_; }
  std::uint64_t size_bytes() const { return size_bytes_; }
  bool direct() const { return direct_; }
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
  Status try_direct(const FileOptions& options, bool may_write);

  int descriptor_;
  std::uint64_t size_bytes_ = 0;
  bool direct_ = false;
  std::string direct_refusal_;
  std::string reservation_refusal_;
};

/// Puts a backend on a file, as `open_file` chooses it; takes `file` over on success.
Result<std::unique_ptr<File>> serve_file(ScratchFile& file, const FileOptions& options);

}  // namespace kvtier
