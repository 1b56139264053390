#include "selectors/rank_blocks.h"

#include "kernels/partial_attention.h"
#include "kernels/top_k.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstddef>

namespace kvtier {
namespace {

/// The part of a block that lies in the region.
SelectedUnit unit_of(const RankInput& input, std::uint32_t block, float score) {
  const std::uint32_t start = block * input.tokens_per_block;
  const std::uint32_t first = std::max(start, input.region.begin);
  const std::uint32_t last = std::min(start + input.tokens_per_block, input.region.end);
  return {BlockIndex(block), first - start, last - first, score};
}

bool is_always(const RankInput& input, std::size_t i) {
  return !input.always.empty() && input.always[i] != 0;
}

/// Units taken so far, and whether the next still fits: the budget first, then the band.
struct Cut {
  std::uint64_t tokens = 0;
  std::uint64_t limit = 0;
  std::uint64_t band = 0;
  bool in_band = false;

  bool take(const SelectedUnit& unit) {
    if (tokens + unit.tokens > limit && !in_band) {
      in_band = true;
      limit += band;
    }
    if (tokens + unit.tokens > limit) return false;
    tokens += unit.tokens;
    return true;
  }
};

}  // namespace

FarRegion FarRegion::of(const SelectorShape& shape, std::uint32_t first_position) {
  const std::uint32_t visible = first_position + 1;
  const std::uint32_t begin = std::min(shape.sinks, visible);
  const std::uint32_t before_window = visible - std::min(shape.window, visible);
  return {begin, std::max(begin, before_window)};
}

std::uint32_t block_count(FarRegion region, std::uint32_t tokens_per_block) {
  if (region.tokens() == 0) return 0;
  return (region.end - 1) / tokens_per_block - region.begin / tokens_per_block + 1;
}

void rank_blocks(const RankInput& input, std::span<std::uint32_t> order, GroupSelection& result) {
  result.ranked.clear();
  result.chosen = 0;
  result.held = 0;
  const std::size_t blocks = block_count(input.region, input.tokens_per_block);
  KVTIER_CHECK(input.scores.size() == blocks && order.size() >= blocks,
               "{} scores and {} places for the {} blocks of [{}, {})", input.scores.size(),
               order.size(), blocks, input.region.begin, input.region.end);
  KVTIER_CHECK(input.always.empty() || input.always.size() == blocks, "{} marks for {} blocks",
               input.always.size(), blocks);
  if (blocks == 0) return;
  const std::uint32_t first_block = input.region.begin / input.tokens_per_block;
  Cut cut{.limit = input.far_budget_tokens, .band = input.band_tokens};

  // The marked ones first: few, so they are sorted where they will stay.
  for (std::size_t i = 0; i < input.always.size(); ++i) {
    if (!is_always(input, i)) continue;
    result.ranked.push_back(
        unit_of(input, first_block + static_cast<std::uint32_t>(i), input.scores[i]));
  }
  const std::size_t marked = result.ranked.size();
  std::ranges::sort(result.ranked, [](const SelectedUnit& a, const SelectedUnit& b) {
    return a.score != b.score ? a.score > b.score : a.block < b.block;
  });
  std::size_t kept = 0;
  while (kept < marked && cut.take(result.ranked[kept]) && !cut.in_band) ++kept;
  if (kept < marked) {
    // The budget ended among the marked: no band, since what comes next is still one of them.
    result.ranked.resize(kept);
    result.held = result.chosen = static_cast<std::uint32_t>(kept);
    return;
  }
  result.held = static_cast<std::uint32_t>(marked);
  result.chosen = result.held;

  // At most two blocks are cut by the region's edges, and one more ends the list.
  const std::uint64_t wanted =
      (std::uint64_t{input.far_budget_tokens} + input.band_tokens) / input.tokens_per_block + 3;
  const std::size_t k = static_cast<std::size_t>(std::min<std::uint64_t>(blocks, wanted + marked));
  for (std::uint32_t i : top_k(input.scores, k, order)) {
    if (is_always(input, i)) continue;
    const SelectedUnit unit = unit_of(input, first_block + i, input.scores[i]);
    if (!cut.take(unit)) break;
    result.ranked.push_back(unit);
    if (!cut.in_band) ++result.chosen;
  }
}

std::uint32_t always_attended_tokens(const SelectorShape& shape, const SelectRequest& request) {
  return request.first_position + request.query_count -
         FarRegion::of(shape, request.first_position).tokens();
}

void rank_ranges(std::span<const RankedRange> best_first, std::uint32_t tokens_per_block,
                 std::uint32_t far_budget_tokens, std::uint32_t band_tokens,
                 GroupSelection& result) {
  result.ranked.clear();
  result.chosen = 0;
  result.held = 0;
  std::uint64_t left = std::uint64_t{far_budget_tokens} + band_tokens;
  for (const RankedRange& range : best_first) {
    for (std::uint32_t begin = range.begin; begin < range.end && left > 0;) {
      const std::uint32_t block = begin / tokens_per_block;
      std::uint64_t take = std::min(range.end, (block + 1) * tokens_per_block) - begin;
      // Two cuts: where the budget ends, and where the band does.
      const std::uint64_t of_budget = left > band_tokens ? left - band_tokens : 0;
      take = std::min(take, of_budget > 0 ? of_budget : left);
      result.ranked.push_back({BlockIndex(block), begin - block * tokens_per_block,
                               static_cast<std::uint32_t>(take), range.score});
      if (of_budget > 0) ++result.chosen;
      begin += static_cast<std::uint32_t>(take);
      left -= take;
    }
  }
}

Status check_request(const SelectorShape& shape, const SelectRequest& request) {
  if (request.query_count == 0 || request.query_count > kMaxStepQueries) {
    return invalid_argument(fmt::format("select: {} queries in one step, expected 1 to {}",
                                        request.query_count, kMaxStepQueries));
  }
  const std::uint32_t always = always_attended_tokens(shape, request);
  if (request.budget_tokens < always) {
    return invalid_argument(
        fmt::format("select: a budget of {} tokens does not cover the {} always attended ({} sinks "
                    "and a window of {} behind each of {} queries)",
                    request.budget_tokens, always, shape.sinks, shape.window, request.query_count));
  }
  const std::size_t elements = std::size_t{shape.query_heads()} * shape.head_dim;
  for (std::uint32_t q = 0; q < request.query_count; ++q) {
    const float* query = request.queries + q * request.query_stride;
    for (std::size_t i = 0; i < elements; ++i) {
      if (!std::isfinite(query[i])) {
        return invalid_argument(fmt::format(
            "select: query {} (position {}), head {}, element {} is {}, expected a finite number",
            q, request.first_position + q, i / shape.head_dim, i % shape.head_dim, query[i]));
      }
    }
  }
  return {};
}

std::uint32_t far_budget_tokens(const SelectorShape& shape, const SelectRequest& request) {
  const FarRegion region = FarRegion::of(shape, request.first_position);
  const std::uint32_t always = always_attended_tokens(shape, request);
  KVTIER_CHECK(request.budget_tokens >= always, "a budget of {} tokens for {} always attended",
               request.budget_tokens, always);
  return std::min(request.budget_tokens - always, region.tokens());
}

void reserve_selection(const SelectorShape& shape, std::span<GroupSelection> selection,
                       std::size_t units_max) {
  KVTIER_CHECK(selection.size() == shape.head_groups(), "{} selections for {} head groups",
               selection.size(), shape.head_groups());
  const std::size_t blocks_max = shape.tokens_max / shape.tokens_per_block + 1;
  for (GroupSelection& group : selection) {
    group.ranked.clear();
    group.ranked.reserve(units_max == 0 ? blocks_max : units_max);
    group.chosen = 0;
    group.held = 0;
    group.mass = 0.0f;
  }
}

void reduce_token_weights(std::span<const float> weights, std::size_t rows, std::size_t row_stride,
                          FarRegion region, std::uint32_t tokens_per_block,
                          GroupReduction reduction, std::span<float> scores, std::size_t queries) {
  const std::uint32_t blocks = block_count(region, tokens_per_block);
  KVTIER_CHECK(scores.size() == blocks && queries > 0 && rows % queries == 0,
               "{} scores for {} blocks; {} rows of {} queries", scores.size(), blocks, rows,
               queries);
  if (blocks == 0) return;
  KVTIER_CHECK(rows == 0 || weights.size() >= (rows - 1) * row_stride + region.end,
               "{} weights for {} rows of {}", weights.size(), rows, region.end);
  const std::size_t heads = rows / queries;
  std::uint32_t begin = region.begin;
  for (std::uint32_t b = 0; b < blocks; ++b) {
    const std::uint32_t next = (begin / tokens_per_block + 1) * tokens_per_block;
    const std::uint32_t end = std::min(next, region.end);
    float pooled = 0.0f;
    for (std::size_t head = 0; head < heads; ++head) {
      float mass = 0.0f;
      for (std::size_t q = 0; q < queries; ++q) {
        const float* row = weights.data() + (q * heads + head) * row_stride;
        for (std::uint32_t t = begin; t < end; ++t) mass += row[t];
      }
      pooled = reduction == GroupReduction::kMax ? std::max(pooled, mass) : pooled + mass;
    }
    scores[b] = pooled;
    begin = end;
  }
}

}  // namespace kvtier
