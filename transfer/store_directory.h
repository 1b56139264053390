#pragma once

#include "memory/status.h"
#include "transfer/file.h"

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

namespace kvtier {

/// The folder that a store keeps its files in: real, nameless, in memory or faulty. Opening one
/// takes it for this process until it is destroyed. One thread at a time.
class StoreDirectory {
 public:
  virtual ~StoreDirectory() = default;

  /// Path or other name, for messages.
  virtual const std::string& name() const = 0;
  /// Size of a file that exists, none otherwise. `io_error` when that cannot be told.
  virtual Result<std::optional<std::uint64_t>> size_of(const std::string& file) = 0;
  /// A new file of zeros, its space reserved where the file system can. `no_space` names the
  /// figures.
  virtual Result<std::unique_ptr<File>> create(const std::string& file, std::uint64_t bytes) = 0;
  /// `not_found` when there is none; `unsupported` when it is not a plain file of ours.
  virtual Result<std::unique_ptr<File>> open(const std::string& file) = 0;
  /// `ok` when there is none.
  virtual Status remove(const std::string& file) = 0;
  /// Whether the file that was opened or created last under this name is still there and whole:
  /// `io_error` says that it was removed, replaced or cut short.
  virtual Status check(const std::string& file) = 0;
  /// Makes names durable, where there are any.
  virtual Status sync() = 0;
  /// Bytes that the file system has left.
  virtual Result<std::uint64_t> free_bytes() = 0;
};

}  // namespace kvtier
