#include "transfer/transfer_state.h"

#include <algorithm>
#include <utility>

namespace kvtier {
namespace {

constexpr unsigned kRestartsMax = 3;
// Only a bound: a new request wakes a lane that waits, and so does every completion.
constexpr Duration kReapTimeout = std::chrono::milliseconds(100);

bool is_background(const TransferRecord& record) {
  return record.request.priority != Priority::kDemand;
}

Track track_of(Route route) {
  constexpr Track kTracks[kRouteCount] = {Track::kDiskToHost, Track::kHostToDevice,
                                          Track::kDeviceToHost, Track::kHostToDisk};
  return kTracks[index_of(route)];
}

const char* name_of(Priority priority) {
  constexpr const char* kNames[kPriorityCount] = {"demand", "prefetch", "write_back"};
  return kNames[index_of(priority)];
}

}  // namespace

TransferEngine::State::State(const Options& chosen, const Clock& time, File* disk, Link* link)
    : options(chosen), clock(time), records(chosen.max_transfers), free(records) {
  for (TransferRecord& record : records) free.push_back(record);
  for (int i = 0; i < kRouteCount; ++i) routes.emplace_back(records);
  if (disk != nullptr) {
    lanes[0] = std::make_unique<Lane>(make_file_mover(*disk),
                                      std::array{Route::kDiskToHost, Route::kHostToDisk}, records,
                                      options.background_share);
  }
  if (link != nullptr) {
    lanes[1] = std::make_unique<Lane>(make_link_mover(*link),
                                      std::array{Route::kHostToDevice, Route::kDeviceToHost},
                                      records, options.background_share);
  }
}

// Anything may run alone, so that a bound smaller than one transfer slows but never stops.
bool TransferEngine::State::fits(const RouteState& route, const Lane& lane,
                                 const TransferRecord& record) const {
  const std::size_t bound = options.in_flight_bytes_max;
  if (route.in_flight_bytes > 0 && route.in_flight_bytes + record.bytes > bound) return false;
  if (!is_background(record)) return true;
  if (lane.background_in_flight >= lane.background_max) return false;
  const auto share =
      static_cast<std::size_t>(static_cast<double>(bound) * options.background_share);
  return route.background_bytes == 0 || route.background_bytes + record.bytes <= share;
}

void TransferEngine::State::put_in_flight(Lane& lane, TransferRecord& record, Duration now) {
  RouteState& route = route_of(record);
  route.in_flight_bytes += record.bytes;
  route.stats.in_flight_bytes_peak =
      std::max(route.stats.in_flight_bytes_peak, route.in_flight_bytes);
  if (is_background(record)) {
    route.background_bytes += record.bytes;
    ++lane.background_in_flight;
  }
  ++lane.in_flight;
  record.state = TransferState::kInFlight;
  record.started = now;
}

void TransferEngine::State::take_out_of_flight(Lane& lane, TransferRecord& record) {
  RouteState& route = route_of(record);
  route.in_flight_bytes -= record.bytes;
  if (is_background(record)) {
    route.background_bytes -= record.bytes;
    --lane.background_in_flight;
  }
  --lane.in_flight;
}

void TransferEngine::State::collect_restarts(Lane& lane) {
  while (TransferRecord* const record = lane.restarts.pop_front()) {
    if (!record->cancel_requested) {
      lane.batch.push_back(record);
      continue;
    }
    take_out_of_flight(lane, *record);
    record->result = cancelled("before restart");
    finish(*record, TransferState::kCancelled);
  }
}

// Called after `collect_restarts`: what is in flight and wants cancelling is in the mover.
void TransferEngine::State::collect_cancels(Lane& lane) {
  if (lane.cancels_wanted == 0) return;
  lane.cancels_wanted = 0;
  for (TransferRecord& record : records) {
    const bool wanted = record.state == TransferState::kInFlight && record.cancel_requested &&
                        !record.cancel_sent && lane_of(record.request.route) == &lane;
    if (!wanted) continue;
    record.cancel_sent = true;
    lane.cancels.push_back(&record);
  }
}

void TransferEngine::State::collect_queued(Lane& lane) {
  const std::uint32_t depth = lane.mover->queue_depth();
  if (lane.queued == 0 || lane.in_flight == depth) return;
  const Duration now = clock.now();
  std::array<bool, kRouteCount> blocked{};
  for (std::size_t priority = 0; priority < kPriorityCount; ++priority) {
    for (const Route served : lane.routes) {
      RouteState& route = routes[index_of(served)];
      RecordQueue& queue = route.queues[priority];
      // A waiting record that does not fit keeps its route: else smaller ones of lower rank would
      // take each byte that becomes free before it.
      while (!blocked[index_of(served)] && !queue.empty() && lane.in_flight < depth) {
        TransferRecord& record = *queue.front();
        if (!fits(route, lane, record)) {
          blocked[index_of(served)] = true;
          break;
        }
        queue.remove(record);
        --lane.queued;
        put_in_flight(lane, record, now);
        lane.batch.push_back(&record);
      }
    }
  }
}

// Puts what the mover did not accept back where it came from, in its old order.
void TransferEngine::State::take_back(Lane& lane, std::size_t accepted) {
  while (lane.batch.size() > accepted) {
    TransferRecord& record = *lane.batch.back();
    lane.batch.pop_back();
    if (record.restarts > 0) {
      lane.restarts.push_front(record);
      continue;
    }
    take_out_of_flight(lane, record);
    if (record.cancel_requested) {
      record.result = cancelled("before start");
      finish(record, TransferState::kCancelled);
      continue;
    }
    record.state = TransferState::kQueued;
    queue_of(record).push_front(record);
    ++lane.queued;
  }
}

// Decides what becomes of a record that its mover is done with.
void TransferEngine::State::settle(Lane& lane, TransferRecord& record) {
  RouteStats& stats = route_of(record).stats;
  if (record.result.ok() && record.transferred < record.bytes) {
    if (record.restarts < kRestartsMax) {
      ++stats.short_transfers;
      ++record.restarts;
      record.cancel_sent = false;
      lane.restarts.push_back(record);
      return;
    }
    record.result = io_error(fmt::format("{}: {} of {} B at {}, {} times",
                                         to_string(record.request.route), record.transferred,
                                         record.bytes, record.request.offset, kRestartsMax + 1));
  }
  take_out_of_flight(lane, record);
  record_event(record);
  if (record.result.ok()) {
    finish(record, TransferState::kDone);
  } else if (record.result.code() == StatusCode::kCancelled) {
    finish(record, TransferState::kCancelled);
  } else {
    finish(record, TransferState::kFailed);
  }
}

void TransferEngine::State::record_event(const TransferRecord& record) {
  if (options.timeline == nullptr) return;
  options.timeline->record({.track = track_of(record.request.route),
                            .name = name_of(record.request.priority),
                            .start = record.started,
                            .duration = clock.now() - record.started,
                            .bytes = record.result.ok() ? record.bytes : 0});
}

void TransferEngine::State::finish(TransferRecord& record, TransferState end) {
  RouteStats& stats = route_of(record).stats;
  if (end == TransferState::kDone) {
    ++stats.transfers;
    stats.bytes += record.bytes;
  } else {
    ++(end == TransferState::kCancelled ? stats.cancelled : stats.failures);
  }
  record.state = end;
  --outstanding;
  if (!record.has_handle) release(record);
  changed.notify_all();
}

void TransferEngine::State::release(TransferRecord& record) {
  record.result = Status();
  free.push_front(record);
}

// Tells the lane's driver that there is news for it. Gives the lock up.
void TransferEngine::State::nudge(Lane& lane, Lock& lock) {
  const bool wake = lane.is_out && !lane.wake_sent;
  lane.wake_sent = lane.wake_sent || wake;
  lock.unlock();
  if (wake) {
    lane.mover->wake();
  } else {
    lane.work.notify_one();
  }
}

// Moves one lane on: starts what may start, waits for the first completion at most `timeout`.
// False when the lane has nothing to do.
bool TransferEngine::State::turn(Lane& lane, Duration timeout, Lock& lock) {
  lane.batch.clear();
  lane.cancels.clear();
  collect_restarts(lane);
  collect_cancels(lane);
  collect_queued(lane);
  if (lane.in_flight == 0) return false;
  lane.is_out = true;
  lane.wake_sent = false;
  lock.unlock();

  std::size_t accepted = 0;
  if (!lane.batch.empty()) accepted = lane.mover->submit(lane.batch);
  for (TransferRecord* const record : lane.cancels) lane.mover->cancel(*record);
  const std::size_t count = lane.mover->reap(lane.reaped, timeout);

  lock.lock();
  lane.is_out = false;
  KVTIER_CHECK(accepted > 0 || lane.in_flight > lane.batch.size(),
               "a lane with nothing in flight refuses {} transfers", lane.batch.size());
  take_back(lane, accepted);
  for (TransferRecord* const record : std::span(lane.reaped).first(count)) settle(lane, *record);
  return true;
}

// One turn of every lane, for an engine without threads. Returns whether anything is left.
bool TransferEngine::State::advance(Lock& lock) {
  if (driving) {
    // A lane has one driver at a time: let the other caller do it.
    changed.wait(lock, [this] { return !driving; });
    return outstanding > 0;
  }
  driving = true;
  Lane* const disk = lanes[0].get();
  Lane* const link = lanes[1].get();
  const auto is_busy = [](const Lane* lane) {
    return lane != nullptr && lane->queued + lane->in_flight > 0;
  };
  // Whoever waits in one lane must not keep the other from going on.
  if (is_busy(disk)) turn(*disk, is_busy(link) ? Duration::zero() : kReapTimeout, lock);
  if (is_busy(link)) turn(*link, is_busy(disk) ? Duration::zero() : kReapTimeout, lock);
  driving = false;
  changed.notify_all();
  return outstanding > 0;
}

void TransferEngine::State::wait_for(const TransferRecord& record, Lock& lock) {
  if (options.threads) {
    changed.wait(lock, [&record] { return is_terminal(record.state); });
    return;
  }
  while (!is_terminal(record.state)) advance(lock);
}

void TransferEngine::State::serve(Lane& lane) {
  Lock lock(mutex);
  while (true) {
    if (turn(lane, kReapTimeout, lock)) continue;
    if (closing && outstanding == 0) return;
    lane.work.wait(lock, [&] { return lane.queued > 0 || (closing && outstanding == 0); });
  }
}

void TransferEngine::State::stop_threads() {
  for (const std::unique_ptr<Lane>& lane : lanes) {
    if (lane == nullptr || !lane->thread.joinable()) continue;
    lane->work.notify_all();
    lane->thread.join();
  }
}

}  // namespace kvtier
