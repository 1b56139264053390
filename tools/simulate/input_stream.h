#pragma once

#include "memory/status.h"
#include "transfer/sha256.h"

#include <cstddef>
#include <memory>
#include <span>
#include <string>

namespace kvtier {

/// A file read front to back once, decompressed on the way when its name ends in `.zst`.
///
/// Move-only; one thread at a time. Holds two buffers of a few hundred KiB, whatever the file's
/// size. The digest is of the file's bytes as they lie on disk, so that a compressed trace has the
/// digest of its own file.
class InputStream {
 public:
  /// `not_found` or `io_error`, in the form of `input_error`.
  static Result<InputStream> open(const std::string& path);

  InputStream(InputStream&&) noexcept;
  InputStream& operator=(InputStream&&) noexcept;
  ~InputStream();

  const std::string& path() const;

  /// Fills as much of `target` as there is, and says how much that was; 0 is the end of the file.
  /// Fails with `io_error`, or with `corrupt` for a damaged or truncated zstd frame.
  Result<std::size_t> read(std::span<char> target);

  /// "sha256:..." of all that was read; complete once `read` has returned 0.
  std::string digest() const;

 private:
  struct State;
  explicit InputStream(std::unique_ptr<State> state);

  std::unique_ptr<State> state_;
};

}  // namespace kvtier
