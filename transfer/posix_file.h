#pragma once

#include "transfer/file.h"
#include "transfer/scratch_file.h"

#include <cstdint>
#include <memory>
#include <string>

namespace kvtier {

/// A file served by a pool of threads that call `pread` and `pwrite`: works wherever files do.
///
/// A queued operation can be cancelled, a running one cannot. Each operation costs two short locks
/// and up to two thread switches; threads are started at `open` (as many as the queue is deep, 16
/// at most) and joined by `close`.
class PosixFile final : public File {
 public:
  /// Takes `scratch` over on success. `reason` goes into the traits.
  static Result<std::unique_ptr<File>> open(ScratchFile& scratch, std::uint32_t queue_depth,
                                            std::string reason);
  ~PosixFile() override;

  const FileTraits& traits() const override;
  std::uint64_t size_bytes() const override;
  Status register_buffers(std::span<const std::span<std::byte>> ranges) override;
  std::size_t submit(std::span<FileOperation* const> operations) override;
  std::size_t reap(std::span<FileOperation*> done, Duration timeout) override;
  void cancel(FileOperation* operation) override;
  void wake() override;
  Status sync() override;
  Status close() override;

 private:
  struct State;
  explicit PosixFile(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace kvtier
