#pragma once

#include "kernels/kv_view.h"
#include "selectors/rank_blocks.h"
#include "selectors/selector.h"

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace kvtier {

/// One stage of a hierarchical choice: what survived the stage before is cut into chunks of so many
/// tokens, each is scored by one key of its own, and the best chunks go on.
struct ChunkStage {
  std::uint32_t chunk_tokens = 0;
  std::uint32_t keep_tokens = 0;  ///< Not used by the last stage, whose scores are the answer.
  std::uint32_t refresh = 1;      ///< Tokens for which its result is used again.
};

/// What a head group's stages last found: the mask cache.
struct StageResults {
  struct Stage {
    std::uint32_t position = 0;         ///< Of the question that it answered.
    std::uint32_t region_end = 0;       ///< Tokens behind it were not looked at.
    std::uint32_t enough_for = 0;       ///< Budgets up to this can be filled from it; 0: no result.
    std::vector<std::uint32_t> chunks;  ///< Numbers of the surviving chunks, ascending.
    std::vector<float> scores;          ///< Of the last stage's chunks.
  };
  std::vector<Stage> stages;
};

/// Runs the stages for one head group's queries against all keys of the layer.
///
/// A chunk's key is found per KV head by binary descent, as HiP does: the first key of each half
/// stands for it, the half whose key scores higher (the largest logit over the KV head's queries
/// and query heads) is cut again. A chunk's score comes from its keys' logits by `reduce_logits`.
///
/// Scratch memory is allocated when made, and when a step has more queries than any before. One
/// thread at a time.
class ChunkStages {
 public:
  struct Question {
    const SelectRequest& request;
    FarRegion region;
    std::uint32_t head_group = 0;
    std::uint32_t wanted_tokens = 0;
  };

  ChunkStages(const SelectorShape& shape, std::span<const ChunkStage> stages);

  /// Brings `results` up to date: stages that are too old, or do not suffice for the question, and
  /// all stages after them, are run again. `changed` says whether any was. `keys` are those of the
  /// group's KV heads.
  Status run(std::span<const RowsView> keys, const Question& question, StageResults& results,
             bool& changed);

  /// A result with room for the longest context.
  StageResults blank() const;
  /// Gives a copied result that room again.
  void reserve(StageResults& results) const;
  std::size_t chunks_max(std::size_t stage) const;

 private:
  void list_candidates(const Question& question, const StageResults& results, std::size_t stage);
  Status score_candidates(std::span<const RowsView> keys, const Question& question,
                          std::uint32_t chunk_tokens);
  Status descend(const RowsView& keys, const Question& question, std::size_t head,
                 std::uint32_t chunk_tokens);
  Status look_at(const RowsView& keys, const Question& question, std::size_t head,
                 std::span<const std::uint32_t> tokens);
  void keep_best(const Question& question, std::size_t stage, StageResults::Stage& result);

  float* logits_of(std::size_t head) {
    return logits_.data() + head * rows_ * chunks_max(stages_.size() - 1);
  }

  SelectorShape shape_;
  std::vector<ChunkStage> stages_;
  std::size_t rows_ = 0;               ///< Queries times query heads per KV head.
  std::size_t rows_max_ = 0;           ///< What there is room for.
  std::vector<float> questions_;       ///< [rows, head_dim], one KV head's
  std::vector<float> logits_;          ///< [KV heads of the group, rows, chunks_max]
  std::vector<std::uint32_t> chunks_;  ///< Candidates, ascending.
  std::vector<std::uint32_t> left_;    ///< Per candidate: the first token of what is left,
  std::vector<std::uint32_t> ends_;    ///< its end,
  std::vector<std::uint32_t> middle_;  ///< the first of its second half,
  std::vector<float> left_scores_;     ///< and how its first key scores.
  std::vector<float> scores_;
  std::vector<float> head_scores_;
  std::vector<std::uint32_t> order_;
};

}  // namespace kvtier
