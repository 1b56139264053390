#pragma once

#include "transfer/file.h"
#include "transfer/scratch_file.h"

#include <cstdint>
#include <memory>
#include <string>

namespace kvtier {

/// A file driven through one io_uring: registered file, registered buffers where the limit on
/// locked memory allows, one system call per batch.
///
/// The kernel owns a buffer from `submit` until `reap`, and no call in between waits for it or
/// gives it up; `close` insists that nothing is in flight. Waiting costs one system call, reaping
/// what is already complete costs none.
class UringFile final : public File {
 public:
  /// Takes `scratch` over on success. `unsupported`, with the system's answer, where the kernel
  /// refuses io_uring or is too old for it (5.11).
  static Result<std::unique_ptr<File>> open(ScratchFile& scratch, std::uint32_t queue_depth,
                                            std::string reason);
  ~UringFile() override;

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
  explicit UringFile(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace kvtier
