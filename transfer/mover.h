#pragma once

#include "transfer/transfer_record.h"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

namespace kvtier {

/// What a lane of the engine drives: a file or a link, seen as a thing that carries out records.
/// Private to the engine. One thread at a time, except `wake`.
class Mover {
 public:
  virtual ~Mover() = default;
  /// Records that can be in flight at once.
  virtual std::uint32_t queue_depth() const = 0;
  /// Starts a leading part of `records`; returns how many.
  virtual std::size_t submit(std::span<TransferRecord* const> records) = 0;
  /// Hands back finished records with `result` and `transferred` set. Waits as `File::reap` does.
  virtual std::size_t reap(std::span<TransferRecord*> done, Duration timeout) = 0;
  /// Asks for an early end of a record in flight.
  virtual void cancel(TransferRecord& record) = 0;
  virtual void wake() = 0;
};

/// The file and the link outlive their mover.
std::unique_ptr<Mover> make_file_mover(File& file);
std::unique_ptr<Mover> make_link_mover(Link& link);

}  // namespace kvtier
