#include "kernels/worker_pool.h"

#include "kernels/worker_arena.h"
#include "memory/check.h"

#include <algorithm>
#include <atomic>

#ifdef __SANITIZE_THREAD__
#define KVTIER_TSAN
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define KVTIER_TSAN
#endif
#endif
#ifdef KVTIER_TSAN
#include <sanitizer/tsan_interface.h>
#endif

namespace kvtier {
namespace {

// A thread's start at a loop comes after the caller made it: oneTBB orders the two, in a library
// that ThreadSanitizer does not see into. This pair says so to it, and is nothing elsewhere.
void hand_over([[maybe_unused]] void* loop) {
#ifdef KVTIER_TSAN
  __tsan_release(loop);
#endif
}
void take_over([[maybe_unused]] void* loop) {
#ifdef KVTIER_TSAN
  __tsan_acquire(loop);
#endif
}

/// One call of `run`. Items are taken in order by whoever is free.
///
/// Memory order: oneTBB publishes the loop to its threads. The caller's final load of `left`
/// acquires what every worker released as the last thing it did here: its items' results, and that
/// it is done with this object.
struct Loop {
  const std::function<void(std::size_t)>* body = nullptr;
  std::size_t count = 0;
  std::atomic<std::size_t> next{0};
  std::atomic<unsigned> left{0};
};

void take_items(void* context) {
  take_over(context);
  Loop& loop = *static_cast<Loop*>(context);
  std::size_t i = loop.next.fetch_add(1, std::memory_order_relaxed);
  while (i < loop.count) {
    (*loop.body)(i);
    i = loop.next.fetch_add(1, std::memory_order_relaxed);
  }
  loop.left.fetch_add(1, std::memory_order_release);
}

}  // namespace

struct WorkerPool::Arena {
  explicit Arena(unsigned threads) : arena(threads) {}
  WorkerArena arena;
};

WorkerPool::WorkerPool(unsigned threads)
    : threads_(threads == 0 ? std::max(1u, WorkerArena::default_threads()) : threads) {
  if (threads_ > 1) arena_ = std::make_unique<Arena>(threads_);
}

WorkerPool::~WorkerPool() = default;

void WorkerPool::run(std::size_t count, const std::function<void(std::size_t)>& body) {
  if (threads_ == 1 || count <= 1) {
    for (std::size_t i = 0; i < count; ++i) body(i);
    return;
  }
  Loop loop;
  loop.body = &body;
  loop.count = count;
  const auto helpers = static_cast<unsigned>(std::min<std::size_t>(threads_, count));
  hand_over(&loop);
  arena_->arena.run(helpers, &take_items, &loop);
  const unsigned left = loop.left.load(std::memory_order_acquire);
  KVTIER_CHECK(left == helpers, "{} of {} workers came back", left, helpers);
}

}  // namespace kvtier
