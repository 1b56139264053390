#pragma once

#include "kernels/gpu.h"
#include "kernels/kv_view.h"
#include "kernels/worker_pool.h"
#include "memory/status.h"
#include "memory/stream_ref.h"

#include <cstddef>
#include <cstdint>
#include <span>

namespace kvtier {

/// Scores rows (mean keys of groups, or keys themselves) against the queries of one KV head.
struct ScoreTask {
  RowsView rows;  ///< [rows, head_dim]
  const float* queries =
      nullptr;                    ///< [queries, head_dim]: all query heads of the group, all steps.
  std::size_t query_stride = 0;   ///< Elements from one query to the next.
  std::uint32_t query_count = 0;  ///< 1 to 128.
  float* logits = nullptr;        ///< [queries, rows]
  std::size_t logit_stride = 0;   ///< Elements from one query's logits to the next's.
  /// Which of the rows, in which order; empty: all of them. Logit r is then that of row listed[r].
  std::span<const std::uint32_t> listed;

  std::size_t row_count() const { return listed.empty() ? rows.rows : listed.size(); }
};

/// logits[q][r] = cap(scale * dot(queries[q], rows[r])), float32 accumulation.
/// Splits the rows over the workers; the result does not depend on their number. Allocates nothing.
Status score_rows(const SoftmaxOptions& softmax, std::span<const ScoreTask> tasks,
                  WorkerPool& pool);

/// The same for one task on the calling thread: for searches whose next rows depend on these, many
/// of them side by side.
Status score_rows(const SoftmaxOptions& softmax, const ScoreTask& task);

/// The same for many KV heads at once, on the GPU. Task t is one KV head of one sequence. All
/// pointers are device memory; rows and queries are 16-byte aligned.
struct ScoreRowsParams {
  /// Row r of task t begins at `rows + t * task_stride_bytes + r * row_stride_bytes`.
  const std::byte* rows = nullptr;
  std::size_t task_stride_bytes = 0;  ///< A multiple of 16, as is the next.
  std::size_t row_stride_bytes = 0;
  DType dtype = DType::kBF16;
  std::uint32_t dim = 0;
  std::uint32_t tasks = 0;  ///< Up to 65,535.
  /// [tasks]: how many rows each task has; none: `rows_max`.
  const std::uint32_t* counts = nullptr;
  std::uint32_t rows_max = 0;
  /// [tasks, query_count, dim] of the rows' dtype, contiguous.
  const void* queries = nullptr;
  std::uint32_t query_count = 0;  ///< 1 to 16.
  SoftmaxOptions softmax;
  /// [tasks, query_count, logit_stride]; nothing is written behind a task's last row.
  float* logits = nullptr;
  std::size_t logit_stride = 0;  ///< Elements from one query's logits to the next's.
};

/// Enqueues the scores: one kernel that reads every row once. Exact products, float32 sums.
/// `unsupported`: float32 rows, dims other than 64, 96, 128 and 256, more than 16 queries.
/// Allocates nothing, waits for nothing; may be captured in a graph.
Status score_rows(const Gpu& gpu, const ScoreRowsParams& params, StreamRef stream);

/// Obvious float64 loops, for tests.
void score_rows_reference(const SoftmaxOptions& softmax, const ScoreTask& task);

/// Turns one row of logits into weights in place: exp(x - max) / sum. Returns the log-sum-exp
/// before normalising (`kEmptyLse` and no change for an empty row). float32, float64 sum.
float softmax_row(std::span<float> logits);

/// target[c] = log of the sum over the rows of exp(logits[r * stride + c] - offsets[r]): how
/// several queries' logits of one column become one, in logs. Every row has `target.size()`
/// numbers, and what lies behind them up to a multiple of 16 is read and left alone. At least one
/// row.
void log_sum_exp_columns(const float* logits, std::size_t stride, std::span<const float> offsets,
                         std::span<float> target);

/// Means of `rows_per_group` consecutive rows each (a shorter last group averages what it has).
/// `target` is [ceil(rows / rows_per_group), dim] of `rows.dtype`, contiguous; float32
/// accumulation.
void mean_rows(const RowsView& rows, std::uint32_t rows_per_group, std::byte* target);

/// For every group as above: the smallest cosine between a row and the group's mean (ShadowKV's
/// outlier measure). `means` is what `mean_rows` wrote; a zero vector has cosine 0.
void min_cosine_to_mean(const RowsView& rows, std::uint32_t rows_per_group, const std::byte* means,
                        std::span<float> target);

}  // namespace kvtier
