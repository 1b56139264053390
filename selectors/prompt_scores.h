#pragma once

#include "selectors/selector.h"

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace kvtier {

enum class PromptScore : unsigned char { kSnapKv, kEms, kKvCrush };

struct PromptScoreOptions {
  PromptScore score = PromptScore::kSnapKv;
  std::uint32_t queries = 32;  ///< SnapKV's observation window: 16 to 64 queries.
  std::uint32_t kernel = 7;    ///< Of the max-pooling along tokens: 5 to 7.

  /// Observed queries that the scores are made from: EMS's accumulated attention goes back further
  /// than its recent-window attention, here four times as far, since every query of the prompt
  /// would cost as much as the prompt itself.
  std::uint32_t wanted_queries() const { return queries * (score == PromptScore::kEms ? 4 : 1); }
};

/// The keys of a prompt, and its last observed queries. View.
struct ObservedPrompt {
  const std::byte* keys = nullptr;  ///< [KV heads, tokens, head_dim], heads `head_stride` apart.
  std::size_t head_stride = 0;      ///< Bytes.
  const float* queries = nullptr;   ///< [positions.size(), query_heads, head_dim]
  std::size_t query_stride = 0;     ///< Elements from one query to the next.
  std::span<const std::uint32_t> positions;
};

/// Scores the first `blocks` blocks of a prompt, once: what each method means by a score is told by
/// the selector, `prompt-observed`. Allocates; lives as long as the scoring.
class PromptScores {
 public:
  PromptScores(const SelectorShape& shape, const PromptScoreOptions& options, std::uint32_t blocks);

  /// `invalid_argument` when a logit is not finite.
  Status compute(const ObservedPrompt& prompt, WorkerPool& pool);
  /// One per block, the best of a head group is 1.
  std::span<const float> of_group(std::uint32_t group) const { return groups_[group]; }

 private:
  Status weigh_head(const ObservedPrompt& prompt, std::uint32_t head, WorkerPool& pool);
  void sum_blocks(std::span<const float> weights, std::span<float> blocks) const;
  void reduce_heads(std::uint32_t group);
  void crush();
  void crush_group(std::span<const std::uint32_t> distance, std::span<float> scores) const;

  SelectorShape shape_;
  PromptScoreOptions options_;
  std::uint32_t blocks_;
  std::vector<std::vector<float>> heads_;   ///< [query heads][blocks]
  std::vector<std::vector<float>> groups_;  ///< [head groups][blocks]
};

}  // namespace kvtier
