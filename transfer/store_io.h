#pragma once

#include "transfer/file.h"

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

namespace kvtier {

/// One read or write of a store's segment.
struct StoreOperation {
  FileOperation io;
  std::uint32_t file = 0;  ///< Which of the segments.
  /// The caller's, for telling operations apart.
  std::size_t index = 0;
  std::uint32_t attempts = 0;
};

/// Runs batches of operations over several files, each as deep as its queue. One thread at a time;
/// allocates only when made.
class StoreIo {
 public:
  /// Borrows the files; all stay open.
  explicit StoreIo(std::span<const std::unique_ptr<File>> files);

  /// Starts all and returns when all have ended. `finished` is called for each as it ends, in any
  /// order, after what the file has room for again has been started: work on one overlaps with the
  /// reading of the next. A short transfer is repeated, three times at most; then, and at the end
  /// of a file, it is an `io_error`.
  void run(std::span<StoreOperation> operations,
           const std::function<void(StoreOperation&)>& finished);

 private:
  struct Lane {
    File* file = nullptr;
    std::uint32_t in_flight = 0;
    std::vector<FileOperation*> again;  ///< Came short; started before anything new.
  };
  bool start(Lane& lane, std::span<FileOperation* const> operations, std::size_t& started);
  std::size_t start_more(std::span<StoreOperation> operations, std::size_t next);
  std::size_t collect(bool wait);

  std::vector<Lane> lanes_;
  std::vector<FileOperation*> batch_;
  std::vector<FileOperation*> ended_;
};

}  // namespace kvtier
