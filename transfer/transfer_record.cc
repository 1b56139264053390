#include "transfer/transfer_record.h"

namespace kvtier {

void RecordQueue::push_back(TransferRecord& record) {
  record.previous = last_;
  record.next = TransferRecord::kNone;
  (empty() ? first_ : (*records_)[last_].next) = index_of(record);
  last_ = index_of(record);
}

void RecordQueue::push_front(TransferRecord& record) {
  record.previous = TransferRecord::kNone;
  record.next = first_;
  (empty() ? last_ : (*records_)[first_].previous) = index_of(record);
  first_ = index_of(record);
}

void RecordQueue::remove(TransferRecord& record) {
  (index_of(record) == first_ ? first_ : (*records_)[record.previous].next) = record.next;
  (index_of(record) == last_ ? last_ : (*records_)[record.next].previous) = record.previous;
  record.previous = TransferRecord::kNone;
  record.next = TransferRecord::kNone;
}

TransferRecord* RecordQueue::pop_front() {
  TransferRecord* const record = front();
  if (record != nullptr) remove(*record);
  return record;
}

}  // namespace kvtier
