#pragma once

#include "kernels/kv_view.h"
#include "selectors/cluster_index.h"
#include "selectors/selector.h"
#include "selectors/step_logits.h"

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace kvtier {

/// What a step ranks: entries are the clusters of the segments that begin in its far region, then
/// the far tokens of the open segment, one by one.
struct ClusterStep {
  const SelectRequest& request;
  FarRegion region;
  std::uint32_t clusters = 0;
  std::uint32_t singles_begin = 0;
  std::uint32_t singles = 0;

  static ClusterStep of(const SelectorShape& shape, const ClusterIndex& index,
                        const SelectRequest& request);
  std::size_t entries() const { return std::size_t{clusters} + singles; }
};

/// Scores per token of every entry of a step, as `cluster` means them. Scratch memory; one thread
/// at a time, except that heads may be worked on apart between two calls. Allocates when a step has
/// more queries than any before.
class ClusterScores {
 public:
  struct Group {
    std::vector<float> scores;       ///< Per entry, for each of its tokens.
    std::vector<float> head_scores;  ///< Of one query head.
    std::vector<float> sizes;        ///< Tokens of each cluster in the far region.
    std::size_t empty = 0;           ///< Clusters without one.
    bool finite = true;
  };

  ClusterScores(const SelectorShape& shape, const ClusterIndex& index);

  /// Scores all entries. `weights`: leave attention weights per token even where the reduction does
  /// not need them. `invalid_argument` when a logit is not finite.
  Status compute(const ClusterIndex& index, const ClusterStep& step, bool weights,
                 WorkerPool& pool);

  Group& group(std::uint32_t head_group) { return groups_[head_group]; }
  /// Weights of one row (query * queries_per_kv_head + query head) of a KV head; with the sizes
  /// they add up to 1. May be changed.
  std::span<float> cluster_weights(const ClusterStep& step, std::uint32_t head, std::uint32_t row) {
    return cluster_logits_.row(head, row, step.clusters);
  }
  std::span<float> single_weights(const ClusterStep& step, std::uint32_t head, std::uint32_t row) {
    return token_logits_.row(head, row, step.singles);
  }
  std::size_t cluster_stride() const { return cluster_logits_.row_stride(); }
  std::size_t single_stride() const { return token_logits_.row_stride(); }
  /// Log-sum-exp over the far tokens.
  float lse(std::uint32_t head, std::size_t row) const { return lse_[head * rows_max_ + row]; }

 private:
  /// What the workers share in one call.
  struct Call {
    const ClusterIndex& index;
    const ClusterStep& step;
    bool weights;
  };

  void count_sizes(const Call& call, std::uint32_t head_group);
  void score_group(const Call& call, std::uint32_t head_group);
  void score_head(const Call& call, Group& group, std::uint32_t head, std::uint32_t query_head);
  float weigh_row(const ClusterStep& step, const Group& group, std::uint32_t head,
                  std::uint32_t row);

  SelectorShape shape_;
  std::size_t rows_max_;
  StepLogits cluster_logits_;
  StepLogits token_logits_;
  std::vector<RowsView> views_;
  std::vector<Group> groups_;
  std::vector<float> lse_;  ///< [KV heads, rows_max_]
};

}  // namespace kvtier
