#pragma once

#include "memory/status.h"
#include "runtime/runtime.h"
#include "selectors/registry.h"
#include "tools/trace/attention_trace.h"

#include <cstdint>
#include <vector>

namespace kvtier {

/// What selectors can be given from this trace: the kinds of input that all its layers hold.
SelectorNeeds needs_met_by(const AttentionTrace& trace);

/// Hands the tokens and prompt queries of a trace to a sequence, chunk by chunk. Borrows the trace.
class TraceFeed {
 public:
  explicit TraceFeed(const AttentionTrace& trace);

  /// Tokens [first, first + count) of `trace.layers()[layer]`, with their marks.
  TokenRows rows(std::size_t layer, std::uint32_t first, std::uint32_t count) const;
  /// Tells the selector of a layer what the tokens [first, first + count) looked for, as far as
  /// that was recorded; they were appended before.
  Status observe(Sequence& sequence, std::uint32_t layer, std::uint32_t first, std::uint32_t count);

 private:
  const AttentionTrace& trace_;
  std::vector<std::uint8_t> marks_;  ///< [tokens]; empty when the trace has no sentence ends.
  std::vector<float> queries_;       ///< Of one call.
};

}  // namespace kvtier
