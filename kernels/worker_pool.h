#pragma once

#include <cstddef>
#include <functional>
#include <memory>

namespace kvtier {

/// The threads that kernels run on: a bounded oneTBB arena, injected wherever work is split.
///
/// Thread-safe for one caller at a time. Tasks must not block and must not wait for I/O.
class WorkerPool {
 public:
  /// `threads` counts the calling thread; 0 takes as many as the process may use.
  explicit WorkerPool(unsigned threads);
  ~WorkerPool();
  WorkerPool(const WorkerPool&) = delete;
  WorkerPool& operator=(const WorkerPool&) = delete;

  unsigned threads() const { return threads_; }

  /// Runs `body(i)` for i in [0, count), returns when all are done. With one thread, or one item,
  /// everything runs on the calling thread in order. `body` does not throw.
  void run(std::size_t count, const std::function<void(std::size_t)>& body);

 private:
  struct Arena;
  unsigned threads_;
  std::unique_ptr<Arena> arena_;
};

}  // namespace kvtier
