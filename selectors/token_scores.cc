#include "selectors/token_scores.h"

#include "kernels/weigh_cells.h"
#include "selectors/rank_blocks.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numeric>

namespace kvtier {
namespace {

float sum_of(std::span<const float> values) {
  return std::accumulate(values.begin(), values.end(), 0.0f);
}

}  // namespace

TokenScores::TokenScores(const SelectorShape& shape, std::uint32_t runs_max,
                         std::uint32_t value_tokens)
    : shape_(shape),
      value_tokens_(value_tokens),
      cell_tokens_(
          std::gcd(shape.tokens_per_block, value_tokens == 0 ? kSliceTokens : value_tokens)),
      cells_max_(shape.tokens_max / cell_tokens_ + 1),
      slices_max_(shape.tokens_max / kSliceTokens + 1),
      groups_max_(value_tokens == 0 ? 0 : shape.tokens_max / value_tokens + 1),
      sink_logits_(shape, shape.kv_heads, std::min(shape.sinks, shape.tokens_max)),
      open_logits_(shape, shape.kv_heads, KeyCodes::kRunTokens),
      views_(shape.kv_heads),
      task_finite_(std::size_t{shape.kv_heads} * slices_max_),
      logits_(shape.reduction == GroupReduction::kMean ? std::size_t{shape.kv_heads} * cells_max_
                                                       : 0),
      block_scores_(shape.head_groups()),
      head_scores_(shape.head_groups()),
      order_(shape.head_groups()),
      chosen_(value_tokens == 0 ? 0 : shape.head_groups()) {
  KVTIER_CHECK(value_tokens == 0 || kSliceTokens % value_tokens == 0,
               "value groups of {} tokens, expected a power of two up to {}", value_tokens,
               kSliceTokens);
  KVTIER_CHECK(runs_max <= shape.tokens_max / KeyCodes::kRunTokens, "{} runs of {} tokens",
               runs_max, shape.tokens_max);
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

Status TokenScores::score_exact(const SelectRequest& request, const CodedKeys& keys,
                                WorkerPool& pool) {
  const std::uint32_t visible =
      std::min(request.first_position + request.query_count, keys.tokens());
  for (std::uint32_t head = 0; head < shape_.kv_heads; ++head) views_[head] = keys.sinks(head);
  sink_count_ = static_cast<std::uint32_t>(views_[0].rows);
  KVTIER_RETURN_IF_ERROR(sink_logits_.compute(request, 0, views_, pool));
  open_first_ = keys.coded_tokens();
  if (visible <= open_first_) return {};
  for (std::uint32_t head = 0; head < shape_.kv_heads; ++head) {
    views_[head] = keys.open(head, visible);
  }
  return open_logits_.compute(request, 0, views_, pool);
}

Status TokenScores::compute(const SelectRequest& request, const CodedKeys& keys,
                            const CoarseTokens* coarse, WorkerPool& pool) {
  region_ = FarRegion::of(shape_, request.first_position);
  KVTIER_CHECK(region_.end <= keys.tokens(), "tokens to {} are to be ranked, {} were appended",
               region_.end, keys.tokens());
  visible_ = std::min(request.first_position + request.query_count, keys.tokens());
  reserve_rows(request.query_count * shape_.queries_per_kv_head);
  pack_queries(request);
  if (coarse == nullptr) KVTIER_RETURN_IF_ERROR(score_exact(request, keys, pool));
  slice_count_ = (visible_ + kSliceTokens - 1) / kSliceTokens;
  const std::uint32_t tasks = shape_.kv_heads * slice_count_;
  Step step{request, keys, coarse, tasks};
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
  Piece piece{.head = task / slice_count_,
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
    fill_logits(step, piece);
    for (std::uint32_t r = 0; r < piece.rows; ++r) finite = weigh_row(step, piece, r) && finite;
  }
  task_finite_[task] = finite ? 1 : 0;
}

void TokenScores::fill_logits(const Step& step, const Piece& piece) {
  const CodedKeys& keys = step.keys;
  const std::uint32_t first_run = piece.first_token / KeyCodes::kRunTokens;
  const std::uint32_t end_run =
      std::min(keys.runs(), (piece.end_token + KeyCodes::kRunTokens - 1) / KeyCodes::kRunTokens);
  if (first_run < end_run) {
    const std::uint8_t* tiles = nullptr;
    if (step.coarse != nullptr) {
      tiles = step.coarse->tiles[piece.head / shape_.heads_per_group].data() + first_run;
      fill_coarse(step, piece, tiles, end_run - first_run);
    }
    score_codes(
        shape_.softmax,
        {.codes = keys.codes(),
         .runs = keys.run(piece.head, first_run),
         .run_count = end_run - first_run,
         .tiles = tiles,
         .queries = packed_.data() + row_index(piece.head, piece.first_row) * shape_.head_dim,
         .query_stride = shape_.head_dim,
         .query_count = piece.rows,
         .logits = piece.logits,
         .logit_stride = kSliceTokens,
         .goes_on = end_run < keys.runs()});
  }
  const std::uint32_t sinks_end = std::min(sink_count_, piece.end_token);
  const std::uint32_t open_first = std::max(open_first_, piece.first_token);
  for (std::uint32_t r = 0; r < piece.rows; ++r) {
    float* logits = piece.logits + r * kSliceTokens;
    const std::uint32_t row = piece.first_row + r;
    if (piece.first_token < sinks_end) {
      const std::span<const float> exact = sink_logits_.row(piece.head, row, sink_count_);
      std::ranges::copy(exact.subspan(piece.first_token, sinks_end - piece.first_token), logits);
    }
    if (open_first < piece.end_token) {
      const std::span<const float> exact =
          open_logits_.row(piece.head, row, visible_ - open_first_);
      std::ranges::copy(exact.subspan(open_first - open_first_, piece.end_token - open_first),
                        logits + (open_first - piece.first_token));
    }
  }
}

namespace {

/// The logits of the groups that fill a tile, each as often as it has tokens.
template <std::uint32_t kPerGroup>
void repeat(const float* groups, float* logits) {
  for (std::uint32_t g = 0; g < KeyCodes::kTileTokens / kPerGroup; ++g) {
    for (std::uint32_t t = 0; t < kPerGroup; ++t) logits[g * kPerGroup + t] = groups[g];
  }
}

using Repeat = void (*)(const float* groups, float* logits);

/// Null where groups do not fill a tile evenly.
Repeat repeat_for(std::uint32_t per_group) {
  switch (per_group) {
    case 1: return repeat<1>;
    case 2: return repeat<2>;
    case 4: return repeat<4>;
    case 8: return repeat<8>;
    case 16: return repeat<16>;
    default: return nullptr;
  }
}

}  // namespace

/// Gives the tokens of tiles that are not scored the logit of their group.
void TokenScores::fill_coarse(const Step& step, const Piece& piece, const std::uint8_t* tiles,
                              std::uint32_t runs) {
  const std::uint32_t per_group = step.coarse->group_tokens;
  const Repeat whole_tile =
      piece.first_token % KeyCodes::kTileTokens == 0 ? repeat_for(per_group) : nullptr;
  for (std::uint32_t r = 0; r < piece.rows; ++r) {
    const std::span<const float> groups =
        step.coarse->logits->row(piece.head, piece.first_row + r, step.coarse->groups);
    float* logits = piece.logits + r * kSliceTokens;
    for (std::uint32_t tile = 0; tile < runs * KeyCodes::kRunTiles; ++tile) {
      if ((tiles[tile / KeyCodes::kRunTiles] >> tile % KeyCodes::kRunTiles) & 1) continue;
      const std::uint32_t end = (tile + 1) * KeyCodes::kTileTokens;
      if (whole_tile != nullptr && (piece.first_token + end) / per_group <= groups.size()) {
        const std::uint32_t first = end - KeyCodes::kTileTokens;
        whole_tile(groups.data() + (piece.first_token + first) / per_group, logits + first);
        continue;
      }
      for (std::uint32_t t = tile * KeyCodes::kTileTokens; t < end;) {
        const std::uint32_t group = (piece.first_token + t) / per_group;
        const std::uint32_t next = std::min(end, (group + 1) * per_group - piece.first_token);
        // The last run can reach beyond what the queries see, and so beyond the groups.
        const float logit = group < groups.size() ? groups[group] : 0.0f;
        std::fill(logits + t, logits + next, logit);
        t = next;
      }
    }
  }
}

/// Turns a row of logits into weights and adds them up per cell. False if one is not finite.
bool TokenScores::weigh_row(const Step& step, const Piece& piece, std::uint32_t r) {
  const std::uint32_t row = piece.first_row + r;
  float& lse = slice_scales(piece.head, row)[piece.first_token / kSliceTokens];
  // Causality: a draft's earlier query does not see the later tokens.
  const std::uint32_t query = row / shape_.queries_per_kv_head;
  const std::uint32_t sees = std::min(step.request.first_position + query + 1, piece.end_token);
  if (sees <= piece.first_token) {
    lse = kEmptyLse;
    return true;
  }
  CellRow cells_of_row{.logits = piece.logits + r * kSliceTokens,
                       .count = sees - piece.first_token,
                       .cell_tokens = cell_tokens_,
                       .cells = cells(piece.head, row) + piece.first_token / cell_tokens_};
  const std::uint32_t begin = std::max(piece.first_token, region_.begin);
  const std::uint32_t end = std::min(piece.end_token, region_.end);
  if (begin < end) {
    cells_of_row.begin = begin - piece.first_token;
    cells_of_row.end = end - piece.first_token;
  }
  if (shape_.reduction == GroupReduction::kMean) {
    float* sums = logits_.data() + piece.head * std::size_t{cells_max_};
    for (std::uint32_t t = begin; t < end; ++t) {
      sums[t / cell_tokens_] += cells_of_row.logits[t - piece.first_token];
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
}

Status TokenScores::rank(const SelectRequest& request, std::span<GroupSelection> selection,
                         WorkerPool& pool) {
  struct Ranking {
    const SelectRequest& request;
    std::span<GroupSelection> selection;
  } ranking{request, selection};
  pool.run(selection.size(), [this, &ranking](std::size_t i) {
    score_group(static_cast<std::uint32_t>(i));
    const std::span scores(block_scores_[i].data(), block_count(region_, shape_.tokens_per_block));
    if (!all_finite(scores)) return;
    rank_blocks({.scores = scores,
                 .always = {},
                 .region = region_,
                 .tokens_per_block = shape_.tokens_per_block,
                 .far_budget_tokens = far_budget_tokens(shape_, ranking.request),
                 .band_tokens = ranking.request.band_tokens},
                order_[i], ranking.selection[i]);
    if (shape_.reduction != GroupReduction::kMean) {
      ranking.selection[i].mass = sum_of(scores);
    }
  });
  for (std::size_t i = 0; i < selection.size(); ++i) {
    const std::size_t blocks = block_count(region_, shape_.tokens_per_block);
    if (all_finite(std::span(block_scores_[i].data(), blocks))) continue;
    return invalid_argument(fmt::format("scores of head group {} at position {} overflow float32",
                                        i, request.first_position));
  }
  return {};
}

void TokenScores::score_group(std::uint32_t group) {
  const std::size_t blocks = block_count(region_, shape_.tokens_per_block);
  const std::span scores(block_scores_[group].data(), blocks);
  if (shape_.reduction == GroupReduction::kMean) return mean_logits(group, scores);
  const std::span head_scores(head_scores_[group].data(), blocks);
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
      for (std::size_t b = 0; b < blocks; ++b) scores[b] = std::max(scores[b], head_scores[b]);
    }
  }
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
