#include "transfer/posix_file.h"

#include "transfer/file_error.h"
#include "transfer/operation_list.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace kvtier {
namespace {

constexpr std::uint32_t kThreadsMax = 16;

// Runs one operation to its end on the calling thread.
void execute(FileOperation& operation, const ScratchFile& scratch) {
  operation.status = Status();
  operation.transferred = 0;
  const bool is_read = operation.kind == FileOperation::Kind::kRead;
  if (!is_read) {
    operation.status = check_fits(operation, scratch.size_bytes());
    if (!operation.status.ok()) return;
  }
  const auto offset = static_cast<off_t>(operation.offset);
  ssize_t moved = 0;
  do {
    moved = is_read ? ::pread(scratch.descriptor(), operation.buffer.data(),
                              operation.buffer.size(), offset)
                    : ::pwrite(scratch.descriptor(), operation.buffer.data(),
                               operation.buffer.size(), offset);
  } while (moved < 0 && (errno == EINTR || errno == EAGAIN));
  if (moved < 0) {
    operation.status = describe_failure(operation, errno);
  } else {
    operation.transferred = static_cast<std::size_t>(moved);
  }
}

}  // namespace

struct PosixFile::State {
  State(ScratchFile opened, std::uint32_t queue_depth, std::string reason)
      : scratch(std::move(opened)) {
    traits.backend = "posix";
    traits.reason = std::move(reason);
    traits.queue_depth = queue_depth;
    traits.direct = scratch.direct();
    traits.reopen_path = scratch.reopen_path();
  }

  void serve();
  void stop();

  FileTraits traits;
  ScratchFile scratch;
  std::vector<std::thread> threads;
  bool closed = false;

  // Guards what follows; never held across a system call on the file.
  std::mutex mutex;
  std::condition_variable queued_some;
  std::condition_variable finished_some;
  OperationList<FileOperation> queued;
  OperationList<FileOperation> finished;
  std::uint32_t in_flight = 0;
  bool woken = false;
  bool stopping = false;
};

void PosixFile::State::serve() {
  std::unique_lock lock(mutex);
  while (true) {
    queued_some.wait(lock, [this] { return stopping || !queued.empty(); });
    FileOperation* const operation = queued.pop();
    if (operation == nullptr) return;
    lock.unlock();
    execute(*operation, scratch);
    lock.lock();
    finished.push(operation);
    finished_some.notify_one();
  }
}

void PosixFile::State::stop() {
  {
    const std::lock_guard lock(mutex);
    stopping = true;
  }
  queued_some.notify_all();
  for (std::thread& thread : threads) thread.join();
  threads.clear();
}

Result<std::unique_ptr<File>> PosixFile::open(ScratchFile& scratch, std::uint32_t queue_depth,
                                              std::string reason) {
  if (queue_depth == 0) return invalid_argument("queue depth is 0, expected 1 or more");
  auto state = std::make_unique<State>(std::move(scratch), queue_depth, std::move(reason));
  const std::uint32_t thread_count = std::min(queue_depth, kThreadsMax);
  state->threads.reserve(thread_count);
  try {
    for (std::uint32_t i = 0; i < thread_count; ++i) {
      state->threads.emplace_back([state = state.get()] { state->serve(); });
    }
  } catch (const std::system_error& error) {
    // A smaller pool does the same work; none at all cannot.
    if (state->threads.empty()) {
      return io_error(fmt::format("no thread for file I/O: {}", error.what()));
    }
  }
  return std::unique_ptr<File>(new PosixFile(std::move(state)));
}

PosixFile::PosixFile(std::unique_ptr<State> state) : state_(std::move(state)) {}

PosixFile::~PosixFile() {
  KVTIER_CHECK(state_->closed, "a posix file was destroyed without close()");
}

const FileTraits& PosixFile::traits() const { return state_->traits; }
std::uint64_t PosixFile::size_bytes() const { return state_->scratch.size_bytes(); }
Status PosixFile::register_buffers(std::span<const std::span<std::byte>>) { return {}; }

std::size_t PosixFile::submit(std::span<FileOperation* const> operations) {
  KVTIER_CHECK(!state_->closed, "submit after close()");
  std::size_t accepted = 0;
  {
    const std::lock_guard lock(state_->mutex);
    const std::size_t room = state_->traits.queue_depth - state_->in_flight;
    accepted = std::min(operations.size(), room);
    for (FileOperation* operation : operations.first(accepted)) {
      check_aligned(*operation, state_->traits.alignment);
      state_->queued.push(operation);
    }
    state_->in_flight += static_cast<std::uint32_t>(accepted);
  }
  for (std::size_t i = 0; i < accepted; ++i) state_->queued_some.notify_one();
  return accepted;
}

std::size_t PosixFile::reap(std::span<FileOperation*> done, Duration timeout) {
  std::unique_lock lock(state_->mutex);
  if (state_->finished.empty() && state_->in_flight > 0 && timeout > Duration::zero()) {
    state_->finished_some.wait_for(lock, timeout,
                                   [this] { return state_->woken || !state_->finished.empty(); });
  }
  state_->woken = false;
  const std::size_t count = state_->finished.pop_into(done);
  state_->in_flight -= static_cast<std::uint32_t>(count);
  return count;
}

void PosixFile::cancel(FileOperation* operation) {
  const std::lock_guard lock(state_->mutex);
  if (!state_->queued.remove(operation)) return;
  operation->status = cancelled("not started");
  operation->transferred = 0;
  state_->finished.push(operation);
  state_->finished_some.notify_one();
}

void PosixFile::wake() {
  {
    const std::lock_guard lock(state_->mutex);
    state_->woken = true;
  }
  state_->finished_some.notify_one();
}

Status PosixFile::sync() { return state_->scratch.sync(); }

Status PosixFile::close() {
  {
    const std::lock_guard lock(state_->mutex);
    KVTIER_CHECK(state_->in_flight == 0, "close() with {} operations in flight", state_->in_flight);
  }
  state_->closed = true;
  state_->stop();
  return state_->scratch.close();
}

}  // namespace kvtier
