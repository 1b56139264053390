#pragma once

#include "transfer/fault_plan.h"
#include "transfer/file.h"

#include <memory>

namespace kvtier {

/// Wraps any file and injects the faults of a plan. Failures it makes up carry "injected" in their
/// message. Same rules as the file it wraps, with one exception: a write that rots is copied first,
/// because the caller's bytes must stay as they are, and that copy may allocate.
///
/// At most one of the kinds that change a result fires per operation, in this order: eio,
/// misplaced, shortread, bitflip for reads; writeeio, enospc, lostwrite, rot for writes. `delay`
/// adds to any: a delayed completion is held back for up to eight other completions or calls of
/// `reap`, and never longer than anything else is in flight. Retrying at the same place draws anew.
class FaultyFile final : public File {
 public:
  /// `counts` may be null; otherwise it outlives the file.
  FaultyFile(std::unique_ptr<File> wrapped, const FaultPlan& plan, FaultCounts* counts);
  ~FaultyFile() override;

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
  std::unique_ptr<State> state_;
};

}  // namespace kvtier
