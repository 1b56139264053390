#include "kernels/partial_attention.h"

#include "kernels/attention_plan.h"
#include "memory/check.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>
#include <vector>

namespace kvtier {
namespace {

struct AlignedDelete {
  void operator()(float* floats) const { ::operator delete (floats, std::align_val_t{64}); }
};
using AlignedFloats = std::unique_ptr<float[], AlignedDelete>;

AlignedFloats allocate_floats(std::size_t count) {
  return AlignedFloats(
      static_cast<float*>(::operator new (count * sizeof(float), std::align_val_t{64})));
}

/// Consecutive chunks of one (task, KV head).
struct FoldRange {
  std::size_t first = 0;
  std::size_t count = 0;
};

/// Pieces of work per worker: enough that an unlucky worker's rest is small, few enough that
/// prefetching across chunks seldom ends at a piece's end.
constexpr std::size_t kPiecesPerWorker = 8;
/// Below this many chunks, folding costs less than waking workers for it.
constexpr std::size_t kChunksWorthFoldingInParallel = 64;

}  // namespace

struct AttentionWorkspace::State {
  std::vector<AttentionChunk> chunks;
  std::vector<FoldRange> folds;
  std::vector<ManyRows> many;
  AlignedFloats floats;
  std::size_t float_capacity = 0;
};

AttentionWorkspace::AttentionWorkspace() : state_(std::make_unique<State>()) {}
AttentionWorkspace::~AttentionWorkspace() = default;
AttentionWorkspace::AttentionWorkspace(AttentionWorkspace&&) noexcept = default;
AttentionWorkspace& AttentionWorkspace::operator=(AttentionWorkspace&&) noexcept = default;

namespace {

Status check_supported(const AttentionParams& params, std::span<const AttentionTask> tasks) {
  const auto check_dim = [](const char* name, std::uint32_t dim) -> Status {
    if (dim % 8 == 0 && dim <= kMaxAttentionDim) return {};
    return unsupported(fmt::format("attention with {} {}: expected a multiple of 8 up to {}", name,
                                   dim, kMaxAttentionDim));
  };
  KVTIER_RETURN_IF_ERROR(check_dim("head_dim", params.layout->head_dim()));
  KVTIER_RETURN_IF_ERROR(check_dim("value_dim", params.layout->value_dim()));
  if (params.queries_per_kv_head < 1 || params.queries_per_kv_head > kMaxGroupQueries) {
    return unsupported(fmt::format("attention with {} query heads per KV head: expected 1 to {}",
                                   params.queries_per_kv_head, kMaxGroupQueries));
  }
  for (const AttentionTask& task : tasks) {
    if (task.query_count < 1) return unsupported("attention without a query");
  }
  return {};
}

void check_views(const AttentionParams& params, const AttentionTask& task) {
  const BlockLayout& layout = *params.layout;
  const std::size_t heads = std::size_t{layout.heads_per_block()} * params.queries_per_kv_head;
  KVTIER_CHECK(task.queries != nullptr && task.out != nullptr && task.lse != nullptr,
               "a task without queries, out or lse");
  // One query needs no stride.
  KVTIER_CHECK(task.query_count == 1 ||
                   (task.query_stride >= heads * layout.head_dim() &&
                    task.out_stride >= heads * layout.value_dim() && task.lse_stride >= heads),
               "strides {}, {}, {} for {} heads of {} and {}", task.query_stride, task.out_stride,
               task.lse_stride, heads, layout.head_dim(), layout.value_dim());
  KVTIER_CHECK(task.query_positions.empty() || task.query_positions.size() == task.query_count,
               "{} positions for {} queries", task.query_positions.size(), task.query_count);
}

void check_range(const BlockLayout& layout, const BlockRange& range) {
  KVTIER_CHECK(range.block != nullptr && range.first_token <= layout.tokens_per_block() &&
                   range.tokens <= layout.tokens_per_block() - range.first_token,
               "tokens {} + {} of a block of {}", range.first_token, range.tokens,
               layout.tokens_per_block());
}

/// Cuts one task's tokens into chunks, the same for each KV head.
void cut_task(const AttentionParams& params, const AttentionTask& task,
              AttentionWorkspace::State& state) {
  const BlockLayout& layout = *params.layout;
  const std::size_t first = state.chunks.size();
  AttentionChunk chunk;
  chunk.task = &task;
  chunk.rows = task.query_count * params.queries_per_kv_head;
  for (const BlockRange& range : task.blocks) {
    check_range(layout, range);
    for (std::uint32_t used = 0; used < range.tokens;) {
      if (chunk.tokens == 0) {
        chunk.first_range = &range;
        chunk.skip = used;
      }
      const std::uint32_t take =
          std::min(range.tokens - used, kAttentionChunkTokens - chunk.tokens);
      chunk.tokens += take;
      used += take;
      if (chunk.tokens == kAttentionChunkTokens) {
        state.chunks.push_back(chunk);
        chunk.tokens = 0;
      }
    }
  }
  // An empty task keeps one empty chunk, so that its result is written like any other.
  if (chunk.tokens > 0 || state.chunks.size() == first) state.chunks.push_back(chunk);
  const std::size_t count = state.chunks.size() - first;
  state.folds.push_back({first, count});
  for (std::uint32_t head = 1; head < layout.heads_per_block(); ++head) {
    state.folds.push_back({state.chunks.size(), count});
    for (std::size_t i = 0; i < count; ++i) {
      AttentionChunk copy = state.chunks[first + i];
      copy.head = head;
      state.chunks.push_back(copy);
    }
  }
}

/// Cuts the rows of a task of many queries into pieces that are the same for any number of workers.
void cut_rows(const AttentionParams& params, const AttentionTask& task,
              AttentionWorkspace::State& state) {
  for (const BlockRange& range : task.blocks) check_range(*params.layout, range);
  const std::uint32_t rows = task.query_count * params.queries_per_kv_head;
  for (std::uint32_t head = 0; head < params.layout->heads_per_block(); ++head) {
    for (std::uint32_t first = 0; first < rows; first += kManyRows) {
      state.many.push_back({.task = &task,
                            .head = head,
                            .first_row = first,
                            .rows = std::min(kManyRows, rows - first)});
    }
  }
}

/// Hands out the workspace's floats in order; without memory it only counts.
class FloatCursor {
 public:
  explicit FloatCursor(float* memory) : memory_(memory) {}
  float* take(std::size_t count) {
    float* place = memory_ == nullptr ? nullptr : memory_ + used_;
    used_ += padded_dim(count);
    return place;
  }
  std::size_t used() const { return used_; }

 private:
  float* memory_;
  std::size_t used_ = 0;
};

/// Gives every chunk its places. Called twice: to count, and to place.
std::size_t place_chunks(const AttentionParams& params, AttentionWorkspace::State& state,
                         float* memory) {
  FloatCursor cursor(memory);
  const std::size_t key_stride = padded_dim(params.layout->head_dim());
  const std::size_t value_stride = padded_dim(params.layout->value_dim());
  for (const FoldRange& fold : state.folds) {
    const std::size_t rows = state.chunks[fold.first].rows;
    const float* queries = cursor.take(rows * key_stride);
    for (std::size_t i = 0; i < fold.count; ++i) {
      AttentionChunk& chunk = state.chunks[fold.first + i];
      chunk.queries = queries;
      chunk.weighted = cursor.take(rows * value_stride);
      chunk.max = cursor.take(rows);
      chunk.sum = cursor.take(rows);
    }
  }
  return cursor.used();
}

/// Copies the rows of one KV head next to each other, padded with zeros.
void copy_queries(const AttentionParams& params, const AttentionChunk& chunk, float* target) {
  const std::size_t dim = params.layout->head_dim();
  const std::size_t group = params.queries_per_kv_head;
  for (std::size_t row = 0; row < chunk.rows; ++row, target += padded_dim(dim)) {
    const float* source = chunk.task->queries + row / group * chunk.task->query_stride +
                          (chunk.head * group + row % group) * dim;
    std::memcpy(target, source, dim * sizeof(float));
    std::fill(target + dim, target + padded_dim(dim), 0.0f);
  }
}

void plan(const AttentionParams& params, std::span<const AttentionTask> tasks, unsigned threads,
          AttentionWorkspace::State& state) {
  state.chunks.clear();
  state.folds.clear();
  state.many.clear();
  for (const AttentionTask& task : tasks) {
    check_views(params, task);
    if (task.query_count > kMaxStepQueries) {
      cut_rows(params, task, state);
    } else {
      cut_task(params, task, state);
    }
  }
  // Rows of many queries are attended before the chunks, in the same memory.
  const std::size_t workers = std::min<std::size_t>(state.many.size(), threads);
  const std::size_t need = std::max(place_chunks(params, state, nullptr),
                                    workers * padded_dim(many_scratch_floats(*params.layout)));
  if (need > state.float_capacity) {
    state.floats = allocate_floats(need);
    state.float_capacity = need;
  }
}

void place_planned(const AttentionParams& params, AttentionWorkspace::State& state) {
  place_chunks(params, state, state.floats.get());
  for (const FoldRange& fold : state.folds) {
    const AttentionChunk& chunk = state.chunks[fold.first];
    copy_queries(params, chunk, const_cast<float*>(chunk.queries));
    if (chunk.tokens == 0) std::fill_n(chunk.max, chunk.rows, kEmptyLse);
  }
}

void attend_many_planned(const AttentionParams& params, const AttentionWorkspace::State& state,
                         WorkerPool& pool) {
  const std::size_t workers = std::min<std::size_t>(state.many.size(), pool.threads());
  struct Context {
    ManyRun run;
    const AttentionWorkspace::State& state;
    std::atomic<std::size_t> next;
  } context{{params.layout, params.queries_per_kv_head, params.softmax}, state, 0};
  pool.run(workers, [&context](std::size_t worker) {
    float* scratch =
        context.state.floats.get() + worker * padded_dim(many_scratch_floats(*context.run.layout));
    for (;;) {
      // Relaxed: only who takes which piece is decided here, and the pool's end orders the rest.
      const std::size_t piece = context.next.fetch_add(1, std::memory_order_relaxed);
      if (piece >= context.state.many.size()) return;
      attend_many(context.run, context.state.many[piece], scratch);
    }
  });
}

void attend_planned(const AttentionParams& params, const AttentionWorkspace::State& state,
                    WorkerPool& pool) {
  const std::size_t count = state.chunks.size();
  const std::size_t pieces =
      pool.threads() == 1 ? 1 : std::min(count, pool.threads() * kPiecesPerWorker);
  const AttentionRun all{params.layout, params.queries_per_kv_head, params.softmax, state.chunks};
  struct Context {
    const AttentionRun& all;
    std::size_t pieces;
  } context{all, pieces};
  pool.run(pieces, [&context](std::size_t piece) {
    const std::size_t total = context.all.chunks.size();
    const std::size_t begin = piece * total / context.pieces;
    const std::size_t end = (piece + 1) * total / context.pieces;
    AttentionRun run = context.all;
    run.chunks = run.chunks.subspan(begin, end - begin);
    attend_chunks(run);
  });
}

void fold_planned(const AttentionParams& params, const AttentionWorkspace::State& state,
                  WorkerPool& pool) {
  struct Context {
    const AttentionParams& params;
    const AttentionWorkspace::State& state;
  } context{params, state};
  const auto fold = [&context](std::size_t i) {
    const FoldRange& range = context.state.folds[i];
    fold_chunks({std::span(context.state.chunks).subspan(range.first, range.count),
                 context.params.queries_per_kv_head, context.params.layout->value_dim()});
  };
  if (state.chunks.size() >= kChunksWorthFoldingInParallel) {
    pool.run(state.folds.size(), fold);
  } else {
    for (std::size_t i = 0; i < state.folds.size(); ++i) fold(i);
  }
}

}  // namespace

Status partial_attention(const AttentionParams& params, std::span<const AttentionTask> tasks,
                         AttentionWorkspace& workspace, WorkerPool& pool) {
  KVTIER_CHECK(params.layout != nullptr, "attention without a layout");
  KVTIER_RETURN_IF_ERROR(check_supported(params, tasks));
  if (tasks.empty()) return {};
  AttentionWorkspace::State& state = workspace.state();
  plan(params, tasks, pool.threads(), state);
  if (!state.many.empty()) attend_many_planned(params, state, pool);
  if (state.chunks.empty()) return {};
  place_planned(params, state);
  attend_planned(params, state, pool);
  fold_planned(params, state, pool);
  return {};
}

}  // namespace kvtier
