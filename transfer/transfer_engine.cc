#include "transfer/transfer_engine.h"

#include "transfer/transfer_state.h"

#include <system_error>
#include <utility>

namespace kvtier {
namespace {

std::size_t size_of(const TransferRequest& request) {
  if (uses_disk(request.route)) return request.buffer.size();
  std::size_t bytes = 0;
  for (const CopySpan& span : request.spans) bytes += span.bytes;
  return bytes;
}

}  // namespace

const char* to_string(Route route) {
  constexpr const char* kNames[kRouteCount] = {"disk_to_host", "host_to_device", "device_to_host",
                                               "host_to_disk"};
  KVTIER_CHECK(index_of(route) < kRouteCount, "route {}", index_of(route));
  return kNames[index_of(route)];
}

Result<std::unique_ptr<TransferEngine>> TransferEngine::open(const Options& options,
                                                             const Clock& clock, File* disk,
                                                             Link* link) {
  if (options.max_transfers == 0 || options.in_flight_bytes_max == 0) {
    return invalid_argument(fmt::format("max_transfers {}, in_flight_bytes_max {}: expected more",
                                        options.max_transfers, options.in_flight_bytes_max));
  }
  if (!(options.background_share >= 0.0 && options.background_share <= 1.0)) {
    return invalid_argument(
        fmt::format("background_share is {}, expected 0 to 1", options.background_share));
  }
  std::unique_ptr<TransferEngine> engine(
      new TransferEngine(std::make_unique<State>(options, clock, disk, link)));
  if (!options.threads) return engine;
  State& state = *engine->state_;
  for (const std::unique_ptr<Lane>& lane : state.lanes) {
    if (lane == nullptr) continue;
    try {
      lane->thread = std::thread([&state, lane = lane.get()] { state.serve(*lane); });
    } catch (const std::system_error& error) {
      KVTIER_RETURN_IF_ERROR(engine->close());
      return io_error(fmt::format("no thread for transfers: {}", error.what()));
    }
  }
  return engine;
}

TransferEngine::TransferEngine(std::unique_ptr<State> state) : state_(std::move(state)) {}

TransferEngine::~TransferEngine() {
  KVTIER_CHECK(state_->closed, "a transfer engine was destroyed without close()");
  KVTIER_CHECK(state_->handles == 0, "a transfer engine was destroyed under {} handles",
               state_->handles);
}

Result<Transfer> TransferEngine::submit(const TransferRequest& request) {
  State::Lock lock(state_->mutex);
  // The messages are short enough for std::string to keep them in itself: a refusal that is part
  // of normal operation must not allocate either.
  if (state_->closing) return cancelled("engine closed");
  Lane* const lane = state_->lane_of(request.route);
  if (lane == nullptr) {
    return unsupported(fmt::format("{}: there is no such tier", to_string(request.route)));
  }
  TransferRecord* const record = state_->free.pop_front();
  if (record == nullptr) return busy("no free record");
  record->request = request;
  record->bytes = size_of(request);
  record->has_handle = true;
  record->cancel_requested = false;
  record->cancel_sent = false;
  record->restarts = 0;
  record->result = Status();
  ++state_->handles;
  ++state_->outstanding;
  state_->routes[index_of(request.route)].stats.submitted_bytes += record->bytes;
  Transfer handle(this, static_cast<std::uint32_t>(record - state_->records.data()));
  if (record->bytes == 0) {
    state_->finish(*record, TransferState::kDone);
    return handle;
  }
  record->state = TransferState::kQueued;
  state_->queue_of(*record).push_back(*record);
  ++lane->queued;
  state_->nudge(*lane, lock);
  return handle;
}

bool TransferEngine::progress() {
  State::Lock lock(state_->mutex);
  if (state_->options.threads) return state_->outstanding > 0;
  return state_->advance(lock);
}

void TransferEngine::drain() {
  State::Lock lock(state_->mutex);
  if (state_->options.threads) {
    state_->changed.wait(lock, [this] { return state_->outstanding == 0; });
    return;
  }
  while (state_->outstanding > 0) state_->advance(lock);
}

Status TransferEngine::close() {
  {
    const std::lock_guard lock(state_->mutex);
    KVTIER_CHECK(!state_->closed, "close() was called before");
    state_->closing = true;
  }
  drain();
  state_->stop_threads();
  state_->closed = true;
  return {};
}

RouteStats TransferEngine::stats(Route route) const {
  const std::lock_guard lock(state_->mutex);
  return state_->routes[index_of(route)].stats;
}

Transfer::Transfer(Transfer&& other) noexcept
    : engine_(std::exchange(other.engine_, nullptr)), record_(other.record_) {}

Transfer& Transfer::operator=(Transfer&& other) noexcept {
  Transfer moved(std::move(other));
  std::swap(engine_, moved.engine_);
  std::swap(record_, moved.record_);
  return *this;
}

Transfer::~Transfer() {
  if (engine_ == nullptr) return;
  TransferEngine::State& state = *engine_->state_;
  const std::lock_guard lock(state.mutex);
  TransferRecord& record = state.records[record_];
  record.has_handle = false;
  --state.handles;
  if (is_terminal(record.state)) state.release(record);
}

TransferState Transfer::poll() const {
  KVTIER_CHECK(engine_ != nullptr, "poll() on an empty handle");
  TransferEngine::State& state = *engine_->state_;
  const std::lock_guard lock(state.mutex);
  return state.records[record_].state;
}

Status Transfer::wait() {
  KVTIER_CHECK(engine_ != nullptr, "wait() on an empty handle");
  TransferEngine::State& state = *engine_->state_;
  TransferEngine::State::Lock lock(state.mutex);
  TransferRecord& record = state.records[record_];
  state.wait_for(record, lock);
  Status result = std::exchange(record.result, Status());
  record.has_handle = false;
  --state.handles;
  state.release(record);
  engine_ = nullptr;
  return result;
}

void Transfer::raise(Priority priority) {
  KVTIER_CHECK(engine_ != nullptr, "raise() on an empty handle");
  TransferEngine::State& state = *engine_->state_;
  TransferEngine::State::Lock lock(state.mutex);
  TransferRecord& record = state.records[record_];
  if (record.state != TransferState::kQueued) return;
  if (index_of(record.request.priority) <= index_of(priority)) return;
  state.queue_of(record).remove(record);
  record.request.priority = priority;
  state.queue_of(record).push_back(record);
  state.nudge(*state.lane_of(record.request.route), lock);
}

void Transfer::cancel() {
  KVTIER_CHECK(engine_ != nullptr, "cancel() on an empty handle");
  TransferEngine::State& state = *engine_->state_;
  TransferEngine::State::Lock lock(state.mutex);
  TransferRecord& record = state.records[record_];
  if (is_terminal(record.state) || record.cancel_requested) return;
  Lane& lane = *state.lane_of(record.request.route);
  if (record.state == TransferState::kQueued) {
    state.queue_of(record).remove(record);
    --lane.queued;
    record.result = cancelled("before start");
    state.finish(record, TransferState::kCancelled);
    return;
  }
  record.cancel_requested = true;
  ++lane.cancels_wanted;
  state.nudge(lane, lock);
}

}  // namespace kvtier
