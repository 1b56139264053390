#include "kernels/top_k.h"
#include "kernels/weigh_cells.h"
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
      choice.order.resize(coarse_.groups_max());
      choice.lse.resize(std::size_t{kMaxStepQueries} * shape.queries_per_kv_head *
                        shape.heads_per_group * slices_max());
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
    std::vector<std::uint32_t> order;
    /// [rows of the group, slices]: log-sum-exp, then what the slice's weights are multiplied with.
    std::vector<float> lse;
    bool finite = true;
  };
  /// Groups that are weighed at a time, so that they stay in the cache.
  static constexpr std::uint32_t kSlice = kCellRowTokens;
  struct Step {
    const SelectRequest& request;
    FarRegion region;
    std::uint32_t visible = 0;
    std::uint32_t groups = 0;
    std::uint32_t slices() const { return (groups + kSlice - 1) / kSlice; }
    std::uint32_t slice_groups(std::uint32_t slice) const {
      return std::min(kSlice, groups - slice * kSlice);
    }
  };
  /// One query's row in a head group: of which KV head, and which row of `StepLogits`.
  struct Row {
    std::uint32_t head = 0;
    std::uint32_t row = 0;
    std::size_t index = 0;  ///< Within the head group.
  };

  /// Tokens of a group in [begin, end).
  std::uint32_t tokens_in(std::uint32_t group, std::uint32_t begin, std::uint32_t end) const {
    const std::uint32_t first = std::max(group * coarse_.group_tokens(), begin);
    const std::uint32_t last = std::min((group + 1) * coarse_.group_tokens(), end);
    return last - std::min(first, last);
  }

  Status answer(const Question& question, std::span<GroupSelection> selection,
                WorkerPool& pool) override;
  std::uint32_t slices_max() const { return coarse_.groups_max() / kSlice + 1; }
  Row row_of(const Step& step, std::uint32_t head_group, std::uint32_t query_head,
             std::uint32_t query) const;
  template <class Body>
  void for_each_row(const Step& step, std::uint32_t head_group, const Body& body) const;
  void choose(const Step& step, std::uint32_t head_group);
  void measure_rows(const Step& step, std::uint32_t head_group);
  void score_slice(const Step& step, std::uint32_t head_group, std::uint32_t slice);
  void keep_best(const Step& step, std::uint32_t head_group);
  void copy_ranks(const Step& step, const Row& row, std::uint32_t slice, float* target);
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
  KVTIER_RETURN_IF_ERROR(logits().score_exact(request, keys(), pool));
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
  return rank(question, &coarse, selection, pool);
}

TwoStage::Row TwoStage::row_of(const Step& step, std::uint32_t head_group, std::uint32_t query_head,
                               std::uint32_t query) const {
  const std::uint32_t per_head = shape().queries_per_kv_head;
  return {.head = head_group * shape().heads_per_group + query_head / per_head,
          .row = query * per_head + query_head % per_head,
          .index = std::size_t{query_head} * step.request.query_count + query};
}

template <class Body>
void TwoStage::for_each_row(const Step& step, std::uint32_t head_group, const Body& body) const {
  for (std::uint32_t h = 0; h < shape().heads_per_group * shape().queries_per_kv_head; ++h) {
    for (std::uint32_t q = 0; q < step.request.query_count; ++q) {
      body(row_of(step, head_group, h, q));
    }
  }
}

/// Two passes over slices: what each query's softmax adds up to, then the groups' scores.
void TwoStage::choose(const Step& step, std::uint32_t head_group) {
  Choice& choice = choices_[head_group];
  choice.finite = true;
  measure_rows(step, head_group);
  if (!choice.finite) return;
  for (std::uint32_t slice = 0; slice < step.slices(); ++slice) {
    score_slice(step, head_group, slice);
  }
  choice.finite = all_finite(std::span(choice.scores.data(), step.groups));
  if (choice.finite) keep_best(step, head_group);
}

/// Finishes the logits, and finds what the weights of each row and slice are to be multiplied with.
void TwoStage::measure_rows(const Step& step, std::uint32_t head_group) {
  Choice& choice = choices_[head_group];
  const bool weighs = shape().reduction != GroupReduction::kMean;
  alignas(64) float logits[kSlice];
  for_each_row(step, head_group, [&](const Row& row) {
    const std::span lse(choice.lse.data() + row.index * slices_max(), step.slices());
    for (std::uint32_t slice = 0; slice < step.slices(); ++slice) {
      const std::uint32_t count = step.slice_groups(slice);
      choice.finite = coarse_.finish(row.head, row.row, slice * kSlice, count) && choice.finite;
      if (!weighs || !choice.finite) continue;
      copy_ranks(step, row, slice, logits);
      lse[slice] = weigh_cells({.logits = logits, .count = count});
    }
    if (!weighs || !choice.finite) return;
    const float top = *std::ranges::max_element(lse);
    double sum = 0.0;
    for (float of_slice : lse) sum += std::exp(double{of_slice} - double{top});
    const double total = double{top} + std::log(sum);
    // Every group was counted once, and has this many tokens.
    const double tokens = std::log(static_cast<double>(coarse_.group_tokens()));
    const double share =
        1.0 - sinks_share(row.head, row.row, step.visible, static_cast<float>(total + tokens));
    for (float& of_slice : lse) {
      of_slice = static_cast<float>(share * std::exp(double{of_slice} - total));
    }
  });
}

/// The groups' scores: what all queries put on them, reduced over the heads.
void TwoStage::score_slice(const Step& step, std::uint32_t head_group, std::uint32_t slice) {
  Choice& choice = choices_[head_group];
  const std::span scores(choice.scores.data() + slice * kSlice, step.slice_groups(slice));
  const bool largest = shape().reduction == GroupReduction::kMax;
  const bool weighs = shape().reduction != GroupReduction::kMean;
  alignas(64) float logits[kSlice];
  float head_scores[kSlice];
  float weights[kSlice];
  std::ranges::fill(scores, 0.0f);
  for_each_row(step, head_group, [&](const Row& row) {
    const bool first = row.index % step.request.query_count == 0;
    const bool last = row.index % step.request.query_count + 1 == step.request.query_count;
    const auto count = static_cast<std::uint32_t>(scores.size());
    float* target = scores.data();
    if (largest) {
      target = head_scores;
      if (first) std::fill_n(head_scores, count, 0.0f);
    }
    copy_ranks(step, row, slice, logits);
    if (!weighs) {
      for (std::uint32_t g = 0; g < count; ++g) target[g] += logits[g];
      return;
    }
    weigh_cells({.logits = logits, .count = count, .end = count, .cells = weights});
    const float share = choice.lse[row.index * slices_max() + slice];
    for (std::uint32_t g = 0; g < count; ++g) target[g] += share * weights[g];
    if (!largest || !last) return;
    for (std::uint32_t g = 0; g < count; ++g) scores[g] = std::max(scores[g], head_scores[g]);
  });
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
  const auto groups_for = [per_group](double tokens) {
    return static_cast<std::size_t>(std::min(std::ceil(tokens / per_group), 4e9));
  };
  // The first and the last group may hold fewer tokens than the others: some more then.
  std::size_t taken = groups_for(wanted);
  for (;;) {
    const std::span best =
        best_places(std::span(choice.scores.data() + first, count), taken, choice.order);
    double kept = 0.0;
    for (std::uint32_t place : best) {
      kept += tokens_in(first + place, step.region.begin, step.region.end);
    }
    if (kept < wanted && best.size() < count) {
      taken += groups_for(wanted - kept);
      continue;
    }
    for (std::uint32_t place : best) {
      const std::uint32_t begin = (first + place) * per_group;
      mark_tiles(head_group, std::max(begin, step.region.begin),
                 std::min(begin + per_group, step.region.end));
    }
    return;
  }
}

/// What the groups of a slice are ranked by; where one does not have as many tokens as the others,
/// sinks left out, its logit is changed by as much as its weight must be.
void TwoStage::copy_ranks(const Step& step, const Row& row, std::uint32_t slice, float* target) {
  const std::uint32_t first = slice * kSlice;
  const std::uint32_t count = step.slice_groups(slice);
  const std::span<const float> ranks = coarse_.ranks(row.head, row.row, step.groups);
  std::copy_n(ranks.data() + first, count, target);
  if (shape().reduction == GroupReduction::kMean) return;
  const std::uint32_t whole = coarse_.group_tokens();
  const auto recount = [&](std::uint32_t g) {
    if (g < first || g >= first + count) return;
    const std::uint32_t tokens = tokens_in(g, shape().sinks, step.visible);
    if (tokens == whole) return;
    target[g - first] =
        tokens == 0
            ? std::numeric_limits<float>::lowest()
            : target[g - first] + std::log(static_cast<float>(tokens) / static_cast<float>(whole));
  };
  // Only the first, with the sinks, and the last can have fewer.
  const std::uint32_t with_sinks = std::min(shape().sinks / whole + 1, step.groups);
  for (std::uint32_t g = 0; g < with_sinks; ++g) recount(g);
  if (with_sinks < step.groups) recount(step.groups - 1);
}

/// What the sinks take of a query's softmax when all groups together have this log-sum-exp.
double TwoStage::sinks_share(std::uint32_t head, std::uint32_t row, std::uint32_t visible,
                             float lse) {
  std::span<const float> sinks = logits().sink_logits(head, row);
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
