#include "tools/replay/attended_sets.h"

#include "kernels/checksum.h"

#include <fmt/format.h>

#include <algorithm>

namespace kvtier {

std::uint64_t count_tokens(std::span<const TokenSpan> spans) {
  std::uint64_t tokens = 0;
  for (const TokenSpan& span : spans) tokens += span.end - span.begin;
  return tokens;
}

namespace {

/// Adds [begin, end) behind the spans from `first` on, whose end may be where it begins.
void add_span(std::uint64_t begin, std::uint64_t end, std::size_t first,
              std::vector<TokenSpan>& spans) {
  if (spans.size() > first && begin == spans.back().end) {
    spans.back().end = static_cast<std::uint32_t>(end);
  } else {
    spans.push_back({static_cast<std::uint32_t>(begin), static_cast<std::uint32_t>(end)});
  }
}

}  // namespace

Status AttendedSets::add_group(std::span<const AttendedRange> ranges,
                               const AttendedLimits& limits) {
  const std::size_t first = spans_.size();
  const std::size_t first_kept = kept_.size();
  for (const AttendedRange& range : ranges) {
    const std::uint64_t begin =
        std::uint64_t{range.block.value} * limits.tokens_per_block + range.first_token;
    const std::uint64_t end = begin + range.tokens;
    if (range.tokens == 0 || range.first_token + range.tokens > limits.tokens_per_block ||
        end > limits.visible) {
      return corrupt(fmt::format("block {}: tokens {} + {} do not lie in it or before position {}",
                                 range.block.value, range.first_token, range.tokens,
                                 limits.visible));
    }
    const bool is_first = spans_.size() == first;
    if (!is_first && begin < spans_.back().end) {
      return corrupt(fmt::format("block {} is attended twice or out of order", range.block.value));
    }
    add_span(begin, end, first, spans_);
    if (range.kept_keys) add_span(begin, end, first_kept, kept_);
  }
  const std::span<const TokenSpan> added = std::span(spans_).subspan(first);
  const std::uint32_t sinks = std::min(limits.sinks, limits.visible);
  const std::uint32_t window = std::min(limits.window, limits.visible);
  const bool has_sinks =
      sinks == 0 || (!added.empty() && added.front().begin == 0 && added.front().end >= sinks);
  const bool has_window = window == 0 || (!added.empty() && added.back().end == limits.visible &&
                                          added.back().begin <= limits.visible - window);
  if (!has_sinks) return corrupt("the sinks are not attended");
  if (!has_window) return corrupt("the window is not attended");
  if (count_tokens(added) > limits.budget) {
    return corrupt(fmt::format("{} tokens are attended, the budget is {}", count_tokens(added),
                               limits.budget));
  }
  return {};
}

Status AttendedSets::add(std::span<const AttendedRange> ranges, const AttendedLimits& limits) {
  const std::size_t spans_before = spans_.size();
  const std::size_t ends_before = ends_.size();
  const std::size_t kept_before = kept_.size();
  Status status;
  for (std::uint32_t group = 0; group < limits.head_groups && status.ok(); ++group) {
    const auto other = std::ranges::find_if(
        ranges, [&](const AttendedRange& range) { return range.head_group != HeadGroup{group}; });
    const std::size_t count = static_cast<std::size_t>(other - ranges.begin());
    status = add_group(ranges.first(count), limits);
    if (!status.ok()) status = corrupt(fmt::format("head group {}: {}", group, status.message()));
    ranges = ranges.subspan(count);
    ends_.push_back(spans_.size());
    kept_ends_.push_back(kept_.size());
  }
  if (status.ok() && !ranges.empty()) status = corrupt("head groups are out of order");
  if (status.ok()) return {};
  spans_.resize(spans_before);
  ends_.resize(ends_before);
  kept_.resize(kept_before);
  kept_ends_.resize(ends_before);
  add_nothing(limits.head_groups);
  return status;
}

void AttendedSets::add_nothing(std::uint32_t head_groups) {
  ends_.insert(ends_.end(), head_groups, spans_.size());
  kept_ends_.insert(kept_ends_.end(), head_groups, kept_.size());
}

std::uint64_t AttendedSets::digest() const {
  const std::uint64_t parts[] = {checksum(std::as_bytes(std::span(spans_))),
                                 checksum(std::as_bytes(std::span(ends_)))};
  return checksum(std::as_bytes(std::span(parts)));
}

}  // namespace kvtier
