#include "kernels/worker_pool.h"

#include "kernels/worker_arena.h"
#include "memory/check.h"

#include <algorithm>
#include <atomic>

namespace kvtier {
namespace {

/// One call of `run`. Items are taken in order by whoever is free.
///
/// Memory order: a worker's first `fetch_add` acquires what the caller wrote before its release of
/// `next` (the body and its input). The caller's final load of `left` acquires what every worker
/// released as the last thing it did here: its items' results, and that it is done with this
/// object.
struct Loop {
  const std::function<void(std::size_t)>* body = nullptr;
  std::size_t count = 0;
  std::atomic<std::size_t> next{0};
  std::atomic<unsigned> left{0};
};

void take_items(void* context) {
  Loop& loop = *static_cast<Loop*>(context);
  std::size_t i = loop.next.fetch_add(1, std::memory_order_acq_rel);
  while (i < loop.count) {
    (*loop.body)(i);
    i = loop.next.fetch_add(1, std::memory_order_acq_rel);
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
  loop.next.store(0, std::memory_order_release);
  const auto helpers = static_cast<unsigned>(std::min<std::size_t>(threads_, count));
  arena_->arena.run(helpers, &take_items, &loop);
  const unsigned left = loop.left.load(std::memory_order_acquire);
  KVTIER_CHECK(left == helpers, "{} of {} workers came back", left, helpers);
}

}  // namespace kvtier
