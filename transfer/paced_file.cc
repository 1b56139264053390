#include "transfer/paced_file.h"

#include "memory/check.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <utility>
#include <vector>

namespace kvtier {

struct PacedFile::State {
  struct Pending {
    FileOperation* operation;
    Duration due;
    bool moved = false;  ///< The wrapped file is done with it.
  };

  std::unique_ptr<File> wrapped;
  Pace pace;
  const Clock& clock;
  FileTraits traits;
  Duration busy_until{};
  bool closed = false;
  std::vector<Pending> pending;  // In order of acceptance, and so of `due`.
  std::vector<FileOperation*> reaped;
  std::size_t moved = 0;

  std::mutex mutex;
  std::condition_variable woken;
  bool wake_wanted = false;  // Guarded by `mutex`.

  State(std::unique_ptr<File> file, const Pace& chosen, const Clock& time)
      : wrapped(std::move(file)), pace(chosen), clock(time) {
    KVTIER_CHECK(pace.bytes_per_second > 0, "a drive of {} bytes per second",
                 pace.bytes_per_second);
    refresh_traits();
    pending.reserve(traits.queue_depth);
    reaped.resize(traits.queue_depth);
  }

  void refresh_traits() {
    traits = wrapped->traits();
    traits.backend = fmt::format("paced({})", traits.backend);
  }

  Duration due_of(const FileOperation& operation) {
    const double seconds = static_cast<double>(operation.buffer.size()) / pace.bytes_per_second;
    const auto moving =
        std::chrono::duration_cast<Duration>(std::chrono::duration<double>(seconds));
    busy_until = std::max(busy_until, clock.now()) + moving;
    return busy_until + pace.latency;
  }

  void collect(Duration timeout) {
    if (moved == pending.size()) return;
    const std::size_t count = wrapped->reap(reaped, timeout);
    for (FileOperation* operation : std::span(reaped).first(count)) {
      std::ranges::find(pending, operation, &Pending::operation)->moved = true;
    }
    moved += count;
  }

  std::size_t hand_over(std::span<FileOperation*> done) {
    const Duration now = clock.now();
    std::size_t count = 0;
    std::size_t kept = 0;
    for (Pending& each : pending) {
      if (count < done.size() && each.moved && each.due <= now) {
        done[count++] = each.operation;
      } else {
        pending[kept++] = each;
      }
    }
    pending.resize(kept);
    moved -= count;
    return count;
  }

  /// Waits until the emulated drive has the first of what has moved.
  void wait_until_due(Duration timeout) {
    const Duration now = clock.now();
    Duration left = timeout;
    for (const Pending& each : pending) {
      if (each.moved) left = std::min(left, each.due - now);
    }
    std::unique_lock lock(mutex);
    if (left > Duration::zero()) woken.wait_for(lock, left, [this] { return wake_wanted; });
  }

  bool take_wake() {
    const std::lock_guard lock(mutex);
    return std::exchange(wake_wanted, false);
  }
};

PacedFile::PacedFile(std::unique_ptr<File> wrapped, const Pace& pace, const Clock& clock)
    : state_(std::make_unique<State>(std::move(wrapped), pace, clock)) {}

PacedFile::~PacedFile() {
  KVTIER_CHECK(state_->closed, "a paced file was destroyed without close()");
}

const FileTraits& PacedFile::traits() const { return state_->traits; }
std::uint64_t PacedFile::size_bytes() const { return state_->wrapped->size_bytes(); }

Status PacedFile::register_buffers(std::span<const std::span<std::byte>> ranges) {
  Status status = state_->wrapped->register_buffers(ranges);
  state_->refresh_traits();
  return status;
}

std::size_t PacedFile::submit(std::span<FileOperation* const> operations) {
  State& state = *state_;
  const std::size_t room = state.traits.queue_depth - state.pending.size();
  const std::size_t accepted =
      state.wrapped->submit(operations.first(std::min(room, operations.size())));
  for (FileOperation* operation : operations.first(accepted)) {
    state.pending.push_back({operation, state.due_of(*operation)});
  }
  return accepted;
}

std::size_t PacedFile::reap(std::span<FileOperation*> done, Duration timeout) {
  State& state = *state_;
  const Duration start = state.clock.now();
  state.collect(Duration::zero());
  std::size_t count = state.hand_over(done);
  while (count == 0 && !state.pending.empty() && !state.take_wake()) {
    const Duration left = timeout - (state.clock.now() - start);
    if (left <= Duration::zero()) return 0;
    // What the wrapped file still has cannot be handed over before it is done either.
    if (state.moved == 0) {
      state.collect(left);
      if (state.moved == 0) return 0;
    } else {
      state.wait_until_due(left);
      state.collect(Duration::zero());
    }
    count = state.hand_over(done);
    if (count == 0 && state.clock.now() == start) return 0;
  }
  return count;
}

void PacedFile::wake() {
  {
    const std::lock_guard lock(state_->mutex);
    state_->wake_wanted = true;
  }
  state_->woken.notify_one();
  state_->wrapped->wake();
}

void PacedFile::cancel(FileOperation* operation) {
  const auto found = std::ranges::find(state_->pending, operation, &State::Pending::operation);
  if (found != state_->pending.end() && !found->moved) state_->wrapped->cancel(operation);
}

Status PacedFile::sync() { return state_->wrapped->sync(); }

Status PacedFile::close() {
  KVTIER_CHECK(state_->pending.empty(), "close() with {} operations in flight",
               state_->pending.size());
  state_->closed = true;
  return state_->wrapped->close();
}

}  // namespace kvtier
