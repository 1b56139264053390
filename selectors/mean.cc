#include "selectors/families.h"
#include "selectors/far_selector.h"
#include "selectors/group_scores.h"
#include "selectors/landmark_rows.h"
#include "selectors/step_logits.h"

#include <fmt/format.h>

#include <algorithm>
#include <memory>
#include <numeric>

namespace kvtier {
namespace {

struct MeanOptions {
  /// Tokens per landmark, whatever the block size: ShadowKV's chunk of 8.
  std::uint32_t group_tokens = 8;
  /// Part of the far budget that outlier groups may take: ShadowKV holds 24 chunks of 8 tokens per
  /// 1024 tokens of budget. There they come on top of it; here every attended token counts.
  double outliers = 24.0 * 8.0 / 1024.0;
};

/// Mean-key landmarks with outliers (ShadowKV, 2410.21465).
///
/// A group's score is the softmax over the landmarks of the far region, per query and query head,
/// added over the queries, then reduced over the heads. A block's score spreads it evenly over the
/// group's tokens and adds up those of the block, so blocks may be smaller or larger than groups.
/// Under `kMean` it is the mean raw logit of the block's tokens, each taken as its landmark's.
///
/// Outliers: the groups, complete and wholly in the far region, whose landmark stands worst for
/// their keys (lowest cosine; ties: earlier). They leave the softmax, and their blocks come first,
/// held, as long as these blocks fit into their part of the far budget.
///
/// The open last group is a landmark over the tokens it has when some of them are ranked (a window
/// smaller than a group); left out, they would be found by nothing. It is never an outlier: its
/// cosine still changes, and what is held should not flicker.
class MeanLandmarks final : public FarSelector {
 public:
  MeanLandmarks(const SelectorShape& shape, MeanOptions options)
      : FarSelector(shape),
        options_(options),
        rows_(shape, options.group_tokens),
        logits_(shape, shape.kv_heads, rows_.groups_max()),
        views_(shape.kv_heads),
        candidates_end_(first_candidate()),
        groups_(shape.head_groups()) {
    const std::size_t blocks_max = shape.tokens_max / shape.tokens_per_block + 1;
    for (Group& group : groups_) {
      group.by_cosine.reserve(rows_.groups_max());
      group.landmark_scores.resize(rows_.groups_max());
      group.head_scores.resize(rows_.groups_max());
      group.block_scores.resize(blocks_max);
      group.held_blocks.resize(blocks_max);
      group.order.resize(blocks_max);
    }
  }

  void append(const NewTokens& tokens) override { rows_.append(tokens); }

  void truncate(std::uint32_t position) override {
    rows_.truncate(position);
    // Groups that close again may get another cosine.
    forget_candidates(std::max(first_candidate(), rows_.closed()));
  }

  std::uint32_t truncate_floor(std::uint32_t position) const override {
    return rows_.truncate_floor(position);
  }

  std::unique_ptr<Selector> fork() const override {
    auto copy = std::make_unique<MeanLandmarks>(*this);
    // A copied vector has room for what it holds only.
    for (Group& group : copy->groups_) group.by_cosine.reserve(rows_.groups_max());
    return copy;
  }
  void save(StateWriter& writer) const override { rows_.save(writer); }
  Status restore(StateReader& reader) override { return rows_.restore(reader); }

  /// The order by cosine is left out: it is derived, and a device would keep only its marks.
  std::size_t metadata_bytes() const override { return rows_.metadata_bytes(); }

 private:
  /// Consecutive landmark groups.
  struct Range {
    std::uint32_t begin = 0;
    std::uint32_t end = 0;
    std::uint32_t size() const { return end - begin; }
  };
  /// State and scratch of one head group.
  struct Group {
    std::vector<std::uint32_t> by_cosine;  ///< The candidates for outliers, worst landmark first.
    std::vector<float> landmark_scores;
    std::vector<float> head_scores;
    std::vector<float> block_scores;
    std::vector<std::uint8_t> held_blocks;
    std::vector<std::uint32_t> order;
    std::uint32_t outliers = 0;  ///< Of this step: the first of `by_cosine`.
    bool finite = true;
  };
  /// What the workers share in one call of `select`.
  struct Step {
    const SelectRequest& request;
    std::span<GroupSelection> selection;
    FarRegion region;
    Range landmarks;
    std::uint32_t blocks = 0;
    std::uint32_t far_budget = 0;
  };

  std::uint32_t tokens_seen() const override { return rows_.tokens(); }
  Status answer(const Question& question, std::span<GroupSelection> selection,
                WorkerPool& pool) override;

  /// The first group with a token behind the sinks.
  std::uint32_t first_candidate() const { return shape().sinks / rows_.group_tokens(); }
  void update_candidates(FarRegion region);
  void forget_candidates(std::uint32_t from);
  void admit_candidates(Group& group, std::uint32_t head_group, std::uint32_t end);
  void select_group(const Step& step, std::uint32_t head_group);
  void mark_outliers(const Step& step, Group& group);
  void score_landmarks(const Step& step, Group& group, std::uint32_t head_group);
  void spread_over_blocks(const Step& step, Group& group);

  MeanOptions options_;
  LandmarkRows rows_;
  StepLogits logits_;
  std::vector<RowsView> views_;
  /// Every `by_cosine` holds the groups from the first candidate to here.
  std::uint32_t candidates_end_;
  std::vector<Group> groups_;
};

Status MeanLandmarks::answer(const Question& question, std::span<GroupSelection> selection,
                             WorkerPool& pool) {
  const auto& [request, region, learns] = question;
  const std::uint32_t per_group = rows_.group_tokens();
  Step step{.request = request,
            .selection = selection,
            .region = region,
            .landmarks = {region.begin / per_group, (region.end - 1) / per_group + 1},
            .blocks = block_count(region, shape().tokens_per_block),
            .far_budget = far_budget_tokens(shape(), request)};
  if (step.landmarks.end > rows_.closed()) rows_.average_open_group();
  update_candidates(region);
  for (std::uint32_t head = 0; head < shape().kv_heads; ++head) {
    views_[head] = rows_.rows(head, step.landmarks.begin, step.landmarks.size());
  }
  KVTIER_RETURN_IF_ERROR(logits_.compute(request, 0, views_, pool));
  // Two pointers: small enough that std::function keeps them without allocating.
  pool.run(groups_.size(),
           [this, &step](std::size_t i) { select_group(step, static_cast<std::uint32_t>(i)); });
  for (std::size_t i = 0; i < groups_.size(); ++i) {
    if (groups_[i].finite) continue;
    return invalid_argument(
        fmt::format("mean: scores of head group {} at position {} overflow float32", i,
                    request.first_position));
  }
  return {};
}

void MeanLandmarks::update_candidates(FarRegion region) {
  const std::uint32_t end = std::clamp(region.end / rows_.group_tokens(), first_candidate(),
                                       std::max(first_candidate(), rows_.closed()));
  forget_candidates(end);
  for (std::uint32_t i = 0; i < groups_.size(); ++i) admit_candidates(groups_[i], i, end);
  candidates_end_ = end;
}

void MeanLandmarks::forget_candidates(std::uint32_t from) {
  if (from >= candidates_end_) return;
  for (Group& group : groups_) {
    std::erase_if(group.by_cosine, [from](std::uint32_t i) { return i >= from; });
  }
  candidates_end_ = from;
}

/// A step adds a group now and then, each put in its place; a prompt adds many, sorted at once.
void MeanLandmarks::admit_candidates(Group& group, std::uint32_t head_group, std::uint32_t end) {
  const std::span<const float> cosines = rows_.cosines(head_group);
  const auto worse = [cosines](std::uint32_t a, std::uint32_t b) {
    return cosines[a] != cosines[b] ? cosines[a] < cosines[b] : a < b;
  };
  constexpr std::uint32_t kFew = 16;
  const bool many = end - candidates_end_ > kFew;
  for (std::uint32_t i = candidates_end_; i < end; ++i) {
    const auto place =
        many ? group.by_cosine.end() : std::ranges::lower_bound(group.by_cosine, i, worse);
    group.by_cosine.insert(place, i);
  }
  if (many) std::ranges::sort(group.by_cosine, worse);
}

void MeanLandmarks::select_group(const Step& step, std::uint32_t head_group) {
  Group& group = groups_[head_group];
  mark_outliers(step, group);
  score_landmarks(step, group, head_group);
  spread_over_blocks(step, group);
  const std::span scores(group.block_scores.data(), step.blocks);
  group.finite = group.finite && all_finite(scores);
  if (!group.finite) return;
  rank_blocks({.scores = scores,
               .always = std::span(group.held_blocks.data(), step.blocks),
               .region = step.region,
               .tokens_per_block = shape().tokens_per_block,
               .far_budget_tokens = step.far_budget,
               .band_tokens = step.request.band_tokens},
              group.order, step.selection[head_group]);
  if (shape().reduction != GroupReduction::kMean) {
    step.selection[head_group].mass = std::accumulate(scores.begin(), scores.end(), 0.0f);
  }
}

void MeanLandmarks::mark_outliers(const Step& step, Group& group) {
  const std::span held(group.held_blocks.data(), step.blocks);
  std::ranges::fill(held, std::uint8_t{0});
  group.outliers = 0;
  const auto allowance = static_cast<std::uint32_t>(options_.outliers * step.far_budget);
  const std::uint32_t per_block = shape().tokens_per_block;
  const std::uint32_t first_block = step.region.begin / per_block;
  std::uint32_t taken = 0;
  for (std::uint32_t candidate : group.by_cosine) {
    // Whole blocks are held, so a group costs what its blocks hold, unless they are held already.
    const std::uint32_t begin = std::max(candidate * rows_.group_tokens(), step.region.begin);
    const std::uint32_t end = (candidate + 1) * rows_.group_tokens();
    std::uint32_t cost = 0;
    for (std::uint32_t b = begin / per_block; b <= (end - 1) / per_block; ++b) {
      if (held[b - first_block] != 0) continue;
      cost += std::min((b + 1) * per_block, step.region.end) -
              std::max(b * per_block, step.region.begin);
    }
    if (taken + cost > allowance) break;
    taken += cost;
    ++group.outliers;
    for (std::uint32_t b = begin / per_block; b <= (end - 1) / per_block; ++b) {
      held[b - first_block] = 1;
    }
  }
}

void MeanLandmarks::score_landmarks(const Step& step, Group& group, std::uint32_t head_group) {
  const GroupLogits logits = {
      .logits = logits_.all_rows(std::size_t{head_group} * shape().heads_per_group).data(),
      .head_stride = logits_.head_stride(),
      .row_stride = logits_.row_stride(),
      .query_count = step.request.query_count,
      .left_out = std::span(group.by_cosine).first(group.outliers),
      .first = step.landmarks.begin};
  group.finite = reduce_logits(shape(), logits, group.head_scores,
                               std::span(group.landmark_scores.data(), step.landmarks.size()));
}

void MeanLandmarks::spread_over_blocks(const Step& step, Group& group) {
  const std::uint32_t per_group = rows_.group_tokens();
  const std::uint32_t per_block = shape().tokens_per_block;
  const bool mean = shape().reduction == GroupReduction::kMean;
  // Both walk along the context: a division per block would cost more than the rest.
  std::uint32_t t = step.region.begin;
  std::uint32_t block_end = (t / per_block + 1) * per_block;
  std::uint32_t landmark = step.landmarks.begin;
  std::uint32_t landmark_end = (landmark + 1) * per_group;
  for (std::uint32_t b = 0; b < step.blocks; ++b, block_end += per_block) {
    const std::uint32_t begin = t;
    const std::uint32_t end = std::min(block_end, step.region.end);
    float score = 0.0f;
    while (t < end) {
      const std::uint32_t next = std::min(end, landmark_end);
      const float of_all = group.landmark_scores[landmark - step.landmarks.begin];
      const std::uint32_t stands_for = mean ? end - begin : rows_.tokens_in(landmark);
      score += next - t == stands_for
                   ? of_all
                   : of_all * (static_cast<float>(next - t) / static_cast<float>(stands_for));
      t = next;
      if (t < landmark_end) continue;
      ++landmark;
      landmark_end += per_group;
    }
    group.block_scores[b] = score;
  }
}

}  // namespace

const SelectorFamily& mean_family() {
  static constexpr std::string_view kParameters[] = {"tokens", "outliers"};
  static const SelectorFamily kFamily = {
      .name = "mean",
      .alias = "landmark",
      .summary = "mean key per group of tokens, worst groups held",
      .source = "ShadowKV, 2410.21465",
      .parameters = kParameters,
      .metadata = "(2 head_dim + 4) / tokens B, and the window's keys",
      .build_cost = "O(head_dim)",
      .step_cost = "O(context / tokens * head_dim)",
      .make = [](const SelectorRecipe& recipe, SelectorFactory& factory) -> Status {
        MeanOptions options;
        KVTIER_ASSIGN_OR_RETURN(options.group_tokens,
                                recipe.parameters.integer("tokens", options.group_tokens, 1, 1024));
        KVTIER_ASSIGN_OR_RETURN(options.outliers,
                                recipe.parameters.fraction("outliers", options.outliers));
        factory.make = [options](const SelectorShape& shape, LayerIndex) {
          return Result<std::unique_ptr<Selector>>(std::make_unique<MeanLandmarks>(shape, options));
        };
        return {};
      }};
  return kFamily;
}

}  // namespace kvtier
