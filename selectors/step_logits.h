#pragma once

#include "kernels/kv_view.h"
#include "kernels/score_rows.h"
#include "kernels/worker_pool.h"
#include "selectors/selector.h"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

namespace kvtier {

/// The logits of one step: every query of some KV heads against the rows kept for each of them
/// (landmarks, or keys themselves). Scratch memory of the selectors that score rows.
///
/// One thread at a time, except that rows of logits may be worked on apart. Allocates when a step
/// asks more queries than any step before, and then only: room is kept for `rows_max` rows.
class StepLogits {
 public:
  StepLogits(const SelectorShape& shape, std::uint32_t heads_max, std::uint32_t rows_max)
      : shape_(shape), row_stride_((rows_max + 15u) / 16u * 16u), tasks_(heads_max) {}

  /// Makes room for `queries` rows of logits per KV head, for a caller that fills them in itself.
  void reserve(std::size_t queries);

  /// Scores `rows[i]` for KV head `first_head + i`, spread over the workers.
  Status compute(const SelectRequest& request, std::uint32_t first_head,
                 std::span<const RowsView> rows, WorkerPool& pool);

  /// Logits of KV head `first_head + i`: row `query * queries_per_kv_head + query head`.
  std::span<float> row(std::size_t i, std::uint32_t row, std::size_t rows) {
    return {logits_.data() + (i * queries_ + row) * row_stride_, rows};
  }
  /// All rows of that head, `row_stride()` apart.
  std::span<float> all_rows(std::size_t i) {
    return {logits_.data() + i * queries_ * row_stride_, queries_ * row_stride_};
  }
  std::size_t row_stride() const { return row_stride_; }
  /// From one head's rows to the next head's.
  std::size_t head_stride() const { return queries_ * row_stride_; }

 private:
  SelectorShape shape_;
  std::size_t row_stride_;
  std::vector<ScoreTask> tasks_;
  std::size_t queries_ = 0;      ///< Rows of logits per KV head in this step.
  std::size_t queries_max_ = 0;  ///< What there is room for.
  std::size_t packed_max_ = 0;   ///< Likewise in `packed_`.
  FixedArray<float> packed_;
  FixedArray<float> logits_;
};

/// False if one is infinite or not a number: finite inputs can still overflow.
bool all_finite(std::span<const float> values);

}  // namespace kvtier
