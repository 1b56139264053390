#include "selectors/cluster_scores.h"

#include "kernels/partial_attention.h"
#include "kernels/score_rows.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace kvtier {

ClusterStep ClusterStep::of(const SelectorShape& shape, const ClusterIndex& index,
                            const SelectRequest& request) {
  const FarRegion region = FarRegion::of(shape, request.first_position);
  KVTIER_CHECK(region.end <= index.tokens(), "tokens to {} are to be ranked, {} were appended",
               region.end, index.tokens());
  ClusterStep step{.request = request, .region = region};
  const std::uint32_t per_segment = index.segment_tokens();
  const std::uint32_t segments =
      std::min(index.closed_segments(), (region.end + per_segment - 1) / per_segment);
  step.clusters = segments * index.clusters_per_segment();
  step.singles_begin = std::clamp(index.open_begin(), region.begin, region.end);
  step.singles = region.end - step.singles_begin;
  return step;
}

ClusterScores::ClusterScores(const SelectorShape& shape, const ClusterIndex& index)
    : shape_(shape),
      rows_max_(std::size_t{kMaxStepQueries} * shape.queries_per_kv_head),
      cluster_logits_(shape, shape.kv_heads, index.clusters_max()),
      token_logits_(shape, shape.kv_heads, index.segment_tokens()),
      views_(shape.kv_heads),
      groups_(shape.head_groups()),
      lse_(shape.kv_heads * rows_max_) {
  const std::size_t entries = index.clusters_max() + index.segment_tokens();
  for (Group& group : groups_) {
    group.scores.resize(entries);
    group.head_scores.resize(entries);
    group.sizes.resize(index.clusters_max());
  }
}

Status ClusterScores::compute(const ClusterIndex& index, const ClusterStep& step, bool weights,
                              WorkerPool& pool) {
  const Call call{index, step, weights};
  for (std::uint32_t head = 0; head < shape_.kv_heads; ++head) {
    views_[head] = index.centroids(head, step.clusters);
  }
  KVTIER_RETURN_IF_ERROR(cluster_logits_.compute(step.request, 0, views_, pool));
  for (std::uint32_t head = 0; head < shape_.kv_heads; ++head) {
    views_[head] = index.open_keys(head, index.open_begin(), index.open_begin());
    if (step.singles > 0) {
      views_[head] = index.open_keys(head, step.singles_begin, step.region.end);
    }
  }
  KVTIER_RETURN_IF_ERROR(token_logits_.compute(step.request, 0, views_, pool));
  pool.run(groups_.size(),
           [this, &call](std::size_t i) { score_group(call, static_cast<std::uint32_t>(i)); });
  for (std::size_t i = 0; i < groups_.size(); ++i) {
    if (groups_[i].finite) continue;
    return invalid_argument(
        fmt::format("cluster: scores of head group {} at position {} overflow float32", i,
                    step.request.first_position));
  }
  return {};
}

void ClusterScores::count_sizes(const Call& call, std::uint32_t head_group) {
  const ClusterIndex& index = call.index;
  const ClusterStep& step = call.step;
  Group& group = groups_[head_group];
  group.empty = 0;
  for (std::uint32_t c = 0; c < step.clusters; ++c) {
    const std::span<const std::uint16_t> members = index.members(head_group, c);
    const std::uint32_t begin = index.segment_begin(c);
    std::size_t size = members.size();
    if (begin + index.segment_tokens() > step.region.end) {
      const std::uint32_t inside = step.region.end - begin;
      size = static_cast<std::size_t>(std::ranges::lower_bound(members, inside) - members.begin());
    }
    group.sizes[c] = static_cast<float>(size);
    if (size == 0) ++group.empty;
  }
}

void ClusterScores::score_group(const Call& call, std::uint32_t head_group) {
  Group& group = groups_[head_group];
  count_sizes(call, head_group);
  group.finite = true;
  const std::span scores(group.scores.data(), call.step.entries());
  const std::span head_scores(group.head_scores.data(), scores.size());
  std::ranges::fill(scores, 0.0f);
  for (std::uint32_t i = 0; i < shape_.heads_per_group; ++i) {
    for (std::uint32_t h = 0; h < shape_.queries_per_kv_head; ++h) {
      score_head(call, group, head_group * shape_.heads_per_group + i, h);
      if (shape_.reduction == GroupReduction::kMax) {
        for (std::size_t e = 0; e < scores.size(); ++e) {
          scores[e] = std::max(scores[e], head_scores[e]);
        }
      } else {
        for (std::size_t e = 0; e < scores.size(); ++e) scores[e] += head_scores[e];
      }
    }
  }
  if (shape_.reduction == GroupReduction::kMean) {
    const auto rows = static_cast<float>(call.step.request.query_count *
                                         shape_.queries_per_kv_head * shape_.heads_per_group);
    for (float& score : scores) score /= rows;
  }
  group.finite = group.finite && all_finite(scores);
}

/// Scores of one query head, added over the step's queries, into `head_scores`. Leaves the weights
/// where the logits were.
void ClusterScores::score_head(const Call& call, Group& group, std::uint32_t head,
                               std::uint32_t query_head) {
  const ClusterStep& step = call.step;
  const bool mean = shape_.reduction == GroupReduction::kMean;
  float* target = group.head_scores.data();
  for (std::uint32_t q = 0; q < step.request.query_count; ++q) {
    const std::uint32_t row = q * shape_.queries_per_kv_head + query_head;
    const std::span<float> clusters = cluster_weights(step, head, row);
    const std::span<float> singles = single_weights(step, head, row);
    group.finite = group.finite && all_finite(clusters) && all_finite(singles);
    float& lse = lse_[head * rows_max_ + row];
    if (!mean) lse = weigh_row(step, group, head, row);
    if (q == 0) {
      std::ranges::copy(clusters, target);
      std::ranges::copy(singles, target + step.clusters);
    } else {
      for (std::size_t i = 0; i < clusters.size(); ++i) target[i] += clusters[i];
      for (std::size_t i = 0; i < singles.size(); ++i) target[step.clusters + i] += singles[i];
    }
    if (mean && call.weights) lse = weigh_row(step, group, head, row);
  }
}

/// Turns a row of logits into weights per token, all far tokens together having 1. Returns the
/// log-sum-exp over them.
float ClusterScores::weigh_row(const ClusterStep& step, const Group& group, std::uint32_t head,
                               std::uint32_t row) {
  const std::span<float> clusters = cluster_weights(step, head, row);
  const std::span<float> singles = single_weights(step, head, row);
  const float* sizes = group.sizes.data();
  if (group.empty > 0) {
    for (std::size_t i = 0; i < clusters.size(); ++i) {
      clusters[i] = sizes[i] > 0.0f ? clusters[i] : std::numeric_limits<float>::lowest();
    }
  }
  const double of_clusters = double{softmax_row(clusters)};
  const double of_singles = double{softmax_row(singles)};
  float members = 0.0f;
  for (std::size_t i = 0; i < clusters.size(); ++i) members += sizes[i] * clusters[i];
  // Without a member every weight is zero, whatever the softmax over nobody says.
  const double clusters_lse =
      members > 0.0f ? of_clusters + std::log(double{members}) : double{kEmptyLse};
  const double top = std::max(clusters_lse, of_singles);
  const double lse = top + std::log(std::exp(clusters_lse - top) + std::exp(of_singles - top));
  const auto cluster_share =
      members > 0.0f ? static_cast<float>(std::exp(of_clusters - lse)) : 0.0f;
  const auto single_share = static_cast<float>(std::exp(of_singles - lse));
  for (float& weight : clusters) weight *= cluster_share;
  for (float& weight : singles) weight *= single_share;
  return static_cast<float>(lse);
}

}  // namespace kvtier
