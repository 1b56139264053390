#include "selectors/families.h"
#include "selectors/far_selector.h"
#include "selectors/kept_keys.h"
#include "selectors/rank_tokens.h"
#include "selectors/step_logits.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>

namespace kvtier {
namespace {

/// The best possible choice at this block size and budget: ranks blocks by the true attention mass
/// of their far tokens, from a softmax over every visible token (sinks and window included), pooled
/// by the group reduction as `reduce_token_weights` says. Since blocks are taken greedily, "best"
/// is exact up to the two blocks that the region's edges cut and the last one that does not fit.
///
/// Under `kMean` it pools by the sum: a mean of raw logits is a way to guess mass, not a mass that
/// a choice could find, and an oracle must be the ceiling of what the selectors are judged by.
///
/// With `granularity=token` it ranks single tokens, whatever the block size: the best that any
/// choice of this many tokens could find, and the yardstick of selectors that name tokens.
///
/// Keeps every key; a measuring stick, not a way to save memory.
class Oracle final : public FarSelector {
 public:
  Oracle(const SelectorShape& shape, bool by_token)
      : FarSelector(shape, by_token ? shape.tokens_max : 0),
        by_token_(by_token),
        unit_tokens_(by_token ? 1 : shape.tokens_per_block),
        keys_(shape),
        logits_(shape, 1, shape.tokens_max),
        scores_(shape.tokens_max / unit_tokens_ + 1),
        head_scores_(scores_.size()),
        order_(scores_.size()) {}

  void append(const NewTokens& tokens) override { keys_.append(tokens); }
  void truncate(std::uint32_t position) override { keys_.truncate(position); }

  std::unique_ptr<Selector> fork() const override { return std::make_unique<Oracle>(*this); }
  void save(StateWriter& writer) const override { keys_.save(writer); }
  Status restore(StateReader& reader) override { return keys_.restore(reader); }
  std::size_t metadata_bytes() const override { return keys_.bytes(); }

 private:
  std::uint32_t tokens_seen() const override { return keys_.count(); }
  Status answer(const Question& question, std::span<GroupSelection> selection,
                WorkerPool& pool) override {
    const auto& [request, region, learns] = question;
    KVTIER_CHECK(request.first_position + request.query_count <= keys_.count(),
                 "{} queries at position {}, {} tokens were appended", request.query_count,
                 request.first_position, keys_.count());
    const std::span scores(scores_.data(), block_count(region, unit_tokens_));
    for (std::uint32_t group = 0; group < selection.size(); ++group) {
      KVTIER_RETURN_IF_ERROR(score_group(request, region, group, scores, pool));
      rank(request, region, scores, selection[group]);
      selection[group].mass = std::accumulate(scores.begin(), scores.end(), 0.0f);
    }
    return {};
  }

  void rank(const SelectRequest& request, FarRegion region, std::span<const float> scores,
            GroupSelection& result) {
    const std::uint32_t budget = far_budget_tokens(shape(), request);
    if (by_token_) {
      rank_tokens({.scores = scores,
                   .region = region,
                   .tokens_per_block = shape().tokens_per_block,
                   .far_budget_tokens = budget,
                   .band_tokens = request.band_tokens},
                  order_, result);
    } else {
      rank_blocks({.scores = scores,
                   .always = {},
                   .region = region,
                   .tokens_per_block = shape().tokens_per_block,
                   .far_budget_tokens = budget,
                   .band_tokens = request.band_tokens},
                  order_, result);
    }
  }

  /// One KV head at a time: the logits of all tokens are large, and their scratch is shared.
  Status score_group(const SelectRequest& request, FarRegion region, std::uint32_t group,
                     std::span<float> scores, WorkerPool& pool) {
    const std::uint32_t first_head = group * shape().heads_per_group;
    for (std::uint32_t i = 0; i < shape().heads_per_group; ++i) {
      KVTIER_RETURN_IF_ERROR(weigh_head(request, first_head + i, pool));
      const bool first = i == 0;
      const std::span target = first ? scores : std::span(head_scores_.data(), scores.size());
      reduce_token_weights(logits_.all_rows(0),
                           std::size_t{request.query_count} * shape().queries_per_kv_head,
                           logits_.row_stride(), region, unit_tokens_, shape().reduction, target,
                           request.query_count);
      if (first) continue;
      const bool largest = shape().reduction == GroupReduction::kMax;
      for (std::size_t b = 0; b < scores.size(); ++b) {
        scores[b] = largest ? std::max(scores[b], target[b]) : scores[b] + target[b];
      }
    }
    return {};
  }

  /// Leaves the attention weights of every query of `head` in `logits_`.
  Status weigh_head(const SelectRequest& request, std::uint32_t head, WorkerPool& pool) {
    const std::size_t visible = request.first_position + request.query_count;
    const RowsView rows = keys_.rows(head, 0, visible);
    KVTIER_RETURN_IF_ERROR(logits_.compute(request, head, std::span(&rows, 1), pool));
    for (std::uint32_t q = 0; q < request.query_count; ++q) {
      for (std::uint32_t h = 0; h < shape().queries_per_kv_head; ++h) {
        const std::uint32_t row = q * shape().queries_per_kv_head + h;
        // Causality: a draft's earlier query does not see the later tokens.
        const std::span<float> weights = logits_.row(0, row, request.first_position + q + 1);
        if (!all_finite(weights)) {
          return invalid_argument(
              fmt::format("oracle: logits of KV head {} at position {} overflow float32", head,
                          request.first_position + q));
        }
        softmax_row(weights);
      }
    }
    return {};
  }

  bool by_token_;
  std::uint32_t unit_tokens_;
  KeptKeys keys_;
  StepLogits logits_;
  std::vector<float> scores_;
  std::vector<float> head_scores_;
  std::vector<std::uint32_t> order_;
};

}  // namespace

const SelectorFamily& oracle_family() {
  static constexpr std::string_view kParameters[] = {"granularity"};
  static const SelectorFamily kFamily = {
      .name = "oracle",
      .summary = "true attention mass from all keys: the best possible choice (measuring stick)",
      .parameters = kParameters,
      .metadata = "2 head_dim B: every key",
      .build_cost = "a copy",
      .step_cost = "O(context * head_dim): exact logits",
      .make = [](const SelectorRecipe& recipe, SelectorFactory& factory) -> Status {
        static constexpr std::string_view kGranularities[] = {"block", "token"};
        KVTIER_ASSIGN_OR_RETURN(const std::size_t granularity,
                                recipe.parameters.choice("granularity", "block", kGranularities));
        const bool by_token = granularity == 1;
        factory.partial_blocks = by_token;
        factory.make = [by_token](const SelectorShape& shape, LayerIndex) {
          return Result<std::unique_ptr<Selector>>(std::make_unique<Oracle>(shape, by_token));
        };
        return {};
      }};
  return kFamily;
}

}  // namespace kvtier
