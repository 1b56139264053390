#pragma once

#include "kernels/merge_states.h"
#include "selectors/group_rows.h"
#include "selectors/rank_blocks.h"
#include "selectors/selector.h"
#include "selectors/token_logits.h"

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace kvtier {

/// The attention weight of every token of one step, from logits that a `TokenLogits` gives: what
/// selectors that score single tokens rank blocks by, and what the estimate of the rest is made
/// from.
///
/// The softmax of a query runs over all tokens that it sees, as the oracle's: a head that looks at
/// its sinks says little about the rest, and its far weights must be as small as they are before
/// heads are added.
///
/// Tokens are worked on in slices that depend on the context alone, so that one thread and many
/// give the same bits. Weights are kept per cell: the largest piece of which both blocks and value
/// groups are made of (their common divisor), relative to the slice's own log-sum-exp:
///   weight of a cell = cells_[..][cell] * exp(lse of the slice - lse of the query).
/// That is what the rest needs and an eighth of the logits for blocks of eight tokens.
///
/// Scratch only; allocates when a step has more queries than any before. One thread at a time.
class TokenScores {
 public:
  struct Options {
    /// Tokens of a value group, a power of two up to 512; 0 if nothing is estimated.
    std::uint32_t value_tokens = 0;
    /// Sinks and window take part in the softmax, so that a weight estimates attention mass; else
    /// the far region's tokens share the whole weight among themselves.
    bool everyone = true;
    /// When positive: a token passes if for some query its weight is at least this part of what
    /// sinks and window get together, and blocks in which none passes are not chosen. Not under
    /// `kMean`, which has no weights.
    float threshold = 0.0f;
  };
  TokenScores(const SelectorShape& shape, const Options& options);

  /// Weighs every token for the queries of `request`; `tokens` have been appended.
  /// `invalid_argument` when logits overflow.
  Status compute(const SelectRequest& request, std::uint32_t tokens, TokenLogits& source,
                 WorkerPool& pool);

  /// Ranks the far blocks by their weight, reduced as the shape says (under `kMean` by their mean
  /// logit). Follows `compute`; refuses logits that are not finite.
  Status rank(const SelectRequest& request, std::span<GroupSelection> selection, WorkerPool& pool);

  /// `Selector::estimate_rest`: the weight of the far tokens that are not chosen, summed per value
  /// group, times the group's mean value. A group of which some tokens are chosen counts with the
  /// weights of the others only, and still with the mean over all its tokens: the mean over the
  /// others would need the values of the chosen, which are not here.
  void estimate_rest(const SelectRequest& request, std::span<const GroupSelection> selection,
                     GroupRows& values, StatesView target, WorkerPool& pool);

  /// Adds the weights up: the scores of a head group's far blocks, for who ranks them otherwise.
  /// Follows `compute`; head groups may be asked for side by side.
  std::span<float> score_group(std::uint32_t group);

 private:
  static constexpr std::uint32_t kSliceTokens = kCellRowTokens;
  /// Neighbouring slices that one worker weighs, so that the next one's codes are fetched by it.
  static constexpr std::uint32_t kTaskSlices = 4;
  /// Queries whose logits of a slice lie on the stack together.
  static constexpr std::uint32_t kPieceRows = 8;

  /// What the workers share in one call of `compute`.
  struct Step {
    const SelectRequest& request;
    TokenLogits& source;
    std::uint32_t tasks;  ///< Slices of all heads.
  };

  void reserve_rows(std::uint32_t rows);
  void pack_queries(const SelectRequest& request);
  void weigh_slice(const Step& step, std::uint32_t task);
  bool weigh_row(const SelectRequest& request, const TokenPiece& piece, std::uint32_t row);
  void scale_row(std::uint32_t head, std::uint32_t row);
  void set_floor(std::uint32_t head, std::uint32_t row);
  std::uint32_t drop_what_fails(std::uint32_t group, std::span<float> scores) const;
  std::span<float> block_scores(std::uint32_t group) {
    return {block_scores_[group].data(), block_count(region_, shape_.tokens_per_block)};
  }
  void add_row(std::uint32_t head, std::uint32_t row, std::span<float> target) const;
  void mean_logits(std::uint32_t group, std::span<float> target) const;
  void mark_chosen(std::uint32_t group, const GroupSelection& selection);
  double rest_of_row(std::uint32_t head, std::uint32_t row);
  void estimate_head(const SelectRequest& request, const GroupRows& values, StatesView target,
                     std::uint32_t head);

  std::size_t row_index(std::uint32_t head, std::uint32_t row) const {
    return std::size_t{head} * rows_ + row;
  }
  float* cells(std::uint32_t head, std::uint32_t row) {
    return cells_.data() + row_index(head, row) * cells_max_;
  }
  const float* cells(std::uint32_t head, std::uint32_t row) const {
    return cells_.data() + row_index(head, row) * cells_max_;
  }
  float* slice_scales(std::uint32_t head, std::uint32_t row) {
    return slices_.data() + row_index(head, row) * slices_max_;
  }
  const float* slice_scales(std::uint32_t head, std::uint32_t row) const {
    return slices_.data() + row_index(head, row) * slices_max_;
  }

  /// Where a cell is a token.
  float weight(std::uint32_t head, std::uint32_t row, std::uint32_t token) const {
    return cells(head, row)[token] * slice_scales(head, row)[token / kSliceTokens];
  }

  SelectorShape shape_;
  Options options_;
  std::uint32_t cell_tokens_;
  std::uint32_t cells_max_;
  std::uint32_t slices_max_;
  std::uint32_t groups_max_;  ///< Value groups.
  std::vector<std::uint8_t> task_finite_;

  // Of the step last computed.
  FarRegion region_;
  std::uint32_t first_position_ = 0;
  std::uint32_t visible_ = 0;  ///< To the last query.
  std::uint32_t rows_ = 0;     ///< Queries times query heads per KV head.
  std::uint32_t slice_count_ = 0;

  std::uint32_t rows_max_ = 0;
  FixedArray<float> packed_;   ///< [KV heads, rows, head_dim]
  FixedArray<float> cells_;    ///< [KV heads, rows, cells_max]
  FixedArray<float> slices_;   ///< [KV heads, rows, slices_max]: lse, then exp(lse - total).
  FixedArray<float> lse_;      ///< [KV heads, rows]
  FixedArray<float> floors_;   ///< [KV heads, rows]
  FixedArray<float> rest_;     ///< [KV heads, rows, groups_max]
  std::vector<float> logits_;  ///< [KV heads, cells_max]: sums over rows and tokens, for `kMean`.
  std::vector<std::vector<float>> block_scores_;  ///< Per head group.
  std::vector<std::vector<float>> head_scores_;
  std::vector<std::vector<std::uint32_t>> order_;
  std::vector<std::vector<std::uint8_t>> chosen_;  ///< [head groups][cells_max]
};

}  // namespace kvtier
