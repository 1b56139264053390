#pragma once

#include "kernels/worker_pool.h"
#include "selectors/selector.h"
#include "selectors/selector_state.h"

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

namespace kvtier {

/// Where the logits of single tokens come from: whatever a selector keeps of their keys.
class TokenLogits {
 public:
  virtual ~TokenLogits() = default;
  /// Logits of tokens [0, tokens) of one KV head: query r, at queries + r * head_dim, to
  /// target + r * stride. Splits the work over the pool.
  virtual Status compute(std::uint32_t kv_head, const float* queries, std::uint32_t rows,
                         std::uint32_t tokens, float* target, std::size_t stride,
                         WorkerPool& pool) = 0;
};

/// From logits of single tokens to a ranked choice of blocks: the second half of selectors that
/// score every token.
///
/// Each query head of each query gives every token a vote: its softmax weight over the tokens that
/// take part, or its raw logit under `kMean`. Per head group, votes are added over the queries,
/// then reduced over the heads (`kSum` adds, `kMax` takes the largest, `kMean` the mean). A block's
/// score is the sum of its far tokens' votes, their mean under `kMean`.
///
/// One KV head at a time, so that one head's logits are all the scratch there is. Allocates when
/// made, and when a step has more queries than any before. One thread at a time.
class TokenVotes {
 public:
  explicit TokenVotes(const SelectorShape& shape);

  struct Electorate {
    /// Sinks and window take part in the softmax, so that a vote estimates attention mass; else
    /// the far region's tokens share the whole weight among themselves.
    bool everyone = true;
    /// When positive: a token passes if for some query its weight is at least this part of what
    /// sinks and window get together.
    float threshold = 0.0f;
  };
  /// Counts the votes for the tokens of the request's far region; `tokens` have been appended.
  /// `invalid_argument` when logits overflow.
  Status count(const SelectRequest& request, std::uint32_t tokens, const Electorate& electorate,
               TokenLogits& logits, std::string_view family, WorkerPool& pool);

  /// Votes of one head group, by position; those of the last counted region are meant.
  std::span<float> votes(std::uint32_t group) {
    return votes_.part(std::size_t{group} * shape_.tokens_max, shape_.tokens_max);
  }

  /// Ranks the region's blocks of every head group by their votes. With a threshold, blocks in
  /// which no token passed are not chosen.
  void rank(const SelectRequest& request, float threshold, std::span<GroupSelection> selection,
            WorkerPool& pool);

 private:
  struct Count {
    const SelectRequest& request;
    FarRegion region;
    std::uint32_t tokens;
    Electorate electorate;
    std::uint32_t kv_head = 0;
  };
  struct Ranking {
    const SelectRequest& request;
    FarRegion region;
    float threshold;
    std::span<GroupSelection> selection;
  };
  void weigh_row(const Count& count, std::uint32_t row);
  void add_slice(const Count& count, std::uint32_t first, std::uint32_t last);
  void rank_group(const Ranking& ranking, std::uint32_t group);

  SelectorShape shape_;
  std::uint32_t rows_max_ = 0;
  FixedArray<float> queries_;         ///< [rows, head_dim]
  FixedArray<float> logits_;          ///< [rows, tokens_max]
  std::vector<float> floors_;         ///< [rows]: the weight at which a token passes.
  std::vector<std::uint8_t> finite_;  ///< [rows]
  FixedArray<float> votes_;           ///< [head groups, tokens_max]
  FixedArray<std::uint8_t> passes_;   ///< [head groups, tokens_max]
  std::vector<float> scores_;         ///< [head groups, blocks]
  std::vector<std::uint32_t> order_;
};

}  // namespace kvtier
