#pragma once

#include "memory/clock.h"
#include "memory/status.h"

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace kvtier {

/// One read or write. Owned by the caller, who keeps it and its buffer alive and untouched from an
/// accepted `submit` until `reap` hands it back. Completion belongs to the operation alone.
struct FileOperation {
  enum class Kind : unsigned char { kRead, kWrite };

  Kind kind = Kind::kRead;
  /// Multiple of `FileTraits::alignment`, as are the buffer's address and size.
  std::uint64_t offset = 0;
  std::span<std::byte> buffer;
  /// The caller's; the file never looks at it.
  void* owner = nullptr;

  /// Valid once reaped. `ok` may come with fewer bytes than asked, as with pread: the caller
  /// submits again. After a failure the buffer's content is unspecified.
  Status status;
  std::size_t transferred = 0;

  /// For the file's own use while it holds the operation.
  FileOperation* next = nullptr;
  std::uint32_t token = 0;
};

/// What a file turned out to be, for people and statistics.
struct FileTraits {
  std::string backend;  ///< "io_uring", "posix", "memory", and wrappers as "faulty(io_uring)".
  std::string reason;   ///< Why this one, when it is not the first choice; otherwise empty.
  std::size_t alignment = 4096;
  std::uint32_t queue_depth = 0;  ///< Operations that can be in flight.
  bool direct = false;            ///< Bypasses the page cache.
  bool fixed_buffers = false;     ///< What `register_buffers` announced is registered.
  /// How another process of this user can open the same bytes, although the file has no name;
  /// empty where there is no file system below.
  std::string reopen_path;
};

/// A fixed-size range of durable (or pretended) storage with aligned asynchronous reads and writes.
///
/// A read that crosses the end is short, one behind it transfers nothing; a write that crosses the
/// end stores nothing and fails with `io_error`. A misaligned operation is a bug and aborts.
///
/// One thread at a time drives a file (`submit`, `reap`, `cancel`); `traits` and `size_bytes` may
/// be called by any. Nothing allocates after construction, except to describe a failure.
class File {
 public:
  virtual ~File() = default;

  virtual const FileTraits& traits() const = 0;
  virtual std::uint64_t size_bytes() const = 0;

  /// Announces memory that later operations will use (io_uring pins it once instead of per call).
  /// Optional: a file that cannot, or is refused by a limit, says so in its traits and works on.
  /// Call before the first `submit`. Each range is at most 1 GiB; larger ones are split by the
  /// file.
  virtual Status register_buffers(std::span<const std::span<std::byte>> ranges) = 0;

  /// Accepts a leading part of `operations` (all, unless the queue is full) and starts them with as
  /// few system calls as possible. Returns how many were accepted; the rest is untouched.
  /// Operations in flight may finish, and be reaped, in any order.
  virtual std::size_t submit(std::span<FileOperation* const> operations) = 0;

  /// Moves finished operations to `done`, at most `done.size()`. Waits up to `timeout` for the
  /// first one when none is ready and some are in flight; with nothing in flight returns 0 at once.
  /// May return 0 earlier than `timeout` (see `wake`).
  virtual std::size_t reap(std::span<FileOperation*> done, Duration timeout) = 0;

  /// Makes a `reap` that waits, or else the next one, return without waiting any longer. The one
  /// call that any thread may make at any time before `close`. A file that never waits ignores it.
  virtual void wake() {}

  /// Asks for an early end. Best effort: the operation is still reaped, with `cancelled` or with
  /// its ordinary result.
  virtual void cancel(FileOperation* operation) = 0;

  /// Makes everything reaped so far durable. Blocks.
  virtual Status sync() = 0;

  /// Ends the file's life; nothing may be in flight. The destructor checks that this was called.
  virtual Status close() = 0;
};

}  // namespace kvtier
