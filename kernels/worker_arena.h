#pragma once

#include <memory>

// Private to worker_pool: the only place that knows oneTBB.

namespace kvtier {

/// A bounded oneTBB arena. Behind plain function pointers, so that the code which synchronises
/// (worker_pool.cc) is compiled with sanitizers while oneTBB's own, which they cannot see into and
/// would misjudge, is not.
class WorkerArena {
 public:
  explicit WorkerArena(unsigned threads);
  ~WorkerArena();
  WorkerArena(const WorkerArena&) = delete;
  WorkerArena& operator=(const WorkerArena&) = delete;

  /// Threads that the process may use.
  static unsigned default_threads();

  /// Calls `enter(context)` exactly `times` times, on the calling thread and on workers that are
  /// free, and returns when all calls have returned.
  void run(unsigned times, void (*enter)(void* context), void* context);

 private:
  struct Tbb;
  std::unique_ptr<Tbb> tbb_;
};

}  // namespace kvtier
