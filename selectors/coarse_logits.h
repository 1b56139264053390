#pragma once

#include "selectors/coded_means.h"
#include "selectors/group_rows.h"
#include "selectors/step_logits.h"

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

namespace kvtier {

/// What `two-stage` keeps of every group of tokens for its first stage, and the two logits that
/// come of it at a step: of the mean key, which stands for the group's tokens wherever their codes
/// are not read, and the one that groups are ranked by.
///
/// Means are coded, so that groups can be small, or kept in the keys' type; boxes around the keys,
/// for the upper bound of their logits (Quest), are always kept in the keys' type: their corners
/// then are keys' elements and nothing need be rounded outwards.
///
/// Allocates when made, and when a step has more queries than any before. One thread at a time,
/// except that the rows of different heads may be asked for side by side.
class CoarseLogits {
 public:
  /// By what groups are ranked: mean, bound, or the average of both.
  enum class Rule : unsigned char { kMean, kMinMax, kMeanMinMax };
  struct Options {
    Rule rule = Rule::kMean;
    std::uint32_t group_tokens = 2;
    std::uint32_t mean_bits = 2;  ///< 2, 4, or 0 for the keys' own type; 0 for rules with boxes.
  };

  CoarseLogits(const SelectorShape& shape, const Options& options);

  void append(const NewTokens& tokens);
  void truncate(std::uint32_t position);
  std::uint32_t truncate_floor(std::uint32_t position) const;
  void save(StateWriter& writer) const;
  Status restore(StateReader& reader);
  std::size_t metadata_bytes() const;

  std::uint32_t group_tokens() const { return options_.group_tokens; }
  /// Most groups there can be, the open one included.
  std::uint32_t groups_max() const { return groups_max_; }

  /// Logits, without the cap, of the groups that hold tokens [0, visible).
  Status compute(const SelectRequest& request, std::uint32_t visible, WorkerPool& pool);

  /// Follows `compute`. Makes of the logits of some groups of one row (as in `StepLogits`) what
  /// they are ranked by, and caps them where the shape has a cap, in place. False when one is not
  /// finite. To be called once per group, row and step.
  bool finish(std::uint32_t head, std::uint32_t row, std::uint32_t first, std::uint32_t count);
  /// What groups are ranked by, once they are finished.
  std::span<const float> ranks(std::uint32_t head, std::uint32_t row, std::uint32_t groups) {
    return bounds_ ? bounds_->row(head, row, groups) : means_.row(head, row, groups);
  }
  /// The mean logits, capped once they are finished.
  StepLogits& means() { return means_; }

 private:
  Status compute_bounds(const SelectRequest& request, std::uint32_t groups, WorkerPool& pool);

  SelectorShape shape_;
  Options options_;
  std::uint32_t groups_max_;
  std::optional<CodedMeans> coded_;  ///< Either this or
  std::optional<GroupRows> rows_;    ///< this.
  StepLogits means_;
  std::optional<StepLogits> bounds_;
  std::vector<RowsView> views_;
  std::vector<float> split_;  ///< Queries split by sign, for the boxes.
};

}  // namespace kvtier
