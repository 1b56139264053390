#pragma once

#include "kernels/worker_pool.h"
#include "selectors/coded_keys.h"
#include "selectors/recent_rows.h"
#include "selectors/step_logits.h"

#include <cstddef>
#include <cstdint>
#include <vector>

namespace kvtier {

/// The mean key of every `group_tokens` consecutive tokens as a code, 64 groups to a run: landmarks
/// so small that there can be one for every second token. With groups of one token they are the
/// keys themselves.
///
/// Sinks take no part in the mean of their group; a group of sinks only has a row of zeros and no
/// part in its run's ranges. Exact: the means of the open run, at least a window of them, and the
/// open group over the tokens it has.
///
/// Everything is allocated when made, except that a step with more queries than any before makes
/// room for them. One thread at a time.
class CodedMeans {
 public:
  CodedMeans(const SelectorShape& shape, std::uint32_t group_tokens, std::uint32_t bits);

  void append(const NewTokens& tokens);
  void truncate(std::uint32_t position);
  std::uint32_t truncate_floor(std::uint32_t position) const;
  void save(StateWriter& writer) const;
  Status restore(StateReader& reader);
  std::size_t metadata_bytes() const { return recent_.metadata_bytes() + means_.metadata_bytes(); }

  /// Logits, without a cap, of groups [0, ceil(visible / group_tokens)), every query of the step
  /// against the groups of its KV head, into `target`, which was made for as many.
  Status score(const SelectRequest& request, std::uint32_t visible, StepLogits& target,
               WorkerPool& pool);

 private:
  /// Runs that a worker scores at a time.
  static constexpr std::uint32_t kTaskRuns = 16;
  struct Step {
    const SelectRequest& request;
    StepLogits& target;
    std::uint32_t runs = 0;
    std::uint32_t slices = 0;
    std::uint32_t rows = 0;
  };

  void take_mean(std::uint32_t group);
  std::size_t write_mean(std::uint32_t head, std::uint32_t group, std::uint32_t end,
                         std::byte* target) const;
  void gather_open(std::uint32_t groups, std::uint32_t visible);
  void score_runs(const Step& step, std::uint32_t task);

  SelectorShape shape_;  ///< Of the tokens.
  std::uint32_t group_tokens_;
  RecentRows recent_;  ///< Of the tokens.
  CodedKeys means_;    ///< Its tokens are the groups.
  StepLogits open_logits_;
  FixedArray<std::byte> mean_;       ///< [KV heads, head_dim]: of the group that closes.
  FixedArray<std::byte> open_rows_;  ///< [KV heads, run + 1, head_dim]
  std::vector<RowsView> views_;
  std::vector<float> queries_;  ///< [KV heads, rows, head_dim]
};

}  // namespace kvtier
