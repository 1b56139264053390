#include "tests/transfer/recording_file.h"

#include <algorithm>

namespace kvtier::test {

void RecordingFile::script(std::uint64_t offset, std::vector<Outcome> outcomes) {
  const std::lock_guard lock(mutex_);
  std::reverse(outcomes.begin(), outcomes.end());
  scripts_[offset] = std::move(outcomes);
}

void RecordingFile::set_accepted_per_call(std::size_t count) {
  const std::lock_guard lock(mutex_);
  accepted_per_call_ = count;
}

void RecordingFile::wait_for_started(std::size_t count) {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return started_.size() >= count; });
}

std::vector<RecordingFile::Started> RecordingFile::started() const {
  const std::lock_guard lock(mutex_);
  return started_;
}

std::vector<std::uint64_t> RecordingFile::started_offsets() const {
  std::vector<std::uint64_t> offsets;
  for (const Started& one : started()) offsets.push_back(one.offset);
  return offsets;
}

void RecordingFile::finish(FileOperation* operation) {
  operation->status = Status();
  operation->transferred = operation->buffer.size();
  std::vector<Outcome>& script = scripts_[operation->offset];
  if (!script.empty()) {
    operation->status = script.back().status;
    operation->transferred -= script.back().missing;
    script.pop_back();
  }
  finished_.push_back(operation);
}

void RecordingFile::finish_oldest() {
  const std::lock_guard lock(mutex_);
  KVTIER_CHECK(!in_flight_.empty(), "nothing in flight");
  finish(in_flight_.front());
  in_flight_.erase(in_flight_.begin());
  changed_.notify_all();
}

void RecordingFile::finish_all() {
  const std::lock_guard lock(mutex_);
  automatic_ = true;
  for (FileOperation* operation : in_flight_) finish(operation);
  in_flight_.clear();
  changed_.notify_all();
}

std::size_t RecordingFile::in_flight_bytes_peak(FileOperation::Kind kind) const {
  const std::lock_guard lock(mutex_);
  const auto found = bytes_peak_.find(kind);
  return found == bytes_peak_.end() ? 0 : found->second;
}

std::size_t RecordingFile::cancels() const {
  const std::lock_guard lock(mutex_);
  return cancels_;
}

std::size_t RecordingFile::submit(std::span<FileOperation* const> operations) {
  const std::lock_guard lock(mutex_);
  const std::size_t room = options_.queue_depth - in_flight_.size() - finished_.size();
  const std::size_t accepted = std::min({operations.size(), room, accepted_per_call_});
  for (FileOperation* operation : operations.first(accepted)) {
    started_.push_back({operation->kind, operation->offset, operation->buffer.size()});
    std::size_t& bytes = bytes_[operation->kind];
    bytes += operation->buffer.size();
    bytes_peak_[operation->kind] = std::max(bytes_peak_[operation->kind], bytes);
    if (automatic_) {
      finish(operation);
    } else {
      in_flight_.push_back(operation);
    }
  }
  changed_.notify_all();
  return accepted;
}

std::size_t RecordingFile::reap(std::span<FileOperation*> done, Duration timeout) {
  std::unique_lock lock(mutex_);
  if (options_.waits && finished_.empty() && !in_flight_.empty()) {
    changed_.wait_for(lock, timeout, [this] { return woken_ || !finished_.empty(); });
  }
  woken_ = false;
  const std::size_t count = std::min(done.size(), finished_.size());
  for (std::size_t i = 0; i < count; ++i) {
    done[i] = finished_[i];
    bytes_[done[i]->kind] -= done[i]->buffer.size();
  }
  finished_.erase(finished_.begin(), finished_.begin() + static_cast<std::ptrdiff_t>(count));
  return count;
}

void RecordingFile::cancel(FileOperation* operation) {
  const std::lock_guard lock(mutex_);
  ++cancels_;
  const auto found = std::find(in_flight_.begin(), in_flight_.end(), operation);
  if (found == in_flight_.end()) return;
  in_flight_.erase(found);
  operation->status = cancelled("by request");
  operation->transferred = 0;
  finished_.push_back(operation);
  changed_.notify_all();
}

void RecordingFile::wake() {
  const std::lock_guard lock(mutex_);
  woken_ = true;
  changed_.notify_all();
}

}  // namespace kvtier::test
