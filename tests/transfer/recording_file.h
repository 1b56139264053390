#pragma once

#include "transfer/file.h"

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <vector>

namespace kvtier::test {

/// A file without content that writes down what it is asked and finishes operations when the test
/// says so. Any thread may call the test's side; nothing here depends on time.
class RecordingFile final : public File {
 public:
  struct Options {
    std::uint32_t queue_depth = 64;
    /// Whether `reap` waits, as for a lane with a thread; a test that drives the engine itself
    /// wants it to return.
    bool waits = false;
    /// Operations finish as soon as they start.
    bool automatic = false;
  };
  struct Started {
    FileOperation::Kind kind;
    std::uint64_t offset;
    std::size_t bytes;
  };
  struct Outcome {
    Status status;
    /// Bytes that did not come.
    std::size_t missing = 0;
  };

  explicit RecordingFile(const Options& options) : options_(options) {
    traits_.backend = "recording";
    traits_.queue_depth = options.queue_depth;
  }

  /// What the next operations at `offset` end with, in order; afterwards they end well.
  void script(std::uint64_t offset, std::vector<Outcome> outcomes);
  /// Accepts this many operations per call of `submit` at most.
  void set_accepted_per_call(std::size_t count);
  void wait_for_started(std::size_t count);
  std::vector<Started> started() const;
  std::vector<std::uint64_t> started_offsets() const;
  /// Finishes the oldest operation in flight.
  void finish_oldest();
  /// Finishes all in flight, and from now on each as it starts.
  void finish_all();
  std::size_t in_flight_bytes_peak(FileOperation::Kind kind) const;
  std::size_t cancels() const;

  const FileTraits& traits() const override { return traits_; }
  std::uint64_t size_bytes() const override { return std::uint64_t{1} << 40; }
  Status register_buffers(std::span<const std::span<std::byte>>) override { return {}; }
  std::size_t submit(std::span<FileOperation* const> operations) override;
  std::size_t reap(std::span<FileOperation*> done, Duration timeout) override;
  /// Ends the operation as cancelled.
  void cancel(FileOperation* operation) override;
  void wake() override;
  Status sync() override { return {}; }
  Status close() override { return {}; }

 private:
  void finish(FileOperation* operation);

  const Options options_;
  FileTraits traits_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  bool automatic_ = options_.automatic;
  bool woken_ = false;
  std::size_t accepted_per_call_ = SIZE_MAX;
  std::size_t cancels_ = 0;
  std::vector<Started> started_;
  std::vector<FileOperation*> in_flight_;
  std::vector<FileOperation*> finished_;
  std::map<std::uint64_t, std::vector<Outcome>> scripts_;
  std::map<FileOperation::Kind, std::size_t> bytes_;
  std::map<FileOperation::Kind, std::size_t> bytes_peak_;
};

}  // namespace kvtier::test
