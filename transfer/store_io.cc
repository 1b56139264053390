#include "transfer/store_io.h"

#include <algorithm>
#include <chrono>

namespace kvtier {
namespace {

constexpr std::uint32_t kStoreAttempts = 3;
constexpr std::size_t kStoreBatch = 64;

// Whether the operation has to be started once more; otherwise its status is final.
bool came_short(StoreOperation& operation) {
  FileOperation& io = operation.io;
  if (!io.status.ok() || io.transferred == io.buffer.size()) return false;
  if (io.transferred > 0 && ++operation.attempts < kStoreAttempts) return true;
  io.status = io_error(
      fmt::format("{} B at {} came short: {} B", io.buffer.size(), io.offset, io.transferred));
  return false;
}

}  // namespace

StoreIo::StoreIo(std::span<const std::unique_ptr<File>> files) {
  std::size_t depth = 0;
  for (const std::unique_ptr<File>& file : files) {
    lanes_.push_back({.file = file.get()});
    lanes_.back().again.reserve(file->traits().queue_depth);
    depth += file->traits().queue_depth;
  }
  batch_.reserve(kStoreBatch);
  ended_.resize(std::max(depth, kStoreBatch));
}

// Starts the first operations of a list as far as the lane's queue goes; true when all of them.
bool StoreIo::start(Lane& lane, std::span<FileOperation* const> operations, std::size_t& started) {
  started = lane.file->submit(operations);
  lane.in_flight += static_cast<std::uint32_t>(started);
  return started == operations.size();
}

// Starts operations in order, beginning with `next`, as long as their files take them.
std::size_t StoreIo::start_more(std::span<StoreOperation> operations, std::size_t next) {
  for (Lane& lane : lanes_) {
    std::size_t started = 0;
    if (!lane.again.empty()) start(lane, lane.again, started);
    lane.again.erase(lane.again.begin(), lane.again.begin() + static_cast<std::ptrdiff_t>(started));
  }
  while (next < operations.size()) {
    Lane& lane = lanes_[operations[next].file];
    if (!lane.again.empty()) return next;
    batch_.clear();
    while (next + batch_.size() < operations.size() && batch_.size() < kStoreBatch &&
           operations[next + batch_.size()].file == operations[next].file) {
      StoreOperation& operation = operations[next + batch_.size()];
      operation.io.owner = &operation;
      operation.attempts = 0;
      batch_.push_back(&operation.io);
    }
    std::size_t started = 0;
    const bool all = start(lane, batch_, started);
    next += started;
    if (!all) break;
  }
  return next;
}

// Moves what has ended to the front of `ended_`; with `wait`, at least one of them.
std::size_t StoreIo::collect(bool wait) {
  std::size_t count = 0;
  do {
    for (Lane& lane : lanes_) {
      if (lane.in_flight == 0 || count == ended_.size()) continue;
      const Duration timeout =
          wait && count == 0 ? Duration(std::chrono::milliseconds(10)) : Duration::zero();
      const std::size_t reaped = lane.file->reap(std::span(ended_).subspan(count), timeout);
      lane.in_flight -= static_cast<std::uint32_t>(reaped);
      count += reaped;
    }
  } while (wait && count == 0);
  return count;
}

void StoreIo::run(std::span<StoreOperation> operations,
                  const std::function<void(StoreOperation&)>& finished) {
  std::size_t next = 0;
  std::size_t left = operations.size();
  next = start_more(operations, next);
  while (left > 0) {
    const std::size_t count = collect(true);
    std::size_t final_count = 0;
    for (std::size_t i = 0; i < count; ++i) {
      auto& operation = *static_cast<StoreOperation*>(ended_[i]->owner);
      if (came_short(operation)) {
        lanes_[operation.file].again.push_back(&operation.io);
      } else {
        ended_[final_count++] = ended_[i];
      }
    }
    next = start_more(operations, next);
    for (std::size_t i = 0; i < final_count; ++i) {
      finished(*static_cast<StoreOperation*>(ended_[i]->owner));
    }
    left -= final_count;
  }
}

}  // namespace kvtier
