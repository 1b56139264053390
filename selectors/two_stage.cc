#include "kernels/score_rows.h"
#include "kernels/top_k.h"
#include "selectors/coarse_logits.h"
#include "selectors/code_selector.h"
#include "selectors/families.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

namespace kvtier {
namespace {

struct TwoStageOptions {
  CodeSelector::Options codes;
  CoarseLogits::Options coarse;
  double keep = 4.0;  ///< Tokens that the first stage leaves, as a multiple of the budget.
};

/// Landmarks first, coded keys for what they leave: a scan that reads a part of the codes.
///
/// First stage: every group of `tokens` is weighed by its mean key, by the upper bound of the box
/// around its keys (Quest), or by the average of both; a softmax over the groups, each counted as
/// often as it has tokens, and the sinks' exact logits. The best groups, reduced over queries and
/// heads as the shape says, survive until they hold `keep` times the budget.
/// Second stage: the tiles of 16 tokens that hold a survivor are scored by their codes, as `scan`
/// does; every other token gets the logit of its group's mean key, whatever ranked the group,
/// because a bound is no estimate. Blocks are ranked by the mass that comes of both, so one that
/// nobody looked at closely still competes with its landmark, and the rest is estimated from the
/// same weights: from codes where there are, from the landmarks elsewhere.
/// With `keep` as large as the context it is `scan`.
///
/// Means of two tokens in two bits are the default: half as many landmarks as tokens, at half the
/// bits of the codes behind them, and the second stage mends what they got wrong. They take less
/// room than float16 means and boxes of 16 tokens, and what is lost by averaging 16 keys is lost
/// for good. README.md has what else was tried.
class TwoStage final : public CodeSelector {
 public:
  TwoStage(const SelectorShape& shape, const TwoStageOptions& options)
      : CodeSelector(shape, options.codes),
        keep_(options.keep),
        coarse_(shape, options.coarse),
        tiles_(shape.head_groups(), std::vector<std::uint8_t>(keys().runs_max() + 1)),
        choices_(shape.head_groups()) {
    for (Choice& choice : choices_) {
      choice.scores.resize(coarse_.groups_max());
      choice.head_scores.resize(coarse_.groups_max());
      choice.row.resize(coarse_.groups_max());
      choice.order.resize(coarse_.groups_max());
    }
  }

  void append(const NewTokens& tokens) override {
    CodeSelector::append(tokens);
    coarse_.append(tokens);
  }
  void truncate(std::uint32_t position) override {
    CodeSelector::truncate(position);
    coarse_.truncate(position);
  }
  std::uint32_t truncate_floor(std::uint32_t position) const override {
    for (std::uint32_t floor = position;; position = floor) {
      floor = coarse_.truncate_floor(CodeSelector::truncate_floor(position));
      if (floor == position) return floor;
    }
  }

  std::unique_ptr<Selector> fork() const override { return std::make_unique<TwoStage>(*this); }
  void save(StateWriter& writer) const override {
    CodeSelector::save(writer);
    coarse_.save(writer);
  }
  Status restore(StateReader& reader) override {
    KVTIER_RETURN_IF_ERROR(CodeSelector::restore(reader));
    return coarse_.restore(reader);
  }
  std::size_t metadata_bytes() const override {
    return CodeSelector::metadata_bytes() + coarse_.metadata_bytes();
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

  /// Tokens of a group in [begin, end).
  std::uint32_t tokens_in(std::uint32_t group, std::uint32_t begin, std::uint32_t end) const {
    const std::uint32_t first = std::max(group * coarse_.group_tokens(), begin);
    const std::uint32_t last = std::min((group + 1) * coarse_.group_tokens(), end);
    return last - std::min(first, last);
  }

  Status answer(const Question& question, std::span<GroupSelection> selection,
                WorkerPool& pool) override;
  void choose(const Step& step, std::uint32_t head_group);
  void keep_best(const Step& step, std::uint32_t head_group);
  void add_row(const Step& step, Choice& choice, std::uint32_t head, std::uint32_t row,
               std::span<float> target);
  void count_tokens(const Step& step, std::span<float> ranks) const;
  double sinks_share(std::uint32_t head, std::uint32_t row, std::uint32_t visible, float lse);
  void mark_tiles(std::uint32_t head_group, std::uint32_t begin, std::uint32_t end);

  double keep_;
  CoarseLogits coarse_;
  std::vector<std::vector<std::uint8_t>> tiles_;  ///< [head groups][runs]
  std::vector<Choice> choices_;
};

Status TwoStage::answer(const Question& question, std::span<GroupSelection> selection,
                        WorkerPool& pool) {
  const SelectRequest& request = question.request;
  Step step{.request = request, .region = question.region};
  step.visible = std::min(request.first_position + request.query_count, keys().tokens());
  step.groups = (step.visible - 1) / coarse_.group_tokens() + 1;
  KVTIER_RETURN_IF_ERROR(coarse_.compute(request, step.visible, pool));
  KVTIER_RETURN_IF_ERROR(scores().score_exact(request, keys(), pool));
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
                            .logits = &coarse_.means(),
                            .group_tokens = coarse_.group_tokens(),
                            .groups = step.groups};
  KVTIER_RETURN_IF_ERROR(scores().compute(request, keys(), &coarse, pool));
  return scores().rank(request, selection, pool);
}

void TwoStage::choose(const Step& step, std::uint32_t head_group) {
  Choice& choice = choices_[head_group];
  choice.finite = true;
  const std::span scores(choice.scores.data(), step.groups);
  const std::span head_scores(choice.head_scores.data(), step.groups);
  const bool largest = shape().reduction == GroupReduction::kMax;
  std::ranges::fill(scores, 0.0f);
  const std::uint32_t per_head = shape().queries_per_kv_head;
  for (std::uint32_t i = 0; i < shape().heads_per_group * per_head; ++i) {
    const std::uint32_t head = head_group * shape().heads_per_group + i / per_head;
    if (largest) std::ranges::fill(head_scores, 0.0f);
    for (std::uint32_t q = 0; q < step.request.query_count; ++q) {
      add_row(step, choice, head, q * per_head + i % per_head, largest ? head_scores : scores);
    }
    if (!largest) continue;
    for (std::size_t g = 0; g < scores.size(); ++g) scores[g] = std::max(scores[g], head_scores[g]);
  }
  choice.finite = choice.finite && all_finite(scores);
  if (choice.finite) keep_best(step, head_group);
}

/// Marks the tiles of the groups that survive.
void TwoStage::keep_best(const Step& step, std::uint32_t head_group) {
  std::ranges::fill(tiles_[head_group], std::uint8_t{0});
  // What is attended in any case belongs to the softmax, and is cheap.
  mark_tiles(head_group, step.region.end, step.visible);
  Choice& choice = choices_[head_group];
  const std::uint32_t per_group = coarse_.group_tokens();
  const std::uint32_t first = step.region.begin / per_group;
  const std::uint32_t count = (step.region.end - 1) / per_group + 1 - first;
  const double wanted = keep_ * step.request.budget_tokens;
  // The first and the last group may hold fewer tokens than the others.
  const auto most = static_cast<std::size_t>(wanted / per_group) + 3;
  double kept = 0.0;
  for (std::uint32_t place : top_k(std::span(choice.scores.data() + first, count),
                                   std::min<std::size_t>(most, count), choice.order)) {
    if (kept >= wanted) break;
    const std::uint32_t begin = (first + place) * per_group;
    kept += tokens_in(first + place, step.region.begin, step.region.end);
    mark_tiles(head_group, std::max(begin, step.region.begin),
               std::min(begin + per_group, step.region.end));
  }
}

/// Adds what one query puts on each group; leaves the mean logits as the second stage wants them.
void TwoStage::add_row(const Step& step, Choice& choice, std::uint32_t head, std::uint32_t row,
                       std::span<float> target) {
  const std::span<float> ranks(choice.row.data(), step.groups);
  choice.finite = coarse_.finish_row(head, row, ranks) && choice.finite;
  if (!choice.finite) return;
  if (shape().reduction == GroupReduction::kMean) {
    for (std::size_t g = 0; g < ranks.size(); ++g) target[g] += ranks[g];
    return;
  }
  count_tokens(step, ranks);
  const float lse = softmax_row(ranks);
  const auto share = static_cast<float>(1.0 - sinks_share(head, row, step.visible, lse));
  for (std::uint32_t g = 0; g < step.groups; ++g) target[g] += share * ranks[g];
}

/// A group counts as often as it has tokens that are not sinks.
void TwoStage::count_tokens(const Step& step, std::span<float> ranks) const {
  const std::uint32_t whole = coarse_.group_tokens();
  const float of_whole = std::log(static_cast<float>(whole));
  for (float& rank : ranks) rank += of_whole;
  // All but the first, with the sinks, and the last have the same number.
  const std::uint32_t with_sinks = std::min(shape().sinks / whole + 1, step.groups);
  const auto recount = [&](std::uint32_t g) {
    const std::uint32_t tokens = tokens_in(g, shape().sinks, step.visible);
    if (tokens == whole) return;
    ranks[g] = tokens == 0 ? std::numeric_limits<float>::lowest()
                           : ranks[g] - of_whole + std::log(static_cast<float>(tokens));
  };
  for (std::uint32_t g = 0; g < with_sinks; ++g) recount(g);
  if (with_sinks < step.groups) recount(step.groups - 1);
}

/// What the sinks take of a query's softmax when all groups together have this log-sum-exp.
double TwoStage::sinks_share(std::uint32_t head, std::uint32_t row, std::uint32_t visible,
                             float lse) {
  std::span<const float> sinks = scores().sink_logits(head, row);
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

/// The first stage's part of a name. What is rounded to codes can be fine, what is not is coarse.
Result<CoarseLogits::Options> parse_coarse(const SelectorParameters& parameters) {
  static constexpr std::string_view kCoarse[] = {"mean", "minmax", "mean-minmax"};
  static constexpr std::string_view kMeans[] = {"2", "4", "16"};
  KVTIER_ASSIGN_OR_RETURN(const std::size_t coarse, parameters.choice("coarse", "mean", kCoarse));
  const bool boxes = coarse != 0;
  KVTIER_ASSIGN_OR_RETURN(const std::size_t means,
                          parameters.choice("means", boxes ? "16" : "2", kMeans));
  if (boxes && means != 2) {
    return invalid_argument(
        fmt::format("selector 'two-stage': means={} with coarse={}, expected means=16: boxes are "
                    "not coded (coarse=mean takes 2 and 4)",
                    kMeans[means], kCoarse[coarse]));
  }
  CoarseLogits::Options options{.rule = static_cast<CoarseLogits::Rule>(coarse),
                                .mean_bits = means == 2   ? 0
                                             : means == 1 ? 4u
                                                          : 2u};
  KVTIER_ASSIGN_OR_RETURN(options.group_tokens,
                          parameters.integer("tokens", means == 2 ? 16 : 2, 1, 256));
  return options;
}

Status make_two_stage(const SelectorRecipe& recipe, SelectorFactory& factory) {
  TwoStageOptions options;
  KVTIER_ASSIGN_OR_RETURN(options.codes,
                          CodeSelector::Options::parse(recipe.parameters, factory.needs));
  KVTIER_ASSIGN_OR_RETURN(options.coarse, parse_coarse(recipe.parameters));
  KVTIER_ASSIGN_OR_RETURN(options.keep, recipe.parameters.number("keep", options.keep, 1.0, 1e6));
  factory.make = [options](const SelectorShape& shape,
                           LayerIndex) -> Result<std::unique_ptr<Selector>> {
    // A dim that suits codes of one width suits the other.
    KVTIER_RETURN_IF_ERROR(
        check_codes({.bits = options.codes.bits, .dim = shape.head_dim, .dtype = shape.dtype}));
    return std::unique_ptr<Selector>(std::make_unique<TwoStage>(shape, options));
  };
  return {};
}

}  // namespace

const SelectorFamily& two_stage_family() {
  static constexpr std::string_view kParameters[] = {"coarse", "means",  "tokens", "keep",
                                                     "bits",   "values", "tail",   "fetch"};
  static const SelectorFamily kFamily = {
      .name = "two-stage",
      .summary = "mean keys of two tokens in 2 bits leave four times the budget, 4-bit keys decide",
      .source = "",
      .parameters = kParameters,
      .needs = {.values = true},
      .metadata =
          "as scan, and (head_dim means / 8 + head_dim / 16) / tokens B (means=16: 2 head_dim / "
          "tokens, three times that with boxes)",
      .build_cost = "O(head_dim + value_dim)",
      .step_cost = "O(context / tokens * head_dim + keep * budget * head_dim) on codes, + context",
      .make = make_two_stage};
  return kFamily;
}

}  // namespace kvtier
