#include "selectors/families.h"
#include "selectors/far_selector.h"
#include "selectors/rank_tokens.h"
#include "selectors/seen_tokens.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

namespace kvtier {
namespace {

struct ExternalOptions {
  /// Single tokens: an indexer that scores tokens means those, and not their neighbours.
  bool tokens = true;
  /// With blocks: a block's score is the best of its tokens', which needs no assumption about what
  /// scores are; or their sum, which is right when they are weights.
  bool sum = false;
};

/// Ranks by scores that the engine hands over with each step (`SelectRequest::external`): the
/// model's own indexer (DeepSeek-V3.2's lightning indexer picks its 2048 best tokens), or the
/// attention of a draft model over its own, shorter road through the same context (SpecKV,
/// 2506.08373 [A]: there it decides what is dropped from the prompt; here what is attended, and
/// nothing is lost).
///
/// Larger is better, on any scale; tokens that got no score come last, and so does minus infinity,
/// which is how indexers mask. Keeps nothing, and sees no key.
class External final : public FarSelector {
 public:
  External(const SelectorShape& shape, ExternalOptions options)
      : FarSelector(shape, options.tokens ? shape.tokens_max : 0),
        options_(options),
        tokens_(shape.tokens_max),
        scores_(shape.tokens_max),
        order_(shape.tokens_max) {}

  void append(const NewTokens& tokens) override { tokens_.append(tokens); }
  void truncate(std::uint32_t position) override { tokens_.truncate(position); }

  std::unique_ptr<Selector> fork() const override { return std::make_unique<External>(*this); }
  void save(StateWriter& writer) const override { tokens_.save(writer); }
  Status restore(StateReader& reader) override { return tokens_.restore(reader); }

  std::size_t metadata_bytes() const override { return 0; }

 private:
  std::uint32_t tokens_seen() const override { return tokens_.count(); }
  Status answer(const Question& question, std::span<GroupSelection> selection,
                WorkerPool&) override {
    const auto& [request, region, learns] = question;
    if (request.external.scores == nullptr) {
      return invalid_argument(
          fmt::format("external: the step at position {} brings no scores "
                      "(SelectRequest::external)",
                      request.first_position));
    }
    for (std::uint32_t group = 0; group < selection.size(); ++group) {
      KVTIER_RETURN_IF_ERROR(take_scores(request, region, group));
      rank(request, region, selection[group]);
    }
    return {};
  }

  /// The scores of the region's tokens into the front of `scores_`.
  Status take_scores(const SelectRequest& request, FarRegion region, std::uint32_t group) {
    constexpr float kLast = std::numeric_limits<float>::lowest();
    const float* given = request.external.scores + group * request.external.group_stride;
    const std::uint32_t end = std::clamp(request.external.tokens, region.begin, region.end);
    for (std::uint32_t t = region.begin; t < end; ++t) {
      if (std::isnan(given[t]) || given[t] == std::numeric_limits<float>::infinity()) {
        return invalid_argument(
            fmt::format("external: the score of token {}, head group {}, is {} at position {}", t,
                        group, given[t], request.first_position));
      }
      scores_[t - region.begin] = std::max(given[t], kLast);
    }
    std::fill(scores_.begin() + (end - region.begin), scores_.begin() + region.tokens(), kLast);
    return {};
  }

  void rank(const SelectRequest& request, FarRegion region, GroupSelection& result) {
    const std::uint32_t budget = far_budget_tokens(shape(), request);
    if (options_.tokens) {
      rank_tokens({.scores = std::span(scores_.data(), region.tokens()),
                   .region = region,
                   .tokens_per_block = shape().tokens_per_block,
                   .far_budget_tokens = budget,
                   .band_tokens = request.band_tokens},
                  order_, result);
      return;
    }
    const std::uint32_t blocks = block_count(region, shape().tokens_per_block);
    std::uint32_t t = region.begin;
    for (std::uint32_t b = 0; b < blocks; ++b) {
      // In place: a block's score is written at or before the place of its first token's.
      const std::uint32_t next = (t / shape().tokens_per_block + 1) * shape().tokens_per_block;
      const std::uint32_t end = std::min(next, region.end);
      float score = scores_[t - region.begin];
      while (++t < end) {
        const float other = scores_[t - region.begin];
        score = options_.sum ? score + other : std::max(score, other);
      }
      scores_[b] = score;
    }
    rank_blocks({.scores = std::span(scores_.data(), blocks),
                 .always = {},
                 .region = region,
                 .tokens_per_block = shape().tokens_per_block,
                 .far_budget_tokens = budget,
                 .band_tokens = request.band_tokens},
                order_, result);
  }

  ExternalOptions options_;
  SeenTokens tokens_;
  std::vector<float> scores_;
  std::vector<std::uint32_t> order_;
};

}  // namespace

const SelectorFamily& external_family() {
  static constexpr std::string_view kParameters[] = {"granularity", "pool"};
  static const SelectorFamily kFamily = {
      .name = "external",
      .summary = "scores that the engine hands over: the model's indexer, a draft's attention",
      .source = "SpecKV, 2506.08373; indexers as in DeepSeek-V3.2",
      .parameters = kParameters,
      .partial_blocks = true,
      .needs = {.external_scores = true},
      .metadata = "0",
      .build_cost = "0",
      .step_cost = "O(context)",
      .make = [](const SelectorRecipe& recipe, SelectorFactory& factory) -> Status {
        static constexpr std::string_view kGranularities[] = {"token", "block"};
        static constexpr std::string_view kPools[] = {"max", "sum"};
        KVTIER_ASSIGN_OR_RETURN(const std::size_t granularity,
                                recipe.parameters.choice("granularity", "token", kGranularities));
        KVTIER_ASSIGN_OR_RETURN(const std::size_t pool,
                                recipe.parameters.choice("pool", "max", kPools));
        const ExternalOptions options{.tokens = granularity == 0, .sum = pool == 1};
        factory.partial_blocks = options.tokens;
        factory.make = [options](const SelectorShape& shape, LayerIndex) {
          return Result<std::unique_ptr<Selector>>(std::make_unique<External>(shape, options));
        };
        return {};
      }};
  return kFamily;
}

}  // namespace kvtier
