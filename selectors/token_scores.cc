#include "selectors/token_scores.h"

#include "selectors/step_logits.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace kvtier {
namespace {

float sum_of(std::span<const float> values) {
  return std::accumulate(values.begin(), values.end(), 0.0f);
}

}  // namespace

TokenScores::TokenScores(const SelectorShape& shape, const Options& options)
    : shape_(shape),
      options_(options),
      // One of them must pass by itself.
      cell_tokens_(options.threshold > 0.0f
                       ? 1
                       : std::gcd(shape.tokens_per_block,
                                  options.value_tokens == 0 ? kSliceTokens : options.value_tokens)),
      cells_max_(shape.tokens_max / cell_tokens_ + 1),
      slices_max_(shape.tokens_max / kSliceTokens + 1),
      groups_max_(options.value_tokens == 0 ? 0 : shape.tokens_max / options.value_tokens + 1),
      task_finite_(std::size_t{shape.kv_heads} * slices_max_),
      logits_(shape.reduction == GroupReduction::kMean ? std::size_t{shape.kv_heads} * cells_max_
                                                       : 0),
      block_scores_(shape.head_groups()),
      head_scores_(shape.head_groups()),
      order_(shape.head_groups()),
      chosen_(options.value_tokens == 0 ? 0 : shape.head_groups()) {
  KVTIER_CHECK(options.value_tokens == 0 || kSliceTokens % options.value_tokens == 0,
               "value groups of {} tokens, expected a power of two up to {}", options.value_tokens,
               kSliceTokens);
  KVTIER_CHECK(options.everyone || options.value_tokens == 0,
               "an estimate of the rest from weights of the far tokens alone");
  const std::size_t blocks_max = shape.tokens_max / shape.tokens_per_block + 1;
  for (std::uint32_t i = 0; i < shape.head_groups(); ++i) {
    block_scores_[i].resize(blocks_max);
    head_scores_[i].resize(blocks_max);
    order_[i].resize(blocks_max);
  }
  for (std::vector<std::uint8_t>& chosen : chosen_) chosen.resize(cells_max_);
}

void TokenScores::reserve_rows(std::uint32_t rows) {
  rows_ = rows;
  if (rows <= rows_max_) return;
  rows_max_ = rows;
  const std::size_t all = std::size_t{shape_.kv_heads} * rows;
  packed_ = FixedArray<float>(all * shape_.head_dim);
  cells_ = FixedArray<float>(all * cells_max_);
  slices_ = FixedArray<float>(all * slices_max_);
  lse_ = FixedArray<float>(all);
  floors_ = FixedArray<float>(options_.threshold > 0.0f ? all : 0);
  rest_ = FixedArray<float>(all * groups_max_);
}

/// The queries of one KV head side by side: row = query * queries_per_kv_head + query head.
void TokenScores::pack_queries(const SelectRequest& request) {
  const std::size_t of_head = std::size_t{shape_.queries_per_kv_head} * shape_.head_dim;
  for (std::uint32_t head = 0; head < shape_.kv_heads; ++head) {
    for (std::uint32_t q = 0; q < request.query_count; ++q) {
      std::copy_n(request.queries + q * request.query_stride + head * of_head, of_head,
                  packed_.data() + row_index(head, 0) * shape_.head_dim + q * of_head);
    }
  }
}

Status TokenScores::compute(const SelectRequest& request, std::uint32_t tokens, TokenLogits& source,
                            WorkerPool& pool) {
  region_ = FarRegion::of(shape_, request.first_position);
  first_position_ = request.first_position;
  KVTIER_CHECK(region_.end <= tokens, "tokens to {} are to be ranked, {} were appended",
               region_.end, tokens);
  visible_ = options_.everyone ? std::min(request.first_position + request.query_count, tokens)
                               : region_.end;
  reserve_rows(request.query_count * shape_.queries_per_kv_head);
  pack_queries(request);
  KVTIER_RETURN_IF_ERROR(source.prepare(request, packed_.data(), rows_, visible_, pool));
  slice_count_ = (visible_ + kSliceTokens - 1) / kSliceTokens;
  const std::uint32_t tasks = shape_.kv_heads * slice_count_;
  Step step{request, source, tasks};
  // Two pointers: small enough that std::function keeps them without allocating.
  pool.run((tasks + kTaskSlices - 1) / kTaskSlices, [this, &step](std::size_t i) {
    const std::uint32_t first = static_cast<std::uint32_t>(i) * kTaskSlices;
    for (std::uint32_t task = first; task < std::min(first + kTaskSlices, step.tasks); ++task) {
      weigh_slice(step, task);
    }
  });
  for (std::uint32_t i = 0; i < tasks; ++i) {
    if (task_finite_[i] != 0) continue;
    return invalid_argument(fmt::format("scores of KV head {} at position {} overflow float32",
                                        i / slice_count_, request.first_position));
  }
  pool.run(shape_.kv_heads, [this](std::size_t head) {
    for (std::uint32_t row = 0; row < rows_; ++row)
      scale_row(static_cast<std::uint32_t>(head), row);
  });
  return {};
}

void TokenScores::weigh_slice(const Step& step, std::uint32_t task) {
  alignas(64) float logits[kPieceRows * kSliceTokens];
  const std::uint32_t first = task % slice_count_ * kSliceTokens;
  TokenPiece piece{.head = task / slice_count_,
                   .first_token = first,
                   .end_token = std::min(first + kSliceTokens, visible_),
                   .logits = logits};
  if (shape_.reduction == GroupReduction::kMean) {
    const std::size_t cell = first / cell_tokens_;
    std::fill_n(logits_.data() + piece.head * std::size_t{cells_max_} + cell,
                std::min<std::size_t>(kSliceTokens / cell_tokens_, cells_max_ - cell), 0.0f);
  }
  bool finite = true;
  for (std::uint32_t row = 0; row < rows_; row += kPieceRows) {
    piece.first_row = row;
    piece.rows = std::min(kPieceRows, rows_ - row);
    piece.queries = packed_.data() + row_index(piece.head, row) * shape_.head_dim;
    step.source.fill(piece);
    for (std::uint32_t r = 0; r < piece.rows; ++r) {
      finite = weigh_row(step.request, piece, r) && finite;
    }
  }
  task_finite_[task] = finite ? 1 : 0;
}

/// Turns a row of logits into weights and adds them up per cell. False if one is not finite.
bool TokenScores::weigh_row(const SelectRequest& request, const TokenPiece& piece,
                            std::uint32_t r) {
  const std::uint32_t row = piece.first_row + r;
  float* logits = piece.logits + r * kSliceTokens;
  float& lse = slice_scales(piece.head, row)[piece.first_token / kSliceTokens];
  // Causality: a draft's earlier query does not see the later tokens.
  const std::uint32_t query = row / shape_.queries_per_kv_head;
  const std::uint32_t sees = std::min(request.first_position + query + 1, piece.end_token);
  const std::uint32_t begin = std::max(piece.first_token, region_.begin);
  const std::uint32_t end = std::min(piece.end_token, region_.end);
  if (sees <= piece.first_token || (!options_.everyone && begin >= end)) {
    lse = kEmptyLse;
    return true;
  }
  if (!options_.everyone) {
    // No infinity, and so small that its weight is none.
    std::fill(logits, logits + (begin - piece.first_token), std::numeric_limits<float>::lowest());
  }
  CellRow cells_of_row{.logits = logits,
                       .count = sees - piece.first_token,
                       .cell_tokens = cell_tokens_,
                       .cells = cells(piece.head, row) + piece.first_token / cell_tokens_};
  if (options_.threshold > 0.0f) {
    cells_of_row.end = cells_of_row.count;
  } else if (begin < end) {
    cells_of_row.begin = begin - piece.first_token;
    cells_of_row.end = end - piece.first_token;
  }
  if (shape_.reduction == GroupReduction::kMean) {
    float* sums = logits_.data() + piece.head * std::size_t{cells_max_};
    for (std::uint32_t t = begin; t < end; ++t) {
      sums[t / cell_tokens_] += logits[t - piece.first_token];
    }
  }
  lse = weigh_cells(cells_of_row);
  return !std::isnan(lse);
}

/// From the slices' log-sum-exps to what their weights are multiplied with.
void TokenScores::scale_row(std::uint32_t head, std::uint32_t row) {
  const std::span slices(slice_scales(head, row), slice_count_);
  const float top = *std::ranges::max_element(slices);
  double sum = 0.0;
  for (float lse : slices) sum += std::exp(double{lse} - double{top});
  const double total = double{top} + std::log(sum);
  for (float& lse : slices) lse = static_cast<float>(std::exp(double{lse} - total));
  lse_[row_index(head, row)] = static_cast<float>(total);
  if (options_.threshold > 0.0f) set_floor(head, row);
}

/// The weight from which a token of this row passes.
void TokenScores::set_floor(std::uint32_t head, std::uint32_t row) {
  const std::uint32_t query = row / shape_.queries_per_kv_head;
  const std::uint32_t sees = std::min(first_position_ + query + 1, visible_);
  float always = 0.0f;
  for (std::uint32_t t = 0; t < region_.begin; ++t) always += weight(head, row, t);
  for (std::uint32_t t = region_.end; t < sees; ++t) always += weight(head, row, t);
  floors_[row_index(head, row)] = options_.threshold * always;
}

/// Puts blocks in which no token passed behind those in which one did; returns how many did.
std::uint32_t TokenScores::drop_what_fails(std::uint32_t group, std::span<float> scores) const {
  std::uint32_t passed = 0;
  std::uint32_t begin = region_.begin;
  for (float& score : scores) {
    const std::uint32_t end =
        std::min((begin / shape_.tokens_per_block + 1) * shape_.tokens_per_block, region_.end);
    bool passes = false;
    for (std::uint32_t i = 0; i < shape_.heads_per_group && !passes; ++i) {
      const std::uint32_t head = group * shape_.heads_per_group + i;
      for (std::uint32_t row = 0; row < rows_ && !passes; ++row) {
        for (std::uint32_t t = begin; t < end && !passes; ++t) {
          passes = weight(head, row, t) >= floors_[row_index(head, row)];
        }
      }
    }
    if (!passes) score = 0.0f;
    passed += passes ? 1 : 0;
    begin = end;
  }
  return passed;
}

Status TokenScores::rank(const SelectRequest& request, std::span<GroupSelection> selection,
                         WorkerPool& pool) {
  struct Ranking {
    const SelectRequest& request;
    std::span<GroupSelection> selection;
  } ranking{request, selection};
  pool.run(selection.size(), [this, &ranking](std::size_t i) {
    const std::span scores = score_group(static_cast<std::uint32_t>(i));
    if (!all_finite(scores)) return;
    GroupSelection& result = ranking.selection[i];
    if (shape_.reduction != GroupReduction::kMean) result.mass = sum_of(scores);
    const bool gated = options_.threshold > 0.0f;
    const std::uint32_t passed = gated ? drop_what_fails(static_cast<std::uint32_t>(i), scores) : 0;
    rank_blocks({.scores = scores,
                 .always = {},
                 .region = region_,
                 .tokens_per_block = shape_.tokens_per_block,
                 .far_budget_tokens = far_budget_tokens(shape_, ranking.request),
                 .band_tokens = ranking.request.band_tokens},
                order_[i], result);
    if (gated) result.chosen = std::min(result.chosen, passed);
  });
  for (std::size_t i = 0; i < selection.size(); ++i) {
    if (all_finite(block_scores(static_cast<std::uint32_t>(i)))) continue;
    return invalid_argument(fmt::format("scores of head group {} at position {} overflow float32",
                                        i, request.first_position));
  }
  return {};
}

std::span<float> TokenScores::score_group(std::uint32_t group) {
  const std::span<float> scores = block_scores(group);
  if (shape_.reduction == GroupReduction::kMean) {
    mean_logits(group, scores);
    return scores;
  }
  const std::span head_scores(head_scores_[group].data(), scores.size());
  std::ranges::fill(scores, 0.0f);
  const bool largest = shape_.reduction == GroupReduction::kMax;
  for (std::uint32_t i = 0; i < shape_.heads_per_group; ++i) {
    const std::uint32_t head = group * shape_.heads_per_group + i;
    for (std::uint32_t h = 0; h < shape_.queries_per_kv_head; ++h) {
      // Added over the queries of a head, then reduced over the heads.
      if (largest) std::ranges::fill(head_scores, 0.0f);
      for (std::uint32_t row = h; row < rows_; row += shape_.queries_per_kv_head) {
        add_row(head, row, largest ? head_scores : scores);
      }
      if (!largest) continue;
      for (std::size_t b = 0; b < scores.size(); ++b) {
        scores[b] = std::max(scores[b], head_scores[b]);
      }
    }
  }
  return scores;
}

void TokenScores::add_row(std::uint32_t head, std::uint32_t row, std::span<float> target) const {
  if (target.empty()) return;
  const float* weights = cells(head, row);
  const float* scales = slice_scales(head, row);
  const std::uint32_t per_block = shape_.tokens_per_block / cell_tokens_;
  const std::uint32_t per_slice = kSliceTokens / cell_tokens_;
  const std::uint32_t first_block = region_.begin / shape_.tokens_per_block;
  const std::uint32_t end = (region_.end - 1) / cell_tokens_ + 1;
  for (std::uint32_t cell = region_.begin / cell_tokens_; cell < end;) {
    const std::uint32_t slice = cell / per_slice;
    const std::uint32_t slice_end = std::min(end, (slice + 1) * per_slice);
    const float scale = scales[slice];
    if (per_block == 1) {
      float* scores = target.data() - first_block;
      for (; cell < slice_end; ++cell) scores[cell] += scale * weights[cell];
      continue;
    }
    while (cell < slice_end) {
      const std::uint32_t block = cell / per_block;
      const std::uint32_t block_end = std::min(slice_end, (block + 1) * per_block);
      float sum = 0.0f;
      for (; cell < block_end; ++cell) sum += weights[cell];
      target[block - first_block] += scale * sum;
    }
  }
}

void TokenScores::mean_logits(std::uint32_t group, std::span<float> target) const {
  const std::uint32_t per_block = shape_.tokens_per_block;
  std::uint32_t t = region_.begin;
  for (float& score : target) {
    const std::uint32_t begin = t;
    const std::uint32_t end = std::min((t / per_block + 1) * per_block, region_.end);
    const std::uint32_t last_cell = (end - 1) / cell_tokens_;
    double sum = 0.0;
    for (std::uint32_t i = 0; i < shape_.heads_per_group; ++i) {
      const std::size_t head = std::size_t{group} * shape_.heads_per_group + i;
      for (std::uint32_t cell = begin / cell_tokens_; cell <= last_cell; ++cell) {
        sum += double{logits_[head * cells_max_ + cell]};
      }
    }
    const double logits = double(end - begin) * double(rows_) * double(shape_.heads_per_group);
    score = static_cast<float>(sum / logits);
    t = end;
  }
}

}  // namespace kvtier
