#include "kernels/score_rows.h"
#include "kernels/top_k.h"
#include "selectors/coded_keys.h"
#include "selectors/families.h"
#include "selectors/group_rows.h"
#include "selectors/rank_blocks.h"
#include "selectors/step_logits.h"
#include "selectors/token_scores.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <optional>
#include <vector>

namespace kvtier {
namespace {

/// What a group of tokens is first judged by.
enum class Coarse : unsigned char { kMean, kMinMax, kMeanMinMax };

struct TwoStageOptions {
  /// The average of mean and bound beats each alone: means miss a token among unlike ones, bounds
  /// are loose where channels turn quickly.
  Coarse coarse = Coarse::kMeanMinMax;
  double keep = 4.0;  ///< Tokens that the first stage leaves, as a multiple of the budget.
  std::uint32_t group_tokens = 16;
  std::uint32_t bits = 4;
  std::uint32_t value_tokens = 64;
  bool tail = true;
};

/// Landmarks first, coded keys for what they leave: a scan that reads an eighth of the codes.
///
/// First stage: every group of `group_tokens` is weighed by its mean key, by the upper bound of the
/// box around its keys (Quest), or by the average of both; a softmax over the groups, each counted
/// as often as it has tokens, and the sinks' exact logits. The best groups, reduced over queries
/// and heads as the shape says, survive until they hold `keep` times the budget.
/// Second stage: the tiles of 16 tokens that hold a survivor are scored by their codes, as `scan`
/// does; every other token gets the logit of its group's mean key, whatever ranked the group,
/// because a bound is no estimate. Blocks are ranked by the mass that comes of both, so one that
/// nobody looked at closely still competes with its landmark, and the rest is estimated from the
/// same weights: from codes where there are, from the landmarks elsewhere.
/// With `keep` as large as the context it is `scan`.
class TwoStage final : public Selector {
 public:
  TwoStage(const SelectorShape& shape, const TwoStageOptions& options)
      : shape_(shape),
        options_(options),
        keys_(shape, options.bits),
        landmarks_(shape, {.group_tokens = options.group_tokens,
                           .boxes = options.coarse != Coarse::kMean}),
        mean_logits_(uncapped(shape, 1), shape.kv_heads, landmarks_.groups_max()),
        scores_(shape, keys_.runs_max(), options.tail ? options.value_tokens : 0),
        views_(shape.kv_heads),
        tiles_(shape.head_groups(), std::vector<std::uint8_t>(keys_.runs_max() + 1)),
        choices_(shape.head_groups()) {
    if (options.coarse != Coarse::kMean) {
      bounds_.emplace(uncapped(shape, 2), shape.kv_heads, landmarks_.groups_max());
    }
    if (options.tail) {
      values_.emplace(shape, GroupRows::Options{options.value_tokens, /*of_values=*/true});
    }
    for (Choice& choice : choices_) {
      choice.scores.resize(landmarks_.groups_max());
      choice.head_scores.resize(landmarks_.groups_max());
      choice.row.resize(landmarks_.groups_max());
      choice.order.resize(landmarks_.groups_max());
    }
  }

  void append(const NewTokens& tokens) override {
    keys_.append(tokens);
    landmarks_.append(tokens);
    if (values_) {
      KVTIER_CHECK(tokens.values != nullptr || tokens.tokens == 0,
                   "tokens from position {} come without values", tokens.first_position);
      values_->append(tokens);
    }
  }
  void truncate(std::uint32_t position) override {
    keys_.truncate(position);
    landmarks_.truncate(position);
    if (values_) values_->truncate(position);
  }
  std::uint32_t truncate_floor(std::uint32_t position) const override {
    for (std::uint32_t floor = position;; position = floor) {
      floor = landmarks_.truncate_floor(keys_.truncate_floor(position));
      if (values_) floor = values_->truncate_floor(floor);
      if (floor == position) return floor;
    }
  }

  Status select(const SelectRequest& request, std::span<GroupSelection> selection,
                WorkerPool& pool) override;

  bool estimates_rest() const override { return values_.has_value(); }
  Status estimate_rest(const SelectRequest& request, std::span<const GroupSelection> selection,
                       StatesView target, WorkerPool& pool) override {
    if (!values_) return Selector::estimate_rest(request, selection, target, pool);
    scores_.estimate_rest(request, selection, *values_, target, pool);
    return {};
  }

  std::unique_ptr<Selector> fork() const override { return std::make_unique<TwoStage>(*this); }
  void save(StateWriter& writer) const override {
    keys_.save(writer);
    landmarks_.save(writer);
    if (values_) values_->save(writer);
  }
  Status restore(StateReader& reader) override {
    KVTIER_RETURN_IF_ERROR(keys_.restore(reader));
    KVTIER_RETURN_IF_ERROR(landmarks_.restore(reader));
    if (values_) KVTIER_RETURN_IF_ERROR(values_->restore(reader));
    return {};
  }
  std::size_t metadata_bytes() const override {
    return keys_.metadata_bytes() + landmarks_.metadata_bytes() +
           (values_ ? values_->metadata_bytes() : 0);
  }

 private:
  /// Scratch of one head group.
  struct Choice {
    std::vector<float> scores;
    std::vector<float> head_scores;
    std::vector<float> row;
    std::vector<std::uint32_t> order;
    bool finite = true;
  };
  struct Step {
    const SelectRequest& request;
    FarRegion region;
    std::uint32_t visible = 0;
    std::uint32_t groups = 0;
  };

  /// For dots without the cap, since bounds and means are averaged before it.
  static SelectorShape uncapped(SelectorShape shape, std::uint32_t rows_per_head) {
    shape.softmax.logit_cap = 0.0f;
    shape.head_dim *= rows_per_head;
    return shape;
  }
  float capped(float logit) const {
    const float cap = shape_.softmax.logit_cap;
    return cap > 0.0f ? cap * std::tanh(logit / cap) : logit;
  }
  /// Tokens of a group in [begin, end).
  std::uint32_t tokens_in(std::uint32_t group, std::uint32_t begin, std::uint32_t end) const {
    const std::uint32_t first = std::max(group * options_.group_tokens, begin);
    const std::uint32_t last = std::min((group + 1) * options_.group_tokens, end);
    return last - std::min(first, last);
  }

  Status score_landmarks(const Step& step, WorkerPool& pool);
  Status score_boxes(const Step& step, WorkerPool& pool);
  void choose(const Step& step, std::uint32_t head_group);
  void add_row(const Step& step, Choice& choice, std::uint32_t head, std::uint32_t row,
               std::span<float> target);
  double sinks_share(std::uint32_t head, std::uint32_t row, std::uint32_t visible, float lse);
  void mark_tiles(std::uint32_t head_group, std::uint32_t begin, std::uint32_t end);

  SelectorShape shape_;
  TwoStageOptions options_;
  CodedKeys keys_;
  GroupRows landmarks_;
  std::optional<GroupRows> values_;
  StepLogits mean_logits_;
  std::optional<StepLogits> bounds_;
  TokenScores scores_;
  std::vector<RowsView> views_;
  std::vector<std::vector<std::uint8_t>> tiles_;  ///< [head groups][runs]
  std::vector<Choice> choices_;
  std::vector<float> split_;  ///< Queries split by sign, for the boxes.
};

Status TwoStage::select(const SelectRequest& request, std::span<GroupSelection> selection,
                        WorkerPool& pool) {
  KVTIER_RETURN_IF_ERROR(check_request(shape_, request));
  reserve_selection(shape_, selection);
  Step step{.request = request, .region = FarRegion::of(shape_, request.first_position)};
  KVTIER_CHECK(step.region.end <= keys_.tokens(), "tokens to {} are to be ranked, {} were appended",
               step.region.end, keys_.tokens());
  if (step.region.tokens() == 0) return {};
  step.visible = std::min(request.first_position + request.query_count, keys_.tokens());
  step.groups = (step.visible - 1) / options_.group_tokens + 1;
  KVTIER_RETURN_IF_ERROR(score_landmarks(step, pool));
  KVTIER_RETURN_IF_ERROR(scores_.score_exact(request, keys_, pool));
  // Two pointers: small enough that std::function keeps them without allocating.
  pool.run(choices_.size(),
           [this, &step](std::size_t i) { choose(step, static_cast<std::uint32_t>(i)); });
  for (std::size_t i = 0; i < choices_.size(); ++i) {
    if (choices_[i].finite) continue;
    return invalid_argument(
        fmt::format("two-stage: landmarks of head group {} at position {} overflow float32", i,
                    request.first_position));
  }
  const CoarseTokens coarse{.tiles = tiles_,
                            .logits = &mean_logits_,
                            .group_tokens = options_.group_tokens,
                            .groups = step.groups};
  KVTIER_RETURN_IF_ERROR(scores_.compute(request, keys_, &coarse, pool));
  return scores_.rank(request, selection, pool);
}

Status TwoStage::score_landmarks(const Step& step, WorkerPool& pool) {
  landmarks_.record_open_group(step.visible);
  for (std::uint32_t head = 0; head < shape_.kv_heads; ++head) {
    views_[head] = landmarks_.means(head, 0, step.groups);
  }
  KVTIER_RETURN_IF_ERROR(mean_logits_.compute(step.request, 0, views_, pool));
  return bounds_ ? score_boxes(step, pool) : Status();
}

/// sum_i max(q_i high_i, q_i low_i) is one dot: of the query's positive elements with the upper
/// corner and of its negative ones with the lower.
Status TwoStage::score_boxes(const Step& step, WorkerPool& pool) {
  const std::size_t dim = shape_.head_dim;
  const std::size_t stride = 2 * dim * shape_.query_heads();
  if (split_.size() < stride * step.request.query_count) {
    split_.resize(stride * step.request.query_count);
  }
  for (std::uint32_t q = 0; q < step.request.query_count; ++q) {
    const float* from = step.request.queries + q * step.request.query_stride;
    float* target = split_.data() + q * stride;
    for (std::uint32_t head = 0; head < shape_.query_heads(); ++head) {
      for (std::size_t i = 0; i < dim; ++i) {
        const float element = from[head * dim + i];
        target[2 * head * dim + i] = std::max(element, 0.0f);
        target[(2 * head + 1) * dim + i] = std::min(element, 0.0f);
      }
    }
  }
  for (std::uint32_t head = 0; head < shape_.kv_heads; ++head) {
    views_[head] = landmarks_.boxes(head, 0, step.groups);
  }
  SelectRequest split = step.request;
  split.queries = split_.data();
  split.query_stride = stride;
  return bounds_->compute(split, 0, views_, pool);
}

void TwoStage::choose(const Step& step, std::uint32_t head_group) {
  Choice& choice = choices_[head_group];
  choice.finite = true;
  const std::span scores(choice.scores.data(), step.groups);
  const std::span head_scores(choice.head_scores.data(), step.groups);
  const bool largest = shape_.reduction == GroupReduction::kMax;
  std::ranges::fill(scores, 0.0f);
  const std::uint32_t per_head = shape_.queries_per_kv_head;
  for (std::uint32_t i = 0; i < shape_.heads_per_group * per_head; ++i) {
    const std::uint32_t head = head_group * shape_.heads_per_group + i / per_head;
    if (largest) std::ranges::fill(head_scores, 0.0f);
    for (std::uint32_t q = 0; q < step.request.query_count; ++q) {
      add_row(step, choice, head, q * per_head + i % per_head, largest ? head_scores : scores);
    }
    if (!largest) continue;
    for (std::size_t g = 0; g < scores.size(); ++g) scores[g] = std::max(scores[g], head_scores[g]);
  }
  std::ranges::fill(tiles_[head_group], std::uint8_t{0});
  choice.finite = choice.finite && all_finite(scores);
  if (!choice.finite) return;
  // What is attended in any case belongs to the softmax, and is cheap.
  mark_tiles(head_group, step.region.end, step.visible);
  const std::uint32_t first = step.region.begin / options_.group_tokens;
  const std::uint32_t count = (step.region.end - 1) / options_.group_tokens + 1 - first;
  const double wanted = options_.keep * step.request.budget_tokens;
  const auto most = static_cast<std::size_t>(wanted / options_.group_tokens) + 3;
  double kept = 0.0;
  for (std::uint32_t place :
       top_k(scores.subspan(first, count), std::min<std::size_t>(most, count), choice.order)) {
    if (kept >= wanted) break;
    const std::uint32_t begin = (first + place) * options_.group_tokens;
    kept += tokens_in(first + place, step.region.begin, step.region.end);
    mark_tiles(head_group, std::max(begin, step.region.begin),
               std::min(begin + options_.group_tokens, step.region.end));
  }
}

/// Adds what one query puts on each group; leaves the mean logits as the second stage wants them.
void TwoStage::add_row(const Step& step, Choice& choice, std::uint32_t head, std::uint32_t row,
                       std::span<float> target) {
  const std::span<float> means = mean_logits_.row(head, row, step.groups);
  const std::span<float> ranks(choice.row.data(), step.groups);
  if (!bounds_) {
    std::ranges::copy(means, ranks.begin());
  } else {
    const std::span<const float> bounds = bounds_->row(head, row, step.groups);
    const float of_mean = options_.coarse == Coarse::kMeanMinMax ? 0.5f : 0.0f;
    for (std::size_t g = 0; g < ranks.size(); ++g) {
      ranks[g] = of_mean * means[g] + (1.0f - of_mean) * bounds[g];
    }
  }
  choice.finite = choice.finite && all_finite(means) && all_finite(ranks);
  if (!choice.finite) return;
  if (shape_.softmax.logit_cap > 0.0f) {
    for (float& logit : means) logit = capped(logit);
    for (float& logit : ranks) logit = capped(logit);
  }
  if (shape_.reduction == GroupReduction::kMean) {
    for (std::size_t g = 0; g < ranks.size(); ++g) target[g] += ranks[g];
    return;
  }
  // A group counts as often as it has tokens; all but the first and the last have the same number.
  const float whole = std::log(static_cast<float>(options_.group_tokens));
  for (std::uint32_t g = 0; g < step.groups; ++g) {
    const std::uint32_t tokens = tokens_in(g, shape_.sinks, step.visible);
    const float count = tokens == options_.group_tokens ? whole
                        : tokens == 0                   ? std::numeric_limits<float>::lowest()
                                                        : std::log(static_cast<float>(tokens));
    ranks[g] = tokens == 0 ? count : ranks[g] + count;
  }
  const float lse = softmax_row(ranks);
  const auto share = static_cast<float>(1.0 - sinks_share(head, row, step.visible, lse));
  for (std::uint32_t g = 0; g < step.groups; ++g) target[g] += share * ranks[g];
}

/// What the sinks take of a query's softmax when all groups together have this log-sum-exp.
double TwoStage::sinks_share(std::uint32_t head, std::uint32_t row, std::uint32_t visible,
                             float lse) {
  std::span<const float> sinks = scores_.sink_logits(head, row);
  sinks = sinks.first(std::min<std::size_t>(sinks.size(), visible));
  double top = double{lse};
  for (float logit : sinks) top = std::max(top, double{logit});
  double sum = 0.0;
  for (float logit : sinks) sum += std::exp(double{logit} - top);
  return sum / (sum + std::exp(double{lse} - top));
}

void TwoStage::mark_tiles(std::uint32_t head_group, std::uint32_t begin, std::uint32_t end) {
  for (std::uint32_t t = begin / KeyCodes::kTileTokens; t * KeyCodes::kTileTokens < end; ++t) {
    tiles_[head_group][t / KeyCodes::kRunTiles] |=
        static_cast<std::uint8_t>(1u << t % KeyCodes::kRunTiles);
  }
}

Status make_two_stage(const SelectorRecipe& recipe, SelectorFactory& factory) {
  static constexpr std::string_view kCoarse[] = {"mean", "minmax", "mean-minmax"};
  static constexpr std::string_view kBits[] = {"4", "2"};
  static constexpr std::string_view kValues[] = {"8", "16", "32", "64", "128"};
  static constexpr std::string_view kTail[] = {"on", "off"};
  const SelectorParameters& parameters = recipe.parameters;
  TwoStageOptions options;
  KVTIER_ASSIGN_OR_RETURN(const std::size_t coarse,
                          parameters.choice("coarse", "mean-minmax", kCoarse));
  KVTIER_ASSIGN_OR_RETURN(options.keep, parameters.number("keep", options.keep, 1.0, 1e6));
  KVTIER_ASSIGN_OR_RETURN(options.group_tokens,
                          parameters.integer("tokens", options.group_tokens, 1, 256));
  KVTIER_ASSIGN_OR_RETURN(const std::size_t bits, parameters.choice("bits", "4", kBits));
  KVTIER_ASSIGN_OR_RETURN(const std::size_t values, parameters.choice("values", "64", kValues));
  KVTIER_ASSIGN_OR_RETURN(const std::size_t tail, parameters.choice("tail", "on", kTail));
  options.coarse = static_cast<Coarse>(coarse);
  options.bits = bits == 0 ? 4 : 2;
  options.value_tokens = 8u << values;
  options.tail = tail == 0;
  factory.needs.values = options.tail;
  factory.make = [options](const SelectorShape& shape,
                           LayerIndex) -> Result<std::unique_ptr<Selector>> {
    KVTIER_RETURN_IF_ERROR(
        check_codes({.bits = options.bits, .dim = shape.head_dim, .dtype = shape.dtype}));
    return std::unique_ptr<Selector>(std::make_unique<TwoStage>(shape, options));
  };
  return {};
}

}  // namespace

const SelectorFamily& two_stage_family() {
  static constexpr std::string_view kParameters[] = {"coarse", "keep",   "tokens",
                                                     "bits",   "values", "tail"};
  static const SelectorFamily kFamily = {
      .name = "two-stage",
      .summary = "landmarks leave four times the budget, 4-bit keys decide, the rest estimated",
      .source = "",
      .parameters = kParameters,
      .needs = {.values = true},
      .metadata = "as scan, and 6 head_dim / tokens B (a third of that with coarse=mean)",
      .build_cost = "O(head_dim + value_dim)",
      .step_cost = "O(context / tokens * head_dim + keep * budget * head_dim on codes + context)",
      .make = make_two_stage};
  return kFamily;
}

}  // namespace kvtier
