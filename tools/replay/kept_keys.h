#pragma once

#include "memory/status.h"
#include "tools/replay/exact_attention.h"
#include "tools/replay/replay_run.h"
#include "tools/replay/trace_feed.h"

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

namespace kvtier {

/// What runs attended whose selector keeps keys of its own: the weights that those keys give, for
/// measuring their outputs against attention over exactly what was attended.
///
/// Has selectors of its own, shown the trace's keys up to each step. One layer and step at a time,
/// in ascending order; several threads may read.
class KeptKeys {
 public:
  /// Everything outlives it.
  KeptKeys(const AttentionTrace& trace, const SelectorShape& shape,
           std::span<const RunRecord> runs);

  Status move_to_layer(std::uint32_t layer);
  /// Shows the selectors the tokens that a step sees.
  void move_to_step(std::uint32_t visible);

  /// Weights of query head `head` on `attended`, [visible], relative to the same sum as those of
  /// `exact`: its own, but on `kept` those of the keys that the run's selector keeps.
  std::vector<float> weights(const ExactAttention& exact, std::size_t run, std::uint32_t head,
                             std::span<const TokenSpan> attended,
                             std::span<const TokenSpan> kept) const;

 private:
  float weight(const ExactAttention& exact, std::uint32_t head, const std::byte* key) const;

  const AttentionTrace& trace_;
  SelectorShape shape_;
  std::span<const RunRecord> runs_;
  TraceFeed feed_;
  std::uint32_t layer_ = 0;
  std::uint32_t shown_ = 0;
  std::vector<std::unique_ptr<Selector>> selectors_;  ///< Per run; null where nothing was kept.
};

}  // namespace kvtier
