#include "selectors/prompt_scores.h"

#include "kernels/partial_attention.h"
#include "kernels/score_rows.h"
#include "selectors/step_logits.h"

#include <fmt/format.h>

#include <algorithm>
#include <functional>
#include <numeric>

namespace kvtier {
namespace {

/// Of every so many places in KVCrush's ranking, one goes to a representative.
constexpr std::uint32_t kCrushShare = 4;

}  // namespace

PromptScores::PromptScores(const SelectorShape& shape, const PromptScoreOptions& options,
                           std::uint32_t blocks)
    : shape_(shape),
      options_(options),
      blocks_(blocks),
      heads_(shape.query_heads(), std::vector<float>(blocks)),
      groups_(shape.head_groups(), std::vector<float>(blocks)) {}

Status PromptScores::compute(const ObservedPrompt& prompt, WorkerPool& pool) {
  for (std::uint32_t head = 0; head < shape_.kv_heads; ++head) {
    KVTIER_RETURN_IF_ERROR(weigh_head(prompt, head, pool));
  }
  for (std::uint32_t group = 0; group < shape_.head_groups(); ++group) reduce_heads(group);
  if (options_.score == PromptScore::kKvCrush) crush();
  return {};
}

/// The scores of the query heads of one KV head.
Status PromptScores::weigh_head(const ObservedPrompt& prompt, std::uint32_t head,
                                WorkerPool& pool) {
  const std::size_t per_head = shape_.queries_per_kv_head;
  const std::size_t all = prompt.positions.size();
  const std::size_t first_query = all - std::min<std::size_t>(all, options_.wanted_queries());
  const std::size_t row_bytes = shape_.head_dim * size_of(shape_.dtype);
  const std::size_t local_begin = all - std::min<std::size_t>(all, options_.queries);
  const std::uint32_t tokens = prompt.positions.back() + 1;
  const RowsView rows{prompt.keys + head * prompt.head_stride, tokens, shape_.head_dim, row_bytes,
                      shape_.dtype};
  StepLogits logits(shape_, 1, tokens);
  // Two sums per query head: over the recent queries, and over those before them (EMS).
  std::vector<std::vector<float>> recent(per_head, std::vector<float>(tokens));
  std::vector<std::vector<float>> before(per_head, std::vector<float>(tokens));
  for (std::size_t q = first_query; q < all; q += kMaxStepQueries) {
    const std::size_t count = std::min<std::size_t>(kMaxStepQueries, all - q);
    const SelectRequest request{.queries = prompt.queries + q * prompt.query_stride,
                                .query_stride = prompt.query_stride,
                                .query_count = static_cast<std::uint32_t>(count)};
    KVTIER_RETURN_IF_ERROR(logits.compute(request, head, std::span(&rows, 1), pool));
    for (std::size_t row = 0; row < count * per_head; ++row) {
      const std::size_t query = q + row / per_head;
      const std::span<float> weights =
          logits.row(0, static_cast<std::uint32_t>(row), prompt.positions[query] + 1);
      if (!all_finite(weights)) {
        return invalid_argument(
            fmt::format("prompt-observed: logits of KV head {}, prompt query at {}, overflow "
                        "float32 or the query is not finite",
                        head, prompt.positions[query]));
      }
      softmax_row(weights);
      auto& sums = query >= local_begin ? recent[row % per_head] : before[row % per_head];
      for (std::size_t t = 0; t < weights.size(); ++t) sums[t] += weights[t];
    }
  }
  for (std::size_t h = 0; h < per_head; ++h) {
    if (options_.score == PromptScore::kEms) {
      const auto local = static_cast<float>(all - local_begin);
      const auto global = static_cast<float>(all - first_query);
      for (std::size_t t = 0; t < tokens; ++t) {
        recent[h][t] = recent[h][t] / local + (recent[h][t] + before[h][t]) / global;
      }
    }
    sum_blocks(recent[h], heads_[head * per_head + h]);
  }
  return {};
}

/// Sums per block, without the sinks; pooled but for EMS.
void PromptScores::sum_blocks(std::span<const float> weights, std::span<float> blocks) const {
  const std::uint32_t reach = options_.score == PromptScore::kEms ? 0 : options_.kernel / 2;
  for (std::uint32_t b = 0; b < blocks.size(); ++b) {
    const std::uint32_t end = (b + 1) * shape_.tokens_per_block;
    float sum = 0.0f;
    for (std::uint32_t t = std::max(b * shape_.tokens_per_block, shape_.sinks); t < end; ++t) {
      const std::size_t first = t - std::min(t, reach);
      const std::size_t last = std::min<std::size_t>(weights.size(), std::size_t{t} + reach + 1);
      sum += *std::max_element(weights.begin() + static_cast<std::ptrdiff_t>(first),
                               weights.begin() + static_cast<std::ptrdiff_t>(last));
    }
    blocks[b] = sum;
  }
}

void PromptScores::reduce_heads(std::uint32_t group) {
  const std::size_t count = std::size_t{shape_.heads_per_group} * shape_.queries_per_kv_head;
  const std::span<float> scores = groups_[group];
  std::ranges::fill(scores, 0.0f);
  for (std::size_t i = 0; i < count; ++i) {
    const std::vector<float>& head = heads_[group * count + i];
    for (std::size_t b = 0; b < scores.size(); ++b) {
      scores[b] = shape_.reduction == GroupReduction::kMax ? std::max(scores[b], head[b])
                                                           : scores[b] + head[b];
    }
  }
  const float best = *std::ranges::max_element(scores);
  for (float& score : scores) score = best > 0.0f ? score / best : 0.0f;
}

/// How far each block's signature is from the majority's; then places by turns.
void PromptScores::crush() {
  std::vector<std::uint32_t> distance(blocks_);
  std::vector<std::uint8_t> bits(blocks_);
  for (const std::vector<float>& head : heads_) {
    const double mean = std::accumulate(head.begin(), head.end(), 0.0) / blocks_;
    std::size_t ones = 0;
    for (std::size_t b = 0; b < bits.size(); ++b) {
      bits[b] = static_cast<std::uint8_t>(double{head[b]} > mean);
      ones += bits[b];
    }
    const std::uint8_t majority = 2 * ones > bits.size() ? 1 : 0;
    for (std::size_t b = 0; b < bits.size(); ++b) distance[b] += bits[b] != majority ? 1u : 0u;
  }
  for (std::size_t group = 0; group < shape_.head_groups(); ++group) {
    crush_group(distance, groups_[group]);
  }
}

/// Replaces scores by places: winners in order, and in every fourth place the best block that is
/// left in the next bucket.
void PromptScores::crush_group(std::span<const std::uint32_t> distance,
                               std::span<float> scores) const {
  std::vector<std::uint32_t> winners(scores.size());
  std::iota(winners.begin(), winners.end(), 0u);
  std::ranges::sort(winners, [&](std::uint32_t a, std::uint32_t b) {
    return scores[a] != scores[b] ? scores[a] > scores[b] : a < b;
  });
  std::vector<std::vector<std::uint32_t>> buckets(shape_.query_heads() + 1);
  for (const std::uint32_t b : winners) buckets[distance[b]].push_back(b);
  std::vector<std::size_t> next(buckets.size());
  std::vector<bool> taken(scores.size());
  std::size_t winner = 0;
  std::size_t bucket = 0;
  for (std::size_t place = 0; place < scores.size(); ++place) {
    const auto first_free = [&](const std::vector<std::uint32_t>& list, std::size_t& at) {
      while (at < list.size() && taken[list[at]]) ++at;
      return at < list.size();
    };
    std::uint32_t block = 0;
    if (place % kCrushShare == kCrushShare - 1) {
      while (!first_free(buckets[bucket], next[bucket])) bucket = (bucket + 1) % buckets.size();
      block = buckets[bucket][next[bucket]];
      bucket = (bucket + 1) % buckets.size();
    } else {
      first_free(winners, winner);
      block = winners[winner];
    }
    taken[block] = true;
    scores[block] = 1.0f - static_cast<float>(place) / static_cast<float>(scores.size());
  }
}

}  // namespace kvtier
