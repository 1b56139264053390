#pragma once

#include "memory/status.h"
#include "runtime/runtime.h"
#include "tools/trace/trace_manifest.h"

#include <cstdint>
#include <span>
#include <vector>

namespace kvtier {

/// What a step was asked to attend, for checking its own account of it.
struct AttendedLimits {
  std::uint32_t head_groups = 1;
  std::uint32_t tokens_per_block = 8;
  std::uint32_t visible = 0;  ///< Tokens that the step may see.
  std::uint32_t budget = 0;
  std::uint32_t sinks = 0;
  std::uint32_t window = 0;
};

/// Which tokens each step attended, as spans of positions per head group: kept for a whole run, so
/// that runs can be measured together. 8 bytes per span; neighbouring blocks share one.
class AttendedSets {
 public:
  /// Adds the next step of a layer. Fails, and adds it as if nothing was attended, when the report
  /// contradicts itself or the request: blocks out of order or twice, tokens that the query cannot
  /// see, more than the budget, sinks or window left out.
  Status add(std::span<const AttendedRange> ranges, const AttendedLimits& limits);
  /// Adds a step that attended nothing.
  void add_nothing(std::uint32_t head_groups);

  /// Ascending and disjoint. `index` counts (step, layer, head group) in the order of adding.
  std::span<const TokenSpan> spans(std::size_t index) const {
    return std::span(spans_).subspan(ends_[index], ends_[index + 1] - ends_[index]);
  }
  /// Those of them that were attended with keys that the selector keeps.
  std::span<const TokenSpan> kept_spans(std::size_t index) const {
    return std::span(kept_).subspan(kept_ends_[index], kept_ends_[index + 1] - kept_ends_[index]);
  }
  /// Whether any step attended such keys.
  bool has_kept() const { return !kept_.empty(); }
  std::size_t size() const { return ends_.size() - 1; }
  /// XXH3-64 of all of it.
  std::uint64_t digest() const;

 private:
  Status add_group(std::span<const AttendedRange> ranges, const AttendedLimits& limits);

  std::vector<TokenSpan> spans_;
  std::vector<std::size_t> ends_ = {0};
  std::vector<TokenSpan> kept_;
  std::vector<std::size_t> kept_ends_ = {0};
};

/// Tokens in ascending, disjoint spans.
std::uint64_t count_tokens(std::span<const TokenSpan> spans);

}  // namespace kvtier
