#include "kernels/cluster_rows.h"
#include "kernels/partial_attention.h"
#include "kernels/top_k.h"
#include "selectors/cluster_index.h"
#include "selectors/cluster_scores.h"
#include "selectors/families.h"
#include "selectors/far_selector.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
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
class Cluster final : public FarSelector {
 public:
  Cluster(const SelectorShape& shape, const ClusterOptions& options)
      : FarSelector(shape, shape.tokens_max),
        options_(options),
        index_(shape, options.index),
        scores_(shape, index_),
        groups_(shape.head_groups()) {
    const std::size_t entries = index_.clusters_max() + index_.segment_tokens();
    for (Group& group : groups_) {
      group.order.resize(entries);
      if (!options.estimate) continue;
      group.rest.resize(entries);
      group.marks.resize(shape.tokens_max);
      group.sums.resize(std::size_t{kMaxStepQueries} * shape.queries_per_kv_head * shape.value_dim);
    }
  }

  void append(const NewTokens& tokens) override { index_.append(tokens); }
  void truncate(std::uint32_t position) override { index_.truncate(position); }
  std::uint32_t truncate_floor(std::uint32_t position) const override {
    return index_.truncate_floor(position);
  }

  bool estimates_rest() const override { return options_.estimate; }
  Status estimate_rest(const SelectRequest& request, std::span<const GroupSelection> selection,
                       StatesView target, WorkerPool& pool) override;

  std::unique_ptr<Selector> fork() const override { return std::make_unique<Cluster>(*this); }
  void save(StateWriter& writer) const override { index_.save(writer); }
  Status restore(StateReader& reader) override { return index_.restore(reader); }
  std::size_t metadata_bytes() const override { return index_.metadata_bytes(); }

 private:
  std::uint32_t tokens_seen() const override { return index_.tokens(); }
  Status answer(const Question& question, std::span<GroupSelection> selection,
                WorkerPool& pool) override;

  /// Scratch of one head group.
  struct Group {
    std::vector<std::uint32_t> order;
    std::vector<float> rest;  ///< Per entry: far tokens that are not chosen.
    std::vector<std::uint8_t> marks;
    std::vector<float> sums;
  };
  /// What the workers share in one call.
  struct Call {
    const ClusterStep& step;
    std::span<GroupSelection> selection;
    std::span<const GroupSelection> chosen;
    StatesView target;
  };

  void rank(const Call& call, std::uint32_t head_group);
  void estimate_group(const Call& call, std::uint32_t head_group);
  void count_rest(const Call& call, std::uint32_t head_group);
  void leave_zone(const ClusterStep& step, std::uint32_t head_group);
  void estimate_head(const Call& call, std::uint32_t head);

  ClusterOptions options_;
  ClusterIndex index_;
  ClusterScores scores_;
  std::vector<Group> groups_;
};

Status Cluster::answer(const Question& question, std::span<GroupSelection> selection,
                       WorkerPool& pool) {
  const ClusterStep step = ClusterStep::of(shape(), index_, question.request);
  KVTIER_RETURN_IF_ERROR(scores_.compute(index_, step, false, pool));
  const Call call{.step = step, .selection = selection};
  pool.run(groups_.size(),
           [this, &call](std::size_t i) { rank(call, static_cast<std::uint32_t>(i)); });
  return {};
}

/// Tokens of the best entries, until budget and band are full.
void Cluster::rank(const Call& call, std::uint32_t head_group) {
  const ClusterStep& step = call.step;
  const ClusterScores::Group& group = scores_.group(head_group);
  GroupSelection& result = call.selection[head_group];
  const std::span<const float> scores(group.scores.data(), step.entries());
  const std::uint32_t budget = far_budget_tokens(shape(), step.request);
  std::uint64_t left = std::uint64_t{budget} + step.request.band_tokens;
  const auto push = [&](std::uint32_t token, float score) {
    result.ranked.push_back(
        {BlockIndex(token / shape().tokens_per_block), token % shape().tokens_per_block, 1, score});
    --left;
  };
  // An entry brings as many tokens as the others do, more or less; if that is less, more of them.
  std::uint64_t entries = left * scores.size() / step.region.tokens() + group.empty + 16;
  for (std::size_t done = 0; left > 0 && done < scores.size(); entries *= 2) {
    const std::size_t enough =
        static_cast<std::size_t>(std::min<std::uint64_t>(scores.size(), entries));
    const auto best = top_k(scores, enough, groups_[head_group].order);
    for (const std::uint32_t e : best.subspan(done)) {
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
    done = enough;
  }
  result.chosen = static_cast<std::uint32_t>(std::min<std::size_t>(result.ranked.size(), budget));
  if (shape().reduction == GroupReduction::kMean) return;
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
  KVTIER_RETURN_IF_ERROR(check_request(shape(), request));
  const std::size_t rows = std::size_t{request.query_count} * shape().query_heads();
  std::fill_n(target.out, rows * shape().value_dim, 0.0f);
  std::fill_n(target.lse, rows, kEmptyLse);
  const ClusterStep step = ClusterStep::of(shape(), index_, request);
  if (step.region.tokens() == 0) return {};
  KVTIER_RETURN_IF_ERROR(scores_.compute(index_, step, true, pool));
  const Call call{.step = step, .selection = {}, .chosen = selection, .target = target};
  pool.run(groups_.size(),
           [this, &call](std::size_t i) { estimate_group(call, static_cast<std::uint32_t>(i)); });
  return {};
}

void Cluster::estimate_group(const Call& call, std::uint32_t head_group) {
  count_rest(call, head_group);
  if (options_.zone < 1.0) leave_zone(call.step, head_group);
  for (std::uint32_t i = 0; i < shape().heads_per_group; ++i) {
    estimate_head(call, head_group * shape().heads_per_group + i);
  }
}

/// How many far tokens of each entry the selection leaves out.
void Cluster::count_rest(const Call& call, std::uint32_t head_group) {
  const ClusterStep& step = call.step;
  Group& group = groups_[head_group];
  const std::vector<float>& sizes = scores_.group(head_group).sizes;
  const GroupSelection& selection = call.chosen[head_group];
  std::fill_n(group.marks.begin(), step.region.end, std::uint8_t{0});
  for (std::uint32_t i = 0; i < selection.chosen; ++i) {
    const SelectedUnit& unit = selection.ranked[i];
    std::fill_n(
        group.marks.begin() + unit.block.value * shape().tokens_per_block + unit.first_token,
        unit.tokens, std::uint8_t{1});
  }
  for (std::uint32_t c = 0; c < step.clusters; ++c) {
    const std::uint8_t* marks = group.marks.data() + index_.segment_begin(c);
    const auto size = static_cast<std::size_t>(sizes[c]);
    std::uint32_t chosen = 0;
    for (const std::uint16_t member : index_.members(head_group, c).first(size)) {
      chosen += marks[member];
    }
    group.rest[c] = sizes[c] - static_cast<float>(chosen);
  }
  for (std::uint32_t i = 0; i < step.singles; ++i) {
    group.rest[step.clusters + i] = group.marks[step.singles_begin + i] != 0 ? 0.0f : 1.0f;
  }
}

/// Only the best of the clusters that are left over stay in the estimate.
void Cluster::leave_zone(const ClusterStep& step, std::uint32_t head_group) {
  Group& group = groups_[head_group];
  ClusterScores::Group& scored = scores_.group(head_group);
  // The scores have done their work when the zone is known.
  for (std::uint32_t c = 0; c < step.clusters; ++c) {
    if (!(group.rest[c] > 0.0f)) scored.scores[c] = std::numeric_limits<float>::lowest();
  }
  const auto zone = static_cast<std::size_t>(
      std::ceil(options_.zone * static_cast<double>(step.clusters - scored.empty)));
  // Marks are free again: one per cluster of the zone.
  std::fill_n(group.marks.begin(), step.clusters, std::uint8_t{0});
  for (const std::uint32_t c :
       top_k(std::span<const float>(scored.scores.data(), step.clusters), zone, group.order)) {
    group.marks[c] = 1;
  }
  for (std::uint32_t c = 0; c < step.clusters; ++c) {
    if (group.marks[c] == 0) group.rest[c] = 0.0f;
  }
}

/// Weighted sums of the values, and back to a mean and its log-sum-exp.
void Cluster::estimate_head(const Call& call, std::uint32_t head) {
  const ClusterStep& step = call.step;
  Group& group = groups_[head / shape().heads_per_group];
  const std::size_t rows = std::size_t{step.request.query_count} * shape().queries_per_kv_head;
  const std::size_t dim = shape().value_dim;
  std::array<float, std::size_t{kMaxStepQueries} * kMaxGroupQueries> totals{};
  for (std::uint32_t row = 0; row < rows; ++row) {
    const std::span<float> clusters = scores_.cluster_weights(step, head, row);
    const std::span<float> singles = scores_.single_weights(step, head, row);
    float total = 0.0f;
    for (std::size_t i = 0; i < clusters.size(); ++i) total += clusters[i] *= group.rest[i];
    for (std::size_t i = 0; i < singles.size(); ++i) {
      total += singles[i] *= group.rest[step.clusters + i];
    }
    totals[row] = total;
  }
  std::ranges::fill(group.sums, 0.0f);
  add_weighted_rows(index_.value_means(head, step.clusters),
                    scores_.cluster_weights(step, head, 0).data(), scores_.cluster_stride(), rows,
                    group.sums.data());
  if (step.singles > 0) {
    add_weighted_rows(index_.open_values(head, step.singles_begin, step.region.end),
                      scores_.single_weights(step, head, 0).data(), scores_.single_stride(), rows,
                      group.sums.data());
  }
  for (std::uint32_t row = 0; row < rows; ++row) {
    if (!(totals[row] > 0.0f)) continue;
    const std::size_t query = row / shape().queries_per_kv_head;
    const std::size_t target = query * shape().query_heads() +
                               std::size_t{head} * shape().queries_per_kv_head +
                               row % shape().queries_per_kv_head;
    for (std::size_t i = 0; i < dim; ++i) {
      call.target.out[target * dim + i] = group.sums[row * dim + i] / totals[row];
    }
    call.target.lse[target] = scores_.lse(head, row) + std::log(totals[row]);
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
