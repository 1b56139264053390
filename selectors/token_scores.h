#pragma once

#include "kernels/merge_states.h"
#include "kernels/weigh_cells.h"
#include "selectors/coded_keys.h"
#include "selectors/group_rows.h"
#include "selectors/selector.h"
#include "selectors/step_logits.h"

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace kvtier {

/// What a two-stage selector knows of the tokens whose codes are not read.
struct CoarseTokens {
  /// Per head group and run: bit t is set when tile t is scored by its codes.
  /// [head groups][runs]
  std::span<const std::vector<std::uint8_t>> tiles;
  /// Otherwise the logit of a token is that of its group of `group_tokens`: [queries, groups] per
  /// KV head, as `StepLogits` keeps them.
  StepLogits* logits = nullptr;
  std::uint32_t group_tokens = 0;
  std::uint32_t groups = 0;
};

/// The attention weight of every token of one step, estimated from coded keys: what `scan` and
/// `two-stage` rank blocks by, and what the estimate of the rest is made from.
///
/// Sinks and the tokens of the open run are scored exactly, the others by their codes or, where
/// `CoarseTokens` says so, by what stands for their group. The softmax of a query runs over all
/// tokens that it sees, as the oracle's: a head that looks at its sinks says little about the rest,
/// and its far weights must be as small as they are before heads are added.
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
  /// `value_tokens`: tokens of a value group, a power of two up to 512; 0 if nothing is estimated.
  TokenScores(const SelectorShape& shape, std::uint32_t runs_max, std::uint32_t value_tokens);

  /// Weighs every token for the queries of `request`. `coarse` may be null.
  Status compute(const SelectRequest& request, const CodedKeys& keys, const CoarseTokens* coarse,
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

  /// The sinks' logits of KV head `head`, row as in `StepLogits`. Follows `score_exact`.
  std::span<const float> sink_logits(std::uint32_t head, std::uint32_t row) {
    return sink_logits_.row(head, row, sink_count_);
  }
  /// Scores sinks and open run; `compute` does so unless it was done for this request.
  Status score_exact(const SelectRequest& request, const CodedKeys& keys, WorkerPool& pool);

 private:
  static constexpr std::uint32_t kSliceTokens = kCellRowTokens;
  /// Neighbouring slices that one worker weighs, so that the next one's codes are fetched by it.
  static constexpr std::uint32_t kTaskSlices = 4;
  /// Queries whose logits of a slice lie on the stack together.
  static constexpr std::uint32_t kPieceRows = 8;

  /// What the workers share in one call of `compute`.
  struct Step {
    const SelectRequest& request;
    const CodedKeys& keys;
    const CoarseTokens* coarse;
    std::uint32_t tasks;  ///< Slices of all heads.
  };
  /// Some rows of one head in one slice.
  struct Piece {
    std::uint32_t head = 0;
    std::uint32_t first_token = 0;
    std::uint32_t end_token = 0;
    std::uint32_t first_row = 0;
    std::uint32_t rows = 0;
    float* logits = nullptr;  ///< [rows, kSliceTokens]
  };

  void reserve_rows(std::uint32_t rows);
  void pack_queries(const SelectRequest& request);
  void weigh_slice(const Step& step, std::uint32_t task);
  void fill_logits(const Step& step, const Piece& piece);
  void fill_coarse(const Step& step, const Piece& piece, const std::uint8_t* tiles,
                   std::uint32_t runs);
  bool weigh_row(const Step& step, const Piece& piece, std::uint32_t row);
  void scale_row(std::uint32_t head, std::uint32_t row);
  void score_group(std::uint32_t group);
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

  SelectorShape shape_;
  std::uint32_t value_tokens_;
  std::uint32_t cell_tokens_;
  std::uint32_t cells_max_;
  std::uint32_t slices_max_;
  std::uint32_t groups_max_;  ///< Value groups.
  StepLogits sink_logits_;
  StepLogits open_logits_;
  std::vector<RowsView> views_;
  std::vector<std::uint8_t> task_finite_;

  // Of the step last computed.
  FarRegion region_;
  std::uint32_t visible_ = 0;  ///< To the last query.
  std::uint32_t rows_ = 0;     ///< Queries times query heads per KV head.
  std::uint32_t slice_count_ = 0;
  std::uint32_t sink_count_ = 0;
  std::uint32_t open_first_ = 0;

  std::uint32_t rows_max_ = 0;
  FixedArray<float> packed_;   ///< [KV heads, rows, head_dim]
  FixedArray<float> cells_;    ///< [KV heads, rows, cells_max]
  FixedArray<float> slices_;   ///< [KV heads, rows, slices_max]: lse, then exp(lse - total).
  FixedArray<float> lse_;      ///< [KV heads, rows]
  FixedArray<float> rest_;     ///< [KV heads, rows, groups_max]
  std::vector<float> logits_;  ///< [KV heads, cells_max]: sums over rows and tokens, for `kMean`.
  std::vector<std::vector<float>> block_scores_;  ///< Per head group.
  std::vector<std::vector<float>> head_scores_;
  std::vector<std::vector<std::uint32_t>> order_;
  std::vector<std::vector<std::uint8_t>> chosen_;  ///< [head groups][cells_max]
};

}  // namespace kvtier
