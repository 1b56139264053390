#pragma once

#include "memory/clock.h"
#include "transfer/file.h"

#include <memory>

namespace kvtier {

/// Makes a file as slow as a drive that is not there: completions are held back until the emulated
/// drive would have had them.
///
/// The drive moves one operation after another at `bytes_per_second`, in order of acceptance, and
/// each is ready `latency` after its last byte has moved: at depth 1 an operation takes both, at
/// depth the latencies overlap and the rate is what counts. A file that is slower than that by
/// itself stays as slow as it is. Bytes and failures are the wrapped file's.
///
/// Time is the clock's; waiting in `reap` is real, so a clock that stands still holds everything
/// back until it is moved on. Otherwise as `File` says; allocates nothing after construction.
class PacedFile final : public File {
 public:
  struct Pace {
    double bytes_per_second = 0;  ///< More than 0.
    Duration latency{};
  };
  /// The clock outlives the file.
  PacedFile(std::unique_ptr<File> wrapped, const Pace& pace, const Clock& clock);
  ~PacedFile() override;

  const FileTraits& traits() const override;
  std::uint64_t size_bytes() const override;
  Status register_buffers(std::span<const std::span<std::byte>> ranges) override;
  std::size_t submit(std::span<FileOperation* const> operations) override;
  std::size_t reap(std::span<FileOperation*> done, Duration timeout) override;
  void wake() override;
  void cancel(FileOperation* operation) override;
  Status sync() override;
  Status close() override;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace kvtier
