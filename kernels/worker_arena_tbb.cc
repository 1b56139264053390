#include "kernels/worker_arena.h"

#include <tbb/blocked_range.h>
#include <tbb/info.h>
#include <tbb/parallel_for.h>
#include <tbb/task_arena.h>

namespace kvtier {

struct WorkerArena::Tbb {
  explicit Tbb(int threads) : arena(threads) {}
  tbb::task_arena arena;
};

WorkerArena::WorkerArena(unsigned threads)
    : tbb_(std::make_unique<Tbb>(static_cast<int>(threads))) {}
WorkerArena::~WorkerArena() = default;

unsigned WorkerArena::default_threads() {
  return static_cast<unsigned>(tbb::info::default_concurrency());
}

void WorkerArena::run(unsigned times, void (*enter)(void* context), void* context) {
  tbb_->arena.execute([=] {
    // One range element per worker: each then takes items itself, in worker_pool.cc.
    tbb::parallel_for(
        tbb::blocked_range<unsigned>(0, times, 1),
        [=](const tbb::blocked_range<unsigned>& range) {
          for (unsigned i = range.begin(); i != range.end(); ++i) enter(context);
        },
        tbb::simple_partitioner());
  });
}

}  // namespace kvtier
