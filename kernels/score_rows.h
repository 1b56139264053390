#pragma once

#include "kernels/kv_view.h"
#include "kernels/worker_pool.h"
#include "memory/status.h"

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

/// Obvious float64 loops, for tests.
void score_rows_reference(const SoftmaxOptions& softmax, const ScoreTask& task);

/// Turns one row of logits into weights in place: exp(x - max) / sum. Returns the log-sum-exp
/// before normalising (`kEmptyLse` and no change for an empty row). float32, float64 sum.
float softmax_row(std::span<float> logits);

/// Means of `rows_per_group` consecutive rows each (a shorter last group averages what it has).
/// `target` is [ceil(rows / rows_per_group), dim] of `rows.dtype`, contiguous; float32
/// accumulation.
void mean_rows(const RowsView& rows, std::uint32_t rows_per_group, std::byte* target);

/// For every group as above: the smallest cosine between a row and the group's mean (ShadowKV's
/// outlier measure). `means` is what `mean_rows` wrote; a zero vector has cosine 0.
void min_cosine_to_mean(const RowsView& rows, std::uint32_t rows_per_group, const std::byte* means,
                        std::span<float> target);

}  // namespace kvtier
