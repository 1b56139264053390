#pragma once

#include "selectors/coded_keys.h"
#include "selectors/step_logits.h"
#include "selectors/token_logits.h"

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

/// The logits of `scan` and `two-stage`: sinks and the tokens of the open run exactly, the others
/// by their codes or, where `CoarseTokens` says so, by what stands for their group.
///
/// Scratch only, beside the keys that it is given; allocates when a step has more queries than any
/// before. One thread at a time, `fill` apart.
class CodedLogits final : public TokenLogits {
 public:
  explicit CodedLogits(const SelectorShape& shape);

  /// For the steps to come until it is called again; both must stay. `coarse` may be null: every
  /// token is scored by its codes.
  void use(const CodedKeys& keys, const CoarseTokens* coarse) {
    keys_ = &keys;
    coarse_ = coarse;
  }

  /// Scores sinks and open run; `prepare` does so unless it was done for this step by hand.
  Status score_exact(const SelectRequest& request, const CodedKeys& keys, WorkerPool& pool);
  /// The sinks' logits of KV head `head`, row as in `StepLogits`. Follows `score_exact`.
  std::span<const float> sink_logits(std::uint32_t head, std::uint32_t row) {
    return sink_logits_.row(head, row, sink_count_);
  }

  Status prepare(const SelectRequest& request, const float* queries, std::uint32_t rows,
                 std::uint32_t visible, WorkerPool& pool) override;
  void fill(const TokenPiece& piece) override;

 private:
  void fill_coarse(const TokenPiece& piece, const std::uint8_t* tiles, std::uint32_t runs);

  SelectorShape shape_;
  StepLogits sink_logits_;
  StepLogits open_logits_;
  std::vector<RowsView> views_;
  const CodedKeys* keys_ = nullptr;
  const CoarseTokens* coarse_ = nullptr;
  // Of the step last prepared.
  std::uint32_t sink_count_ = 0;
  std::uint32_t open_first_ = 0;
  std::uint32_t visible_ = 0;
};

}  // namespace kvtier
