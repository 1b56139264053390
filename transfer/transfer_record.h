#pragma once

#include "transfer/transfer_engine.h"

#include <cstdint>
#include <vector>

namespace kvtier {

/// A transfer as the engine keeps it. Private to the engine and its movers.
///
/// Guarded by the engine's lock, except that `result`, `transferred` and the two operations belong
/// to the lane's thread while the transfer is in flight.
struct TransferRecord {
  static constexpr std::uint32_t kNone = UINT32_MAX;

  TransferRequest request;
  std::size_t bytes = 0;
  TransferState state = TransferState::kQueued;
  bool has_handle = false;
  bool cancel_requested = false;
  bool cancel_sent = false;
  unsigned restarts = 0;
  Duration started{};

  Status result;
  std::size_t transferred = 0;
  FileOperation file_operation;
  LinkOperation link_operation;

  std::uint32_t previous = kNone;
  std::uint32_t next = kNone;
};

/// First-in first-out queue of records, chained by index through the records: bounded by their
/// number, allocates nothing. A record is in one queue at a time. Not thread-safe.
class RecordQueue {
 public:
  explicit RecordQueue(std::vector<TransferRecord>& records) : records_(&records) {}

  bool empty() const { return first_ == TransferRecord::kNone; }
  /// Null when empty.
  TransferRecord* front() const { return empty() ? nullptr : &(*records_)[first_]; }

  void push_back(TransferRecord& record);
  void push_front(TransferRecord& record);
  /// Takes out a record that is in this queue.
  void remove(TransferRecord& record);
  /// Null when empty.
  TransferRecord* pop_front();

 private:
  std::uint32_t index_of(const TransferRecord& record) const {
    return static_cast<std::uint32_t>(&record - records_->data());
  }

  std::vector<TransferRecord>* records_;
  std::uint32_t first_ = TransferRecord::kNone;
  std::uint32_t last_ = TransferRecord::kNone;
};

}  // namespace kvtier
