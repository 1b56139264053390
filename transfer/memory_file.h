#pragma once

#include "transfer/file.h"

#include <cstdint>
#include <memory>

namespace kvtier {

/// A file in ordinary memory: for tests, and for the simulator. Operations finish inside `submit`
/// and are reaped in order. Not durable.
class MemoryFile final : public File {
 public:
  struct Options {
    std::uint64_t bytes = 0;
    std::uint32_t queue_depth = 64;
    std::size_t alignment = 4096;
  };
  explicit MemoryFile(const Options& options);
  ~MemoryFile() override;

  const FileTraits& traits() const override;
  std::uint64_t size_bytes() const override;
  Status register_buffers(std::span<const std::span<std::byte>> ranges) override;
  std::size_t submit(std::span<FileOperation* const> operations) override;
  std::size_t reap(std::span<FileOperation*> done, Duration timeout) override;
  void cancel(FileOperation* operation) override;
  Status sync() override;
  Status close() override;

  /// The stored bytes, for tests that damage them.
  std::span<std::byte> bytes();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace kvtier
