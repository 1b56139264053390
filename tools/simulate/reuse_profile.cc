#include "tools/simulate/reuse_profile.h"

#include "tools/simulate/live_slots.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>

namespace kvtier {
namespace {

constexpr std::uint32_t kNever = std::numeric_limits<std::uint32_t>::max();

/// How often each value occurred; values ascend.
using Counted = std::vector<std::pair<std::uint64_t, std::uint64_t>>;

std::optional<double> quantile_of(const Counted& counted, std::uint64_t total, double share) {
  if (total == 0) return std::nullopt;
  const auto rank =
      static_cast<std::uint64_t>(std::max(1.0, std::ceil(share * static_cast<double>(total))));
  std::uint64_t seen = 0;
  for (const auto& [value, count] : counted) {
    seen += count;
    if (seen >= rank) return static_cast<double>(value);
  }
  return static_cast<double>(counted.back().first);
}

/// Sorts, and joins what occurs several times.
void merge_counts(Counted& counted) {
  std::ranges::sort(counted);
  std::size_t kept = 0;
  for (const auto& [value, count] : counted) {
    if (kept > 0 && counted[kept - 1].first == value) {
      counted[kept - 1].second += count;
    } else {
      counted[kept++] = {value, count};
    }
  }
  counted.resize(kept);
}

Quantiles quantiles_of(const Counted& counted, double per_unit) {
  std::uint64_t total = 0;
  for (const auto& [value, count] : counted) total += count;
  const auto at = [&](double share) {
    const auto value = quantile_of(counted, total, share);
    return value ? std::optional(*value / per_unit) : std::nullopt;
  };
  return {at(0.1), at(0.5), at(0.9), at(0.99)};
}

}  // namespace

const char* to_string(TouchOrder order) {
  return order == TouchOrder::kLastFirst ? "last-first" : "first-first";
}

/// The one pass. Invariants between requests: slot_of_[b] is the slot of b's last use and live;
/// block_in_[s] is the block whose last use is slot s, for every live s; no other slot is live.
class ReuseProfile::Pass {
 public:
  Pass(const RequestTrace& trace, TouchOrder order, ReuseProfile& profile)
      : trace_(trace),
        order_(order),
        profile_(profile),
        slots_(kLeastSlots),
        block_in_(kLeastSlots),
        slot_of_(trace.unique_blocks(), kNever),
        last_request_(trace.unique_blocks()),
        is_reused_(trace.unique_blocks()),
        distances_(trace.unique_blocks() + std::size_t{1}) {}

  void run() {
    const auto requests = trace_.requests();
    for (std::uint32_t r = 0; r < requests.size(); ++r) {
      const TraceRequest& request = requests[r];
      const bool is_second_half = r >= requests.size() / 2;
      profile_.input_tokens_ += request.input_tokens;
      profile_.output_tokens_ += request.output_tokens;
      if (is_second_half) profile_.second_half_input_tokens_ += request.input_tokens;
      look_up(request, is_second_half);
      record_reuse_times(request);
      if (slots_.capacity() - slots_.next() < request.blocks) compact(request.blocks);
      use(request);
      for (const BlockNumber block : trace_.blocks_of(request)) last_request_[block] = r;
    }
    finish();
  }

 private:
  static constexpr std::uint32_t kLeastSlots = 1u << 16;
  static constexpr std::size_t kTimesKept = std::size_t{1} << 20;

  void look_up(const TraceRequest& request, bool is_second_half);
  void record_reuse_times(const TraceRequest& request);
  void use(const TraceRequest& request);
  void compact(std::uint32_t needed);
  void finish();

  const RequestTrace& trace_;
  const TouchOrder order_;
  ReuseProfile& profile_;
  LiveSlots slots_;
  std::vector<BlockNumber> block_in_;
  std::vector<std::uint32_t> slot_of_;
  std::vector<std::uint32_t> last_request_;
  std::vector<bool> is_reused_;
  std::vector<std::uint64_t> distances_;
  Counted times_us_;
};

void ReuseProfile::Pass::look_up(const TraceRequest& request, bool is_second_half) {
  const auto blocks = trace_.blocks_of(request);
  std::uint32_t distance = 0;
  std::uint32_t previous = kNever;  // The slot of the block before.
  std::uint32_t deepest = 0;
  bool is_leading = true;
  for (std::uint32_t i = 0; i < blocks.size(); ++i) {
    const std::uint32_t slot = slot_of_[blocks[i]];
    if (slot == kNever) {
      is_leading = false;
      previous = kNever;
      continue;
    }
    // Neighbours in the stack need no counting: both slots are live, so nothing lies between them.
    if (previous != kNever && slot + 1 == previous) {
      ++distance;
    } else if (previous != kNever && slot == previous + 1) {
      --distance;
    } else {
      distance = slots_.count_from(slot);
    }
    previous = slot;
    ++distances_[distance];
    const std::uint64_t tokens = trace_.tokens_at(request, i);
    profile_.any_position_hit_tokens_ += tokens;
    if (!is_leading) continue;
    deepest = std::max(deepest, distance);
    HitCounts& hits = profile_.by_distance_[deepest].hits;
    ++hits.hit_blocks;
    hits.hit_tokens += tokens;
    if (is_second_half) hits.second_half_hit_tokens += tokens;
  }
}

void ReuseProfile::Pass::record_reuse_times(const TraceRequest& request) {
  for (const BlockNumber block : trace_.blocks_of(request)) {
    if (slot_of_[block] == kNever) continue;
    const auto before = trace_.requests()[last_request_[block]].arrival_us;
    // Against the clock only where the order is not by time.
    const auto time =
        static_cast<std::uint64_t>(std::max<std::int64_t>(request.arrival_us - before, 0));
    if (times_us_.empty() || times_us_.back().first != time) times_us_.emplace_back(time, 0);
    ++times_us_.back().second;
  }
  if (times_us_.size() > kTimesKept) merge_counts(times_us_);
}

void ReuseProfile::Pass::use(const TraceRequest& request) {
  const auto blocks = trace_.blocks_of(request);
  const auto nth = [&](std::size_t n) {
    return order_ == TouchOrder::kLastFirst ? blocks.size() - 1 - n : n;
  };
  for (std::size_t n = 0; n < blocks.size();) {
    // A run: blocks never seen, or blocks that were used one after the other and are again.
    const std::uint32_t slot = slot_of_[blocks[nth(n)]];
    const std::uint32_t target = slots_.next();
    std::uint32_t count = 0;
    std::uint64_t tokens = 0;
    while (n + count < blocks.size()) {
      const std::size_t i = nth(n + count);
      const BlockNumber block = blocks[i];
      // A block that stands in this run already has its new place, at or behind the target.
      if (slot_of_[block] != (slot == kNever ? kNever : slot + count)) break;
      if (slot != kNever && slot + count >= target) break;
      tokens += trace_.tokens_at(request, static_cast<std::uint32_t>(i));
      if (slot == kNever) {
        ++profile_.blocks_seen_once_;
      } else if (!is_reused_[block]) {
        is_reused_[block] = true;
        --profile_.blocks_seen_once_;
      }
      block_in_[target + count] = block;
      slot_of_[block] = target + count;
      ++count;
    }
    profile_.used_blocks_ += count;
    profile_.used_tokens_ += tokens;
    if (slot != kNever) {
      // Using the deepest block of the run leaves the next one at the same distance.
      Cumulative& reused = profile_.by_distance_[slots_.count_from(slot)];
      reused.reused_blocks += count;
      reused.reused_tokens += tokens;
      slots_.erase(slot, count);
    }
    slots_.append(count);
    n += count;
  }
}

/// Moves live slots together, and makes room for at least as many again.
void ReuseProfile::Pass::compact(std::uint32_t needed) {
  const std::uint64_t room = 4 * (std::uint64_t{slots_.live()} + needed);
  LiveSlots compacted(static_cast<std::uint32_t>(
      std::clamp<std::uint64_t>(room, kLeastSlots, std::numeric_limits<std::uint32_t>::max())));
  std::vector<BlockNumber> block_in(compacted.capacity());
  for (std::uint32_t slot = 0; slot < slots_.next(); ++slot) {
    if (!slots_.is_live(slot)) continue;
    const BlockNumber block = block_in_[slot];
    slot_of_[block] = compacted.next();
    block_in[compacted.next()] = block;
    compacted.append(1);
  }
  slots_ = std::move(compacted);
  block_in_ = std::move(block_in);
}

void ReuseProfile::Pass::finish() {
  Counted distances;
  for (std::size_t d = 0; d < distances_.size(); ++d) {
    if (distances_[d] > 0) distances.emplace_back(d, distances_[d]);
  }
  profile_.stack_distance_blocks_ = quantiles_of(distances, 1);
  merge_counts(times_us_);
  profile_.reuse_time_s_ = quantiles_of(times_us_, 1e6);
  Cumulative sum;
  for (Cumulative& at : profile_.by_distance_) {
    sum.hits.hit_blocks += at.hits.hit_blocks;
    sum.hits.hit_tokens += at.hits.hit_tokens;
    sum.hits.second_half_hit_tokens += at.hits.second_half_hit_tokens;
    sum.reused_blocks += at.reused_blocks;
    sum.reused_tokens += at.reused_tokens;
    at = sum;
  }
}

ReuseProfile ReuseProfile::measure(const RequestTrace& trace, TouchOrder order) {
  ReuseProfile profile;
  profile.unique_blocks_ = trace.unique_blocks();
  profile.by_distance_.resize(trace.unique_blocks() + std::size_t{1});
  Pass(trace, order, profile).run();
  return profile;
}

SimulationRun ReuseProfile::lru(std::uint64_t capacity_blocks) const {
  const Cumulative& at = by_distance_[std::min(capacity_blocks, unique_blocks_)];
  SimulationRun run{
      .policy = "lru", .capacity_blocks = capacity_blocks, .hits = at.hits, .tiers = {}};
  const std::uint64_t inserted = used_blocks_ - at.reused_blocks;
  run.tiers.push_back({.name = "cache",
                       .capacity_blocks = capacity_blocks,
                       .hit_blocks = at.hits.hit_blocks,
                       .hit_tokens = at.hits.hit_tokens,
                       .inserted_blocks = inserted,
                       .inserted_tokens = used_tokens_ - at.reused_tokens,
                       .evicted_blocks = inserted - std::min(capacity_blocks, unique_blocks_)});
  return run;
}

SimulationRun ReuseProfile::infinite() const {
  SimulationRun run = lru(unique_blocks_);
  run.policy = "infinite";
  run.capacity_blocks.reset();
  run.tiers.front().capacity_blocks.reset();
  return run;
}

}  // namespace kvtier
