#pragma once

#include "memory/status.h"

#include <string>

namespace kvtier {

/// A file that is written whole or not at all: under a temporary name beside its own, then renamed.
/// Something that is no regular file (a pipe, /dev/null) is written directly; a link is followed.
///
/// Nothing lies on disk between `open` and `write`, so that a killed run leaves nothing behind.
class OutputFile {
 public:
  /// Checks that `write` can succeed. `invalid_argument` names the path and what is wrong with it.
  static Result<OutputFile> open(const std::string& path);

  /// Replaces what was there. `io_error` or `no_space`; the old content is still there then.
  Status write(const std::string& text) const;

 private:
  OutputFile(std::string path, bool direct) : path_(std::move(path)), direct_(direct) {}

  std::string path_;
  bool direct_;  ///< No regular file: renaming over it would replace a device by a file.
};

}  // namespace kvtier
