#pragma once

#include "selectors/selector.h"

#include <cstddef>
#include <cstdint>
#include <span>

namespace kvtier {

/// Turns one score per block of the far region into a ranked, budgeted selection: the last part of
/// every block selector, so that all of them share one meaning of "budget".
///
/// `scores[i]` belongs to block `first_block + i`, the blocks that `region` touches, in order.
/// `always` (may be empty) marks blocks that come first whatever their score; they are counted in
/// the budget and reported as held, best first, as far as the budget goes.
/// Blocks are taken best first (ties: earlier block) while they fit; the first that does not fit
/// whole ends the choice and begins the band, which ends in the same way. `order` is scratch of at
/// least scores.size() elements. No allocation once `result.ranked` has its capacity.
struct RankInput {
  std::span<const float> scores;
  std::span<const std::uint8_t> always;
  FarRegion region;
  std::uint32_t tokens_per_block = 8;
  std::uint32_t far_budget_tokens = 0;
  std::uint32_t band_tokens = 0;
};
void rank_blocks(const RankInput& input, std::span<std::uint32_t> order, GroupSelection& result);

/// Tokens that a selector ranks as one, of any length: a sentence, a chunk, a cluster's run.
struct RankedRange {
  std::uint32_t begin = 0;
  std::uint32_t end = 0;
  float score = 0.0f;
};
/// The same for units of variable length: `best_first` are disjoint ranges of the far region, cut
/// into pieces of blocks. The range at which the budget ends is cut there to the token, and what is
/// left of it begins the band. A piece is a unit; several can be parts of one block.
void rank_ranges(std::span<const RankedRange> best_first, std::uint32_t tokens_per_block,
                 std::uint32_t far_budget_tokens, std::uint32_t band_tokens,
                 GroupSelection& result);

/// Checks what every selector must check: finite queries, a budget that covers sinks and window.
Status check_request(const SelectorShape& shape, const SelectRequest& request);
/// Tokens left for the far region; at most what the region holds.
std::uint32_t far_budget_tokens(const SelectorShape& shape, const SelectRequest& request);

/// Sinks, and the windows of all queries together: what is attended whatever is selected.
std::uint32_t always_attended_tokens(const SelectorShape& shape, const SelectRequest& request);

/// How many blocks a region touches.
std::uint32_t block_count(FarRegion region, std::uint32_t tokens_per_block);

/// Empties one selection per head group and reserves what the longest context can need, so that
/// later calls with the same vectors allocate nothing.
/// `units_max`: most units that a group can be answered with; 0 for one per block.
void reserve_selection(const SelectorShape& shape, std::span<GroupSelection> selection,
                       std::size_t units_max = 0);

/// Mass of a step: reduces per-token attention weights [queries * heads, tokens] of one head group
/// (row = query * heads + head; column = position, from 0) into one score per block of the region,
/// as the oracle does. Shared with the measurements of a replay.
///
/// A row's weights in a block are added, then the queries of a head, then the heads: their largest
/// under `kMax`, their sum otherwise. `kMean` has no weights of its own (it means raw logits), so
/// what a choice under it is worth is measured by the sum.
void reduce_token_weights(std::span<const float> weights, std::size_t rows, std::size_t row_stride,
                          FarRegion region, std::uint32_t tokens_per_block,
                          GroupReduction reduction, std::span<float> scores,
                          std::size_t queries = 1);

}  // namespace kvtier
