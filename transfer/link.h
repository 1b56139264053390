#pragma once

#include "kernels/gather_blocks.h"
#include "memory/clock.h"
#include "memory/status.h"
#include "transfer/fault_plan.h"

#include <cstddef>
#include <memory>
#include <span>
#include <string>

namespace kvtier {

enum class LinkDirection : unsigned char { kHostToDevice, kDeviceToHost };

/// One gather over the link between host memory and the device. Owned by the caller until reaped,
/// like `FileOperation`; so are the span list and the memory it names.
struct LinkOperation {
  LinkDirection direction = LinkDirection::kHostToDevice;
  std::span<const CopySpan> spans;
  void* owner = nullptr;

  Status status;
  std::size_t transferred = 0;

  LinkOperation* next = nullptr;
};

/// The path between host memory and a device. One thread at a time drives a link.
class Link {
 public:
  virtual ~Link() = default;
  /// "memory", "faulty(memory)", later "cuda:0".
  virtual const std::string& name() const = 0;
  /// Same contract as `File::submit` and `File::reap`.
  virtual std::size_t submit(std::span<LinkOperation* const> operations) = 0;
  virtual std::size_t reap(std::span<LinkOperation*> done, Duration timeout) = 0;
  /// Same contract as `File::wake`.
  virtual void wake() {}
};

/// The link of a build without a GPU: the device is memory, a copy is a gather on the driving
/// thread and finishes inside `submit`.
std::unique_ptr<Link> make_memory_link(std::uint32_t queue_depth = 64);

/// Flips bits in copies (`FaultPlan::link_bitflip_rate`, per operation). Only a runtime that
/// verifies every hop can notice. Addresses differ from run to run, so the "place" of a copy is the
/// digest of its content: the same blocks are hit again whatever order they travel in.
std::unique_ptr<Link> make_faulty_link(std::unique_ptr<Link> wrapped, const FaultPlan& plan,
                                       FaultCounts* counts);

}  // namespace kvtier
