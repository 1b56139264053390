#include "kernels/cluster_rows.h"
#include "kernels/partial_attention.h"
#include "kernels/score_rows.h"
#include "kernels/top_k.h"
#include "selectors/cluster_index.h"
#include "selectors/families.h"
#include "selectors/rank_blocks.h"
#include "selectors/step_logits.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

namespace kvtier {
namespace {

struct ClusterOptions {
  ClusterIndexOptions index;
  bool estimate = false;
  /// Part of the clusters that the estimate looks at, best first. RetroInfer looks at the next
  /// 23.2 % and ignores the rest, which saves bytes on its GPU; `estimate_rest` is about everything
  /// that is not chosen, and what is ignored makes the chosen look heavier than they are.
  double zone = 1.0;
};

/// Clusters of similar keys (RetroInfer, 2505.02922 [P][C]).
///
/// A cluster's score is the attention weight that each of its tokens would have if its key were the
/// centroid: exp(logit of the centroid) over the sum of size * exp(logit) of all clusters, per
/// query and query head, added over the queries, then reduced over the heads. (The paper's
/// normaliser leaves the sizes out; it only decides how heads compare.) Under `kMean`: the mean raw
/// logit. Tokens are taken cluster by cluster, the last one as far as the budget goes; a unit is
/// one token, so that scores estimate mass and add up to it.
///
/// Tokens of the open segment are clusters of one: exact logits. The paper does so for at most 1024
/// generated tokens but clusters a prompt in segments of 8192; since any chunking must give the
/// same state, a selector cannot know the prompt's end, and all segments have the paper's update
/// size. Its last iteration, which assigns against the centroids of all segments, is left out: it
/// would change clusters that are closed. At a step whose far region ends inside a closed segment,
/// the clusters of that segment count with their members inside.
///
/// `estimate=on` (the estimation zone): the tokens not chosen get their centroid's weight and their
/// cluster's mean value, those of the open segment their own. By Jensen's inequality it is a lower
/// bound of their mass. It depends on the request and the given selection alone.
class Cluster final : public Selector {
 public:
  Cluster(const SelectorShape& shape, const ClusterOptions& options)
      : shape_(shape),
        options_(options),
        index_(shape, options.index),
        cluster_logits_(shape, shape.kv_heads, index_.clusters_max()),
        token_logits_(shape, shape.kv_heads, index_.segment_tokens()),
        views_(shape.kv_heads),
        groups_(shape.head_groups()) {
    const std::size_t entries = index_.clusters_max() + index_.segment_tokens();
    for (Group& group : groups_) {
      group.scores.resize(entries);
      group.head_scores.resize(entries);
      group.order.resize(entries);
      group.sizes.resize(index_.clusters_max());
      group.lse.resize(std::size_t{shape.heads_per_group} * rows_max());
      if (options.estimate) {
        group.rest.resize(entries);
        group.marks.resize(shape.tokens_max);
        group.sums.resize(rows_max() * shape.value_dim);
      }
    }
  }

  void append(const NewTokens& tokens) override { index_.append(tokens); }
  void truncate(std::uint32_t position) override { index_.truncate(position); }
  std::uint32_t truncate_floor(std::uint32_t position) const override {
    return index_.truncate_floor(position);
  }

  Status select(const SelectRequest& request, std::span<GroupSelection> selection,
                WorkerPool& pool) override;
  bool estimates_rest() const override { return options_.estimate; }
  Status estimate_rest(const SelectRequest& request, std::span<const GroupSelection> selection,
                       StatesView target, WorkerPool& pool) override;

  std::unique_ptr<Selector> fork() const override { return std::make_unique<Cluster>(*this); }
  void save(StateWriter& writer) const override { index_.save(writer); }
  Status restore(StateReader& reader) override { return index_.restore(reader); }
  std::size_t metadata_bytes() const override { return index_.metadata_bytes(); }

 private:
  /// Scratch of one head group. Entries are the step's clusters, then its single tokens.
  struct Group {
    std::vector<float> scores;
    std::vector<float> head_scores;
    std::vector<std::uint32_t> order;
    std::vector<float> sizes;  ///< Tokens of each cluster in the far region.
    std::vector<float> lse;    ///< [KV heads of the group, rows]: of all far tokens.
    std::vector<float> rest;   ///< Per entry: far tokens that are not chosen.
    std::vector<std::uint8_t> marks;
    std::vector<float> sums;
    std::size_t empty = 0;  ///< Clusters without a far token.
    bool finite = true;
  };
  /// What the workers share in one call.
  struct Step {
    const SelectRequest& request;
    FarRegion region;
    std::uint32_t clusters = 0;
    std::uint32_t singles_begin = 0;
    std::uint32_t singles = 0;
    std::uint32_t far_budget = 0;
    std::span<GroupSelection> selection;
    std::span<const GroupSelection> chosen;
    StatesView target;
  };

  std::size_t rows_max() const { return std::size_t{kMaxStepQueries} * shape_.queries_per_kv_head; }
  std::size_t rows_of(const Step& step) const {
    return std::size_t{step.request.query_count} * shape_.queries_per_kv_head;
  }
  bool means_logits() const { return shape_.reduction == GroupReduction::kMean; }
  Step step_of(const SelectRequest& request) const;
  Status score(const Step& step, WorkerPool& pool);
  void count_sizes(const Step& step, std::uint32_t head_group);
  void score_group(const Step& step, std::uint32_t head_group);
  void score_head(const Step& step, Group& group, std::uint32_t head, std::uint32_t query_head);
  float weigh_row(const Step& step, const Group& group, std::uint32_t head, std::size_t row);
  void rank(const Step& step, std::uint32_t head_group);
  void estimate_group(const Step& step, std::uint32_t head_group);
  void count_rest(const Step& step, std::uint32_t head_group);
  void leave_zone(const Step& step, Group& group) const;
  void estimate_head(const Step& step, Group& group, std::uint32_t head);

  SelectorShape shape_;
  ClusterOptions options_;
  ClusterIndex index_;
  StepLogits cluster_logits_;
  StepLogits token_logits_;
  std::vector<RowsView> views_;
  std::vector<Group> groups_;
};

Cluster::Step Cluster::step_of(const SelectRequest& request) const {
  const FarRegion region = FarRegion::of(shape_, request.first_position);
  KVTIER_CHECK(region.end <= index_.tokens(), "tokens to {} are to be ranked, {} were appended",
               region.end, index_.tokens());
  Step step{.request = request, .region = region};
  const std::uint32_t per_segment = index_.segment_tokens();
  const std::uint32_t segments =
      std::min(index_.closed_segments(), (region.end + per_segment - 1) / per_segment);
  step.clusters = segments * index_.clusters_per_segment();
  step.singles_begin = std::clamp(index_.open_begin(), region.begin, region.end);
  step.singles = region.end - step.singles_begin;
  step.far_budget = far_budget_tokens(shape_, request);
  return step;
}

Status Cluster::select(const SelectRequest& request, std::span<GroupSelection> selection,
                       WorkerPool& pool) {
  KVTIER_RETURN_IF_ERROR(check_request(shape_, request));
  reserve_selection(shape_, selection, shape_.tokens_max);
  Step step = step_of(request);
  if (step.region.tokens() == 0) return {};
  step.selection = selection;
  KVTIER_RETURN_IF_ERROR(score(step, pool));
  pool.run(groups_.size(),
           [this, &step](std::size_t i) { rank(step, static_cast<std::uint32_t>(i)); });
  return {};
}

/// Leaves the scores of all entries in the groups.
Status Cluster::score(const Step& step, WorkerPool& pool) {
  for (std::uint32_t head = 0; head < shape_.kv_heads; ++head) {
    views_[head] = index_.centroids(head, step.clusters);
  }
  KVTIER_RETURN_IF_ERROR(cluster_logits_.compute(step.request, 0, views_, pool));
  for (std::uint32_t head = 0; head < shape_.kv_heads; ++head) {
    views_[head] = index_.open_keys(head, index_.open_begin(), index_.open_begin());
    if (step.singles > 0) {
      views_[head] = index_.open_keys(head, step.singles_begin, step.region.end);
    }
  }
  KVTIER_RETURN_IF_ERROR(token_logits_.compute(step.request, 0, views_, pool));
  pool.run(groups_.size(),
           [this, &step](std::size_t i) { score_group(step, static_cast<std::uint32_t>(i)); });
  for (std::size_t i = 0; i < groups_.size(); ++i) {
    if (groups_[i].finite) continue;
    return invalid_argument(
        fmt::format("cluster: scores of head group {} at position {} overflow float32", i,
                    step.request.first_position));
  }
  return {};
}

void Cluster::count_sizes(const Step& step, std::uint32_t head_group) {
  Group& group = groups_[head_group];
  group.empty = 0;
  for (std::uint32_t c = 0; c < step.clusters; ++c) {
    const std::span<const std::uint16_t> members = index_.members(head_group, c);
    const std::uint32_t begin = index_.segment_begin(c);
    std::size_t size = members.size();
    if (begin + index_.segment_tokens() > step.region.end) {
      const std::uint32_t inside = step.region.end - begin;
      size = static_cast<std::size_t>(std::ranges::lower_bound(members, inside) - members.begin());
    }
    group.sizes[c] = static_cast<float>(size);
    if (size == 0) ++group.empty;
  }
}

void Cluster::score_group(const Step& step, std::uint32_t head_group) {
  Group& group = groups_[head_group];
  count_sizes(step, head_group);
  group.finite = true;
  const std::span scores(group.scores.data(), step.clusters + step.singles);
  const std::span head_scores(group.head_scores.data(), scores.size());
  std::ranges::fill(scores, 0.0f);
  for (std::uint32_t i = 0; i < shape_.heads_per_group; ++i) {
    for (std::uint32_t h = 0; h < shape_.queries_per_kv_head; ++h) {
      score_head(step, group, head_group * shape_.heads_per_group + i, h);
      if (shape_.reduction == GroupReduction::kMax) {
        for (std::size_t e = 0; e < scores.size(); ++e) {
          scores[e] = std::max(scores[e], head_scores[e]);
        }
      } else {
        for (std::size_t e = 0; e < scores.size(); ++e) scores[e] += head_scores[e];
      }
    }
  }
  if (means_logits()) {
    const auto rows = static_cast<float>(rows_of(step) * shape_.heads_per_group);
    for (float& score : scores) score /= rows;
  }
  group.finite = group.finite && all_finite(scores);
}

/// Scores of one query head, added over the step's queries, into `head_scores`. Leaves the weights
/// where the logits were.
void Cluster::score_head(const Step& step, Group& group, std::uint32_t head,
                         std::uint32_t query_head) {
  float* target = group.head_scores.data();
  for (std::uint32_t q = 0; q < step.request.query_count; ++q) {
    const std::size_t row = std::size_t{q} * shape_.queries_per_kv_head + query_head;
    const auto row32 = static_cast<std::uint32_t>(row);
    const std::span<float> clusters = cluster_logits_.row(head, row32, step.clusters);
    const std::span<float> singles = token_logits_.row(head, row32, step.singles);
    group.finite = group.finite && all_finite(clusters) && all_finite(singles);
    const std::size_t in_group = head % shape_.heads_per_group * rows_max() + row;
    if (!means_logits()) group.lse[in_group] = weigh_row(step, group, head, row);
    if (q == 0) {
      std::ranges::copy(clusters, target);
      std::ranges::copy(singles, target + step.clusters);
    } else {
      for (std::size_t i = 0; i < clusters.size(); ++i) target[i] += clusters[i];
      for (std::size_t i = 0; i < singles.size(); ++i) target[step.clusters + i] += singles[i];
    }
    if (means_logits() && options_.estimate) {
      group.lse[in_group] = weigh_row(step, group, head, row);
    }
  }
}

/// Turns a row of logits into weights per token, all far tokens together having 1. Returns the
/// log-sum-exp over them.
float Cluster::weigh_row(const Step& step, const Group& group, std::uint32_t head,
                         std::size_t row) {
  const std::span<float> clusters =
      cluster_logits_.row(head, static_cast<std::uint32_t>(row), step.clusters);
  const std::span<float> singles =
      token_logits_.row(head, static_cast<std::uint32_t>(row), step.singles);
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

/// Tokens of the best entries, until budget and band are full.
void Cluster::rank(const Step& step, std::uint32_t head_group) {
  Group& group = groups_[head_group];
  GroupSelection& result = step.selection[head_group];
  const std::span<const float> scores(group.scores.data(), step.clusters + step.singles);
  std::uint64_t left = std::uint64_t{step.far_budget} + step.request.band_tokens;
  // Every entry but the empty ones brings at least a token.
  const std::size_t enough =
      static_cast<std::size_t>(std::min<std::uint64_t>(scores.size(), left + group.empty));
  const auto push = [&](std::uint32_t token, float score) {
    result.ranked.push_back(
        {BlockIndex(token / shape_.tokens_per_block), token % shape_.tokens_per_block, 1, score});
    --left;
  };
  for (const std::uint32_t e : top_k(scores, enough, group.order)) {
    if (left == 0) break;
    if (e >= step.clusters) {
      push(step.singles_begin + (e - step.clusters), scores[e]);
      continue;
    }
    const std::uint32_t begin = index_.segment_begin(e);
    const auto size = static_cast<std::size_t>(group.sizes[e]);
    for (const std::uint16_t member : index_.members(head_group, e).first(size)) {
      if (left == 0) break;
      push(begin + member, scores[e]);
    }
  }
  result.chosen =
      static_cast<std::uint32_t>(std::min<std::size_t>(result.ranked.size(), step.far_budget));
  if (means_logits()) return;
  double mass = 0.0;
  for (std::size_t e = 0; e < scores.size(); ++e) {
    mass += double{e < step.clusters ? group.sizes[e] : 1.0f} * double{scores[e]};
  }
  result.mass = static_cast<float>(mass);
}

Status Cluster::estimate_rest(const SelectRequest& request,
                              std::span<const GroupSelection> selection, StatesView target,
                              WorkerPool& pool) {
  if (!options_.estimate) return Selector::estimate_rest(request, selection, target, pool);
  KVTIER_RETURN_IF_ERROR(check_request(shape_, request));
  const std::size_t rows = std::size_t{request.query_count} * shape_.query_heads();
  std::fill_n(target.out, rows * shape_.value_dim, 0.0f);
  std::fill_n(target.lse, rows, kEmptyLse);
  Step step = step_of(request);
  if (step.region.tokens() == 0) return {};
  step.chosen = selection;
  step.target = target;
  KVTIER_RETURN_IF_ERROR(score(step, pool));
  pool.run(groups_.size(),
           [this, &step](std::size_t i) { estimate_group(step, static_cast<std::uint32_t>(i)); });
  return {};
}

void Cluster::estimate_group(const Step& step, std::uint32_t head_group) {
  Group& group = groups_[head_group];
  count_rest(step, head_group);
  if (options_.zone < 1.0) leave_zone(step, group);
  for (std::uint32_t i = 0; i < shape_.heads_per_group; ++i) {
    estimate_head(step, group, head_group * shape_.heads_per_group + i);
  }
}

/// How many far tokens of each entry the selection leaves out.
void Cluster::count_rest(const Step& step, std::uint32_t head_group) {
  Group& group = groups_[head_group];
  const GroupSelection& selection = step.chosen[head_group];
  std::fill_n(group.marks.begin(), step.region.end, std::uint8_t{0});
  for (std::uint32_t i = 0; i < selection.chosen; ++i) {
    const SelectedUnit& unit = selection.ranked[i];
    std::fill_n(group.marks.begin() + unit.block.value * shape_.tokens_per_block + unit.first_token,
                unit.tokens, std::uint8_t{1});
  }
  for (std::uint32_t c = 0; c < step.clusters; ++c) {
    const std::uint8_t* marks = group.marks.data() + index_.segment_begin(c);
    const auto size = static_cast<std::size_t>(group.sizes[c]);
    std::uint32_t chosen = 0;
    for (const std::uint16_t member : index_.members(head_group, c).first(size)) {
      chosen += marks[member];
    }
    group.rest[c] = group.sizes[c] - static_cast<float>(chosen);
  }
  for (std::uint32_t i = 0; i < step.singles; ++i) {
    group.rest[step.clusters + i] = group.marks[step.singles_begin + i] != 0 ? 0.0f : 1.0f;
  }
}

/// Only the best of the clusters that are left over stay in the estimate.
void Cluster::leave_zone(const Step& step, Group& group) const {
  std::vector<float>& left_over = group.head_scores;
  for (std::uint32_t c = 0; c < step.clusters; ++c) {
    left_over[c] = group.rest[c] > 0.0f ? group.scores[c] : std::numeric_limits<float>::lowest();
  }
  const auto zone = static_cast<std::size_t>(
      std::ceil(options_.zone * static_cast<double>(step.clusters - group.empty)));
  // Marks are free again: one per cluster of the zone.
  std::fill_n(group.marks.begin(), step.clusters, std::uint8_t{0});
  for (const std::uint32_t c :
       top_k(std::span<const float>(left_over.data(), step.clusters), zone, group.order)) {
    group.marks[c] = 1;
  }
  for (std::uint32_t c = 0; c < step.clusters; ++c) {
    if (group.marks[c] == 0) group.rest[c] = 0.0f;
  }
}

/// Weighted sums of the values, and back to a mean and its log-sum-exp.
void Cluster::estimate_head(const Step& step, Group& group, std::uint32_t head) {
  const std::size_t rows = rows_of(step);
  const std::size_t dim = shape_.value_dim;
  std::ranges::fill(group.sums, 0.0f);
  float* totals = group.head_scores.data();
  for (std::size_t row = 0; row < rows; ++row) {
    const auto row32 = static_cast<std::uint32_t>(row);
    const std::span<float> clusters = cluster_logits_.row(head, row32, step.clusters);
    const std::span<float> singles = token_logits_.row(head, row32, step.singles);
    float total = 0.0f;
    for (std::size_t i = 0; i < clusters.size(); ++i) total += clusters[i] *= group.rest[i];
    for (std::size_t i = 0; i < singles.size(); ++i) {
      total += singles[i] *= group.rest[step.clusters + i];
    }
    totals[row] = total;
  }
  add_weighted_rows(index_.value_means(head, step.clusters), cluster_logits_.all_rows(head).data(),
                    cluster_logits_.row_stride(), rows, group.sums.data());
  if (step.singles > 0) {
    add_weighted_rows(index_.open_values(head, step.singles_begin, step.region.end),
                      token_logits_.all_rows(head).data(), token_logits_.row_stride(), rows,
                      group.sums.data());
  }
  for (std::size_t row = 0; row < rows; ++row) {
    if (!(totals[row] > 0.0f)) continue;
    const std::size_t query = row / shape_.queries_per_kv_head;
    const std::size_t target = query * shape_.query_heads() +
                               std::size_t{head} * shape_.queries_per_kv_head +
                               row % shape_.queries_per_kv_head;
    for (std::size_t i = 0; i < dim; ++i) {
      step.target.out[target * dim + i] = group.sums[row * dim + i] / totals[row];
    }
    const float lse = group.lse[head % shape_.heads_per_group * rows_max() + row];
    step.target.lse[target] = lse + std::log(totals[row]);
  }
}

Status make_cluster(const SelectorRecipe& recipe, SelectorFactory& factory) {
  static constexpr std::string_view kSwitch[] = {"off", "on"};
  ClusterOptions options;
  ClusterIndexOptions& index = options.index;
  const SelectorParameters& given = recipe.parameters;
  KVTIER_ASSIGN_OR_RETURN(index.segment_tokens,
                          given.integer("segment", index.segment_tokens, 16, 32768));
  KVTIER_ASSIGN_OR_RETURN(index.cluster_tokens,
                          given.integer("tokens", index.cluster_tokens, 1, index.segment_tokens));
  KVTIER_ASSIGN_OR_RETURN(index.iterations, given.integer("iterations", index.iterations, 1, 1000));
  KVTIER_ASSIGN_OR_RETURN(const std::size_t estimate, given.choice("estimate", "off", kSwitch));
  KVTIER_ASSIGN_OR_RETURN(options.zone, given.fraction("zone", options.zone));
  options.estimate = index.values = estimate == 1;
  factory.needs.values = options.estimate;
  factory.make = [options](const SelectorShape& shape,
                           LayerIndex) -> Result<std::unique_ptr<Selector>> {
    if (shape.heads_per_group * std::max(shape.head_dim, shape.value_dim) > kMaxClusterDim ||
        shape.head_dim % 8 != 0 || shape.value_dim % 8 != 0) {
      return unsupported(fmt::format(
          "cluster: {} heads of {} and {} per group: expected multiples of 8, up to {} together",
          shape.heads_per_group, shape.head_dim, shape.value_dim, kMaxClusterDim));
    }
    return Result<std::unique_ptr<Selector>>(std::make_unique<Cluster>(shape, options));
  };
  return {};
}

}  // namespace

const SelectorFamily& cluster_family() {
  static constexpr std::string_view kParameters[] = {"tokens", "segment", "iterations", "estimate",
                                                     "zone"};
  static const SelectorFamily kFamily = {
      .name = "cluster",
      .summary = "clusters of similar keys, token by token; estimate=on for the rest",
      .source = "RetroInfer, 2505.02922",
      .parameters = kParameters,
      .partial_blocks = true,
      .metadata = "(2 head_dim + 2) / tokens + 2 B, estimate: 2 value_dim / tokens; newest keys",
      .build_cost = "O(iterations * segment / tokens * head_dim)",
      .step_cost = "O(context / tokens * head_dim)",
      .make = make_cluster};
  return kFamily;
}

}  // namespace kvtier
