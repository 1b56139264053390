#include "selectors/token_votes.h"

#include "kernels/score_rows.h"
#include "selectors/rank_blocks.h"
#include "selectors/step_logits.h"

#include <fmt/format.h>

#include <algorithm>

namespace kvtier {
namespace {

/// Tokens whose votes one worker adds at a time: few enough that a row's piece stays in the cache.
constexpr std::uint32_t kVoteSlice = 4096;

}  // namespace

TokenVotes::TokenVotes(const SelectorShape& shape)
    : shape_(shape),
      votes_(std::size_t{shape.head_groups()} * shape.tokens_max),
      passes_(votes_.size()),
      scores_(std::size_t{shape.head_groups()} * (shape.tokens_max / shape.tokens_per_block + 1)),
      order_(scores_.size()) {}

Status TokenVotes::count(const SelectRequest& request, std::uint32_t tokens,
                         const Electorate& electorate, TokenLogits& logits, std::string_view family,
                         WorkerPool& pool) {
  const std::uint32_t rows = request.query_count * shape_.queries_per_kv_head;
  if (rows > rows_max_) {
    queries_ = FixedArray<float>(std::size_t{rows} * shape_.head_dim);
    logits_ = FixedArray<float>(std::size_t{rows} * shape_.tokens_max);
    floors_.resize(rows);
    finite_.resize(rows);
    rows_max_ = rows;
  }
  const FarRegion region = FarRegion::of(shape_, request.first_position);
  Count count{.request = request,
              .region = region,
              .tokens = std::min(tokens, request.first_position + request.query_count),
              .electorate = electorate};
  if (!electorate.everyone) count.tokens = region.end;
  const std::size_t per_query = std::size_t{shape_.queries_per_kv_head} * shape_.head_dim;
  for (count.kv_head = 0; count.kv_head < shape_.kv_heads; ++count.kv_head) {
    for (std::uint32_t q = 0; q < request.query_count; ++q) {
      std::copy_n(request.queries + q * request.query_stride + count.kv_head * per_query, per_query,
                  queries_.data() + q * per_query);
    }
    KVTIER_RETURN_IF_ERROR(logits.compute(count.kv_head, queries_.data(), rows, count.tokens,
                                          logits_.data(), shape_.tokens_max, pool));
    // Two pointers: small enough that std::function keeps them without allocating.
    pool.run(rows,
             [this, &count](std::size_t i) { weigh_row(count, static_cast<std::uint32_t>(i)); });
    if (std::ranges::find(finite_.begin(), finite_.begin() + rows, std::uint8_t{0}) !=
        finite_.begin() + rows) {
      return invalid_argument(
          fmt::format("{}: scores of KV head {} at position {} overflow float32", family,
                      count.kv_head, request.first_position));
    }
    pool.run((region.tokens() + kVoteSlice - 1) / kVoteSlice, [this, &count](std::size_t i) {
      const std::uint32_t first = count.region.begin + static_cast<std::uint32_t>(i) * kVoteSlice;
      add_slice(count, first, std::min(first + kVoteSlice, count.region.end));
    });
  }
  return {};
}

/// Logits of one row to votes, in place.
void TokenVotes::weigh_row(const Count& count, std::uint32_t row) {
  const std::uint32_t query = row / shape_.queries_per_kv_head;
  // Causality: a draft's earlier query does not see the later tokens.
  const std::uint32_t begin = count.electorate.everyone ? 0 : count.region.begin;
  const std::uint32_t end = count.electorate.everyone
                                ? std::min(count.tokens, count.request.first_position + query + 1)
                                : count.region.end;
  const std::span<float> weights =
      logits_.part(std::size_t{row} * shape_.tokens_max + begin, end - begin);
  finite_[row] = all_finite(weights) ? 1 : 0;
  floors_[row] = 0.0f;
  if (finite_[row] == 0) return;
  if (shape_.reduction == GroupReduction::kMean) {
    // Each one's share of the mean now, so that no sum of finite logits overflows.
    const auto rows = static_cast<float>(count.request.query_count * shape_.queries_per_kv_head *
                                         shape_.heads_per_group);
    for (float& weight : weights) weight /= rows;
    return;
  }
  softmax_row(weights);
  if (count.electorate.threshold <= 0.0f || !count.electorate.everyone) return;
  float always = 0.0f;
  for (std::uint32_t t = 0; t < count.region.begin; ++t) always += weights[t];
  for (std::uint32_t t = count.region.end; t < end; ++t) always += weights[t];
  floors_[row] = count.electorate.threshold * always;
}

/// Adds the votes of one KV head for tokens [first, last) to its head group's.
void TokenVotes::add_slice(const Count& count, std::uint32_t first, std::uint32_t last) {
  const std::size_t group = count.kv_head / shape_.heads_per_group;
  const bool opens = count.kv_head % shape_.heads_per_group == 0;
  float* votes = votes_.data() + group * shape_.tokens_max;
  std::uint8_t* passes = passes_.data() + group * shape_.tokens_max;
  if (opens) {
    std::fill(votes + first, votes + last, 0.0f);
    std::fill(passes + first, passes + last, std::uint8_t{0});
  }
  const std::uint32_t heads = shape_.queries_per_kv_head;
  const std::uint32_t queries = count.request.query_count;
  for (std::uint32_t head = 0; head < heads; ++head) {
    // The queries of a head are added into the first one's row.
    float* sum = logits_.data() + std::size_t{head} * shape_.tokens_max;
    for (std::uint32_t q = 0; q < queries; ++q) {
      const std::uint32_t row = q * heads + head;
      const float* weights = logits_.data() + std::size_t{row} * shape_.tokens_max;
      if (count.electorate.threshold > 0.0f) {
        const float floor = floors_[row];
        for (std::uint32_t t = first; t < last; ++t) {
          passes[t] = static_cast<std::uint8_t>(passes[t] | (weights[t] >= floor ? 1 : 0));
        }
      }
      if (q == 0) continue;
      for (std::uint32_t t = first; t < last; ++t) sum[t] += weights[t];
    }
    if (shape_.reduction == GroupReduction::kMax) {
      for (std::uint32_t t = first; t < last; ++t) votes[t] = std::max(votes[t], sum[t]);
    } else {
      for (std::uint32_t t = first; t < last; ++t) votes[t] += sum[t];
    }
  }
}

void TokenVotes::rank(const SelectRequest& request, float threshold,
                      std::span<GroupSelection> selection, WorkerPool& pool) {
  const Ranking ranking{.request = request,
                        .region = FarRegion::of(shape_, request.first_position),
                        .threshold = threshold,
                        .selection = selection};
  pool.run(selection.size(),
           [this, &ranking](std::size_t i) { rank_group(ranking, static_cast<std::uint32_t>(i)); });
}

void TokenVotes::rank_group(const Ranking& ranking, std::uint32_t group) {
  const FarRegion region = ranking.region;
  const std::uint32_t per_block = shape_.tokens_per_block;
  const std::uint32_t blocks = block_count(region, per_block);
  const bool mean = shape_.reduction == GroupReduction::kMean;
  const std::size_t scratch = std::size_t{group} * (shape_.tokens_max / per_block + 1);
  const std::span scores(scores_.data() + scratch, blocks);
  const float* votes = votes_.data() + std::size_t{group} * shape_.tokens_max;
  const std::uint8_t* passes = passes_.data() + std::size_t{group} * shape_.tokens_max;
  double mass = 0.0;
  std::uint32_t passed = 0;
  std::uint32_t begin = region.begin;
  for (std::uint32_t b = 0; b < blocks; ++b) {
    const std::uint32_t end = std::min((begin / per_block + 1) * per_block, region.end);
    float score = 0.0f;
    bool passing = ranking.threshold <= 0.0f;
    for (std::uint32_t t = begin; t < end; ++t) {
      score += votes[t];
      passing = passing || passes[t] != 0;
    }
    mass += double{score};
    // Votes are weights when there is a threshold, so what did not pass is behind all that did.
    scores[b] = !passing ? 0.0f : mean ? score / static_cast<float>(end - begin) : score;
    passed += passing ? 1 : 0;
    begin = end;
  }
  GroupSelection& result = ranking.selection[group];
  rank_blocks({.scores = scores,
               .always = {},
               .region = region,
               .tokens_per_block = per_block,
               .far_budget_tokens = far_budget_tokens(shape_, ranking.request),
               .band_tokens = ranking.request.band_tokens},
              std::span(order_).subspan(scratch, blocks), result);
  result.chosen = std::min(result.chosen, passed);
  if (!mean) result.mass = static_cast<float>(mass);
}

}  // namespace kvtier
