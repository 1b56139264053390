#include "transfer/uring_file.h"

#include "transfer/file_error.h"
#include "transfer/operation_list.h"

#include <liburing.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <functional>
#include <vector>

namespace kvtier {
namespace {

constexpr std::size_t kRegisteredBytesMax = std::size_t{1} << 30;
constexpr std::size_t kRegisteredBuffersMax = 1 << 14;
// The kernel asks for a retry under memory pressure; after this many the disk counts as failed.
constexpr std::uint32_t kAttemptsMax = 64;
// Completions copied out of the ring at a time.
constexpr unsigned kCompletionBatch = 64;
// What a submission that is no operation carries in place of the operation's address.
constexpr std::uint64_t kWakeTag = 1;
constexpr std::uint64_t kCancelTag = 2;

// Answers to io_uring_enter after which the submissions are still in the ring, to be sent again.
bool is_temporary(int error_number) {
  return error_number == EINTR || error_number == EAGAIN || error_number == EBUSY ||
         error_number == ENOMEM || error_number == ETIME;
}

void append_split(std::vector<iovec>& buffers, std::span<std::byte> range) {
  while (!range.empty()) {
    const std::span<std::byte> part = range.first(std::min(range.size(), kRegisteredBytesMax));
    buffers.push_back({.iov_base = part.data(), .iov_len = part.size()});
    range = range.subspan(part.size());
  }
}

}  // namespace

// Invariants:
//  - in_flight counts operations accepted and not yet reaped: in the ring or the kernel, in `again`
//    or in `finished`. It never exceeds the queue depth.
//  - The ring has room for every operation, one cancellation of each and the wake-up, so its
//    completion side (twice as large) cannot overflow.
struct UringFile::State {
  State(ScratchFile opened, std::uint32_t queue_depth, std::string reason)
      : scratch(std::move(opened)) {
    traits.backend = "io_uring";
    traits.reason = std::move(reason);
    traits.queue_depth = queue_depth;
    traits.direct = scratch.direct();
    traits.reopen_path = scratch.reopen_path();
  }

  io_uring_sqe* next_submission();
  bool prepare(FileOperation& operation);
  int fixed_buffer_of(std::span<const std::byte> buffer) const;
  void prepare_again();
  void arm_wake();
  void flush();
  void collect();
  void finish(FileOperation& operation, int result);
  void wait(Duration timeout);

  FileTraits traits;
  ScratchFile scratch;
  io_uring ring{};
  int wake_descriptor = -1;
  bool wake_armed = false;
  bool woken = false;
  bool fixed_file = false;
  bool closed = false;
  std::uint32_t in_flight = 0;
  // Sorted by address.
  std::vector<iovec> fixed_buffers;
  OperationList<FileOperation> again;
  OperationList<FileOperation> finished;
};

Result<std::unique_ptr<File>> UringFile::open(ScratchFile& scratch, std::uint32_t queue_depth,
                                              std::string reason) {
  if (queue_depth == 0 || queue_depth > 4096) {
    return invalid_argument(fmt::format("queue depth is {}, expected 1 to 4096", queue_depth));
  }
  io_uring ring{};
  const int refused = io_uring_queue_init(2 * queue_depth + 1, &ring, 0);
  if (refused < 0) {
    return unsupported(fmt::format("io_uring is refused ({})", error_text(-refused)));
  }
  if ((ring.features & IORING_FEAT_EXT_ARG) == 0) {
    io_uring_queue_exit(&ring);
    return unsupported("io_uring of this kernel cannot wait with a timeout (needs 5.11)");
  }
  const int wake_descriptor = ::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (wake_descriptor < 0) {
    const int error = errno;
    io_uring_queue_exit(&ring);
    return io_error(fmt::format("eventfd: {}", error_text(error)));
  }
  const int descriptor = scratch.descriptor();
  auto state = std::make_unique<State>(std::move(scratch), queue_depth, std::move(reason));
  state->ring = ring;
  state->wake_descriptor = wake_descriptor;
  // Saves a reference count per operation; where it is refused the plain descriptor serves.
  state->fixed_file = io_uring_register_files(&state->ring, &descriptor, 1) == 0;
  return std::unique_ptr<File>(new UringFile(std::move(state)));
}

UringFile::UringFile(std::unique_ptr<State> state) : state_(std::move(state)) {}

UringFile::~UringFile() {
  KVTIER_CHECK(state_->closed, "a uring file was destroyed without close()");
}

const FileTraits& UringFile::traits() const { return state_->traits; }
std::uint64_t UringFile::size_bytes() const { return state_->scratch.size_bytes(); }

Status UringFile::register_buffers(std::span<const std::span<std::byte>> ranges) {
  KVTIER_CHECK(state_->in_flight == 0, "register_buffers with {} operations in flight",
               state_->in_flight);
  if (!state_->fixed_buffers.empty()) {
    io_uring_unregister_buffers(&state_->ring);
    state_->fixed_buffers.clear();
    state_->traits.fixed_buffers = false;
  }
  std::vector<iovec> buffers;
  for (const std::span<std::byte> range : ranges) append_split(buffers, range);
  if (buffers.empty()) return {};
  std::sort(buffers.begin(), buffers.end(),
            [](const iovec& a, const iovec& b) { return std::less<>{}(a.iov_base, b.iov_base); });
  const int refused = buffers.size() > kRegisteredBuffersMax
                          ? -E2BIG
                          : io_uring_register_buffers(&state_->ring, buffers.data(),
                                                      static_cast<unsigned>(buffers.size()));
  if (refused == 0) {
    state_->fixed_buffers = std::move(buffers);
    state_->traits.fixed_buffers = true;
    return {};
  }
  std::string& reason = state_->traits.reason;
  reason += fmt::format("{}buffers are not registered ({}; see the limit on locked memory)",
                        reason.empty() ? "" : "; ", error_text(-refused));
  return {};
}

int UringFile::State::fixed_buffer_of(std::span<const std::byte> buffer) const {
  const auto after =
      std::upper_bound(fixed_buffers.begin(), fixed_buffers.end(), buffer.data(),
                       [](const std::byte* address, const iovec& fixed) {
                         return std::less<>{}(static_cast<const void*>(address), fixed.iov_base);
                       });
  if (after == fixed_buffers.begin()) return -1;
  const iovec& fixed = *(after - 1);
  const auto start =
      static_cast<std::size_t>(buffer.data() - static_cast<const std::byte*>(fixed.iov_base));
  if (start > fixed.iov_len || buffer.size() > fixed.iov_len - start) return -1;
  return static_cast<int>(after - 1 - fixed_buffers.begin());
}

io_uring_sqe* UringFile::State::next_submission() {
  io_uring_sqe* submission = io_uring_get_sqe(&ring);
  if (submission != nullptr) return submission;
  flush();
  return io_uring_get_sqe(&ring);
}

// False when the ring has no place: nothing has changed.
bool UringFile::State::prepare(FileOperation& operation) {
  io_uring_sqe* const submission = next_submission();
  if (submission == nullptr) return false;
  const int file = fixed_file ? 0 : scratch.descriptor();
  const auto length = static_cast<unsigned>(operation.buffer.size());
  const int fixed = fixed_buffer_of(operation.buffer);
  if (operation.kind == FileOperation::Kind::kRead) {
    if (fixed < 0) {
      io_uring_prep_read(submission, file, operation.buffer.data(), length, operation.offset);
    } else {
      io_uring_prep_read_fixed(submission, file, operation.buffer.data(), length, operation.offset,
                               fixed);
    }
  } else if (fixed < 0) {
    io_uring_prep_write(submission, file, operation.buffer.data(), length, operation.offset);
  } else {
    io_uring_prep_write_fixed(submission, file, operation.buffer.data(), length, operation.offset,
                              fixed);
  }
  if (fixed_file) io_uring_sqe_set_flags(submission, IOSQE_FIXED_FILE);
  io_uring_sqe_set_data(submission, &operation);
  ++operation.token;
  return true;
}

// What the kernel sent back with "try again".
void UringFile::State::prepare_again() {
  while (FileOperation* const operation = again.pop()) {
    if (prepare(*operation)) continue;
    again.push(operation);
    return;
  }
}

// A poll and not a read, so that the kernel never owns a buffer of ours that close() must outwait.
void UringFile::State::arm_wake() {
  if (wake_armed) return;
  io_uring_sqe* const submission = next_submission();
  if (submission == nullptr) return;
  io_uring_prep_poll_add(submission, wake_descriptor, POLLIN);
  io_uring_sqe_set_data64(submission, kWakeTag);
  wake_armed = true;
}

void UringFile::State::flush() {
  if (io_uring_sq_ready(&ring) == 0) return;
  const int result = io_uring_submit(&ring);
  KVTIER_CHECK(result >= 0 || is_temporary(-result), "io_uring_submit: {}", error_text(-result));
}

std::size_t UringFile::submit(std::span<FileOperation* const> operations) {
  KVTIER_CHECK(!state_->closed, "submit after close()");
  std::size_t accepted = 0;
  for (FileOperation* const operation : operations) {
    if (state_->in_flight == state_->traits.queue_depth) break;
    check_aligned(*operation, state_->traits.alignment);
    KVTIER_CHECK(operation->buffer.size() <= kRegisteredBytesMax, "an operation of {} B",
                 operation->buffer.size());
    operation->status = Status();
    operation->transferred = 0;
    operation->token = 0;
    if (operation->kind == FileOperation::Kind::kWrite) {
      operation->status = check_fits(*operation, size_bytes());
    }
    if (!operation->status.ok()) {
      state_->finished.push(operation);
    } else if (!state_->prepare(*operation)) {
      break;
    }
    ++state_->in_flight;
    ++accepted;
  }
  state_->flush();
  return accepted;
}

// Turns one completion into its operation's result, or into another attempt.
void UringFile::State::finish(FileOperation& operation, int result) {
  if ((result == -EAGAIN || result == -EINTR) && operation.token < kAttemptsMax) {
    again.push(&operation);
    return;
  }
  if (result >= 0) {
    operation.transferred = static_cast<std::size_t>(result);
  } else if (result == -ECANCELED) {
    operation.status = cancelled("by request");
  } else {
    operation.status = describe_failure(operation, -result);
  }
  finished.push(&operation);
}

// Copies the ready completions out and gives their places back before anything looks at them.
void UringFile::State::collect() {
  struct Completion {
    std::uint64_t tag;
    int result;
  };
  std::array<io_uring_cqe*, kCompletionBatch> ready;
  std::array<Completion, kCompletionBatch> copied;
  unsigned count = 0;
  do {
    count = io_uring_peek_batch_cqe(&ring, ready.data(), kCompletionBatch);
    for (unsigned i = 0; i < count; ++i) copied[i] = {ready[i]->user_data, ready[i]->res};
    io_uring_cq_advance(&ring, count);
    for (unsigned i = 0; i < count; ++i) {
      if (copied[i].tag == kCancelTag) continue;
      if (copied[i].tag == kWakeTag) {
        std::uint64_t calls = 0;
        // Resets the event; that it was already reset is as good.
        if (::read(wake_descriptor, &calls, sizeof(calls)) < 0) calls = 0;
        wake_armed = false;
        woken = true;
        continue;
      }
      finish(*reinterpret_cast<FileOperation*>(copied[i].tag), copied[i].result);
    }
  } while (count == kCompletionBatch);
}

// Sends what is prepared and waits for the first completion in one system call.
void UringFile::State::wait(Duration timeout) {
  arm_wake();
  const auto seconds = std::chrono::duration_cast<std::chrono::seconds>(timeout);
  __kernel_timespec limit{.tv_sec = seconds.count(), .tv_nsec = (timeout - seconds).count()};
  io_uring_cqe* first = nullptr;
  const int result = io_uring_submit_and_wait_timeout(&ring, &first, 1, &limit, nullptr);
  KVTIER_CHECK(result >= 0 || is_temporary(-result), "io_uring_enter: {}", error_text(-result));
}

std::size_t UringFile::reap(std::span<FileOperation*> done, Duration timeout) {
  if (state_->in_flight == 0 || done.empty()) return 0;
  const auto deadline = std::chrono::steady_clock::now() + timeout;
  Duration left = timeout;
  state_->collect();
  while (true) {
    state_->prepare_again();
    if (!state_->finished.empty() || state_->woken || left <= Duration::zero()) break;
    state_->wait(left);
    state_->collect();
    left = deadline - std::chrono::steady_clock::now();
  }
  state_->flush();
  state_->woken = false;
  const std::size_t count = state_->finished.pop_into(done);
  state_->in_flight -= static_cast<std::uint32_t>(count);
  return count;
}

void UringFile::cancel(FileOperation* operation) {
  // Without a place in the ring the request is dropped: the operation ends by itself.
  io_uring_sqe* const submission = state_->next_submission();
  if (submission == nullptr) return;
  io_uring_prep_cancel(submission, operation, 0);
  io_uring_sqe_set_data64(submission, kCancelTag);
  state_->flush();
}

void UringFile::wake() {
  const std::uint64_t once = 1;
  // Fails only when the counter is full, and then a wake-up is pending anyway.
  [[maybe_unused]] const ssize_t written = ::write(state_->wake_descriptor, &once, sizeof(once));
}

Status UringFile::sync() { return state_->scratch.sync(); }

Status UringFile::close() {
  KVTIER_CHECK(state_->in_flight == 0, "close() with {} operations in flight", state_->in_flight);
  state_->closed = true;
  // The kernel tears a ring down in its own time; what is unregistered first is free at once.
  if (!state_->fixed_buffers.empty()) io_uring_unregister_buffers(&state_->ring);
  if (state_->fixed_file) io_uring_unregister_files(&state_->ring);
  io_uring_queue_exit(&state_->ring);
  ::close(state_->wake_descriptor);
  return state_->scratch.close();
}

}  // namespace kvtier
