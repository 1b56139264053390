#pragma once

#include "transfer/mover.h"
#include "transfer/transfer_engine.h"
#include "transfer/transfer_record.h"

#include <algorithm>
#include <array>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace kvtier {

constexpr std::size_t index_of(Route route) { return static_cast<std::size_t>(route); }
constexpr std::size_t index_of(Priority priority) { return static_cast<std::size_t>(priority); }
constexpr bool uses_disk(Route route) {
  return route == Route::kDiskToHost || route == Route::kHostToDisk;
}
constexpr bool is_terminal(TransferState state) {
  return state != TransferState::kQueued && state != TransferState::kInFlight;
}

/// What one route has waiting and on its way.
struct RouteState {
  explicit RouteState(std::vector<TransferRecord>& records)
      : queues{RecordQueue(records), RecordQueue(records), RecordQueue(records)} {}

  std::array<RecordQueue, kPriorityCount> queues;
  std::size_t in_flight_bytes = 0;
  std::size_t background_bytes = 0;
  RouteStats stats;
};

/// One file or link, the two routes over it and the thread that drives it.
struct Lane {
  Lane(std::unique_ptr<Mover> driven, std::array<Route, 2> served,
       std::vector<TransferRecord>& records, double background_share)
      : mover(std::move(driven)), routes(served), restarts(records) {
    const std::uint32_t depth = mover->queue_depth();
    background_max = std::max(1U, static_cast<std::uint32_t>(depth * background_share));
    batch.reserve(depth);
    cancels.reserve(depth);
    reaped.resize(depth);
  }

  const std::unique_ptr<Mover> mover;
  const std::array<Route, 2> routes;
  std::uint32_t background_max;
  std::thread thread;
  std::condition_variable work;

  // Belong to whoever drives the lane.
  std::vector<TransferRecord*> batch;
  std::vector<TransferRecord*> cancels;
  std::vector<TransferRecord*> reaped;

  // Guarded by the engine's lock.
  RecordQueue restarts;
  std::uint32_t queued = 0;
  std::uint32_t in_flight = 0;
  std::uint32_t background_in_flight = 0;
  std::uint32_t cancels_wanted = 0;
  // The driver is outside the lock and may be waiting in `reap`; one wake-up for it is enough.
  bool is_out = false;
  bool wake_sent = false;
};

/// One lock guards the records, the queues and the counts; it is held for a few list operations and
/// never across a call of a mover (which is where I/O and copies happen).
///
/// A record is free, queued on its route, in flight (in its mover, or in its lane's `restarts` or
/// `batch` on the way there), or terminal with a live handle.
struct TransferEngine::State {
  using Lock = std::unique_lock<std::mutex>;

  State(const Options& chosen, const Clock& time, File* disk, Link* link);

  Lane* lane_of(Route route) { return lanes[uses_disk(route) ? 0 : 1].get(); }
  RouteState& route_of(const TransferRecord& record) {
    return routes[index_of(record.request.route)];
  }
  RecordQueue& queue_of(const TransferRecord& record) {
    return route_of(record).queues[index_of(record.request.priority)];
  }

  // The functions below need the lock; `turn` gives it up in between.
  bool fits(const RouteState& route, const Lane& lane, const TransferRecord& record) const;
  void put_in_flight(Lane& lane, TransferRecord& record, Duration now);
  void take_out_of_flight(Lane& lane, TransferRecord& record);
  void collect_restarts(Lane& lane);
  void collect_cancels(Lane& lane);
  void collect_queued(Lane& lane);
  void take_back(Lane& lane, std::size_t accepted);
  void settle(Lane& lane, TransferRecord& record);
  void record_event(const TransferRecord& record);
  void finish(TransferRecord& record, TransferState end);
  void release(TransferRecord& record);
  void nudge(Lane& lane, Lock& lock);
  bool turn(Lane& lane, Duration timeout, Lock& lock);
  bool advance(Lock& lock);
  void wait_for(const TransferRecord& record, Lock& lock);

  void serve(Lane& lane);
  void stop_threads();

  const Options options;
  const Clock& clock;

  mutable std::mutex mutex;
  // Some transfer became terminal, or somebody stopped driving an engine without threads.
  std::condition_variable changed;
  std::vector<TransferRecord> records;
  RecordQueue free;
  std::vector<RouteState> routes;
  std::array<std::unique_ptr<Lane>, 2> lanes;
  std::uint32_t outstanding = 0;
  std::uint32_t handles = 0;
  bool driving = false;
  bool closing = false;
  bool closed = false;
};

}  // namespace kvtier
