#include "tools/simulate/cache_run.h"

#include <algorithm>
#include <limits>
#include <memory>

namespace kvtier {
namespace {

/// The tiers of a run and what moves between them.
class TierStack {
 public:
  TierStack(const RequestTrace& trace, const CacheRunOptions& options)
      : options_(options), counts_(options.tiers.size()) {
    for (const TierSpec& tier : options.tiers) {
      // A tier larger than the trace never fills.
      const auto capacity =
          std::min<std::uint64_t>(tier.capacity_blocks, std::numeric_limits<std::uint32_t>::max());
      caches_.push_back(
          make_simulated_cache(options.policy, {.unique_blocks = trace.unique_blocks(),
                                                .capacity = static_cast<std::uint32_t>(capacity),
                                                .costs = options.costs}));
    }
    // Sizes travel with blocks that move down; every use brings the present one.
    if (is_cascade()) tokens_of_.resize(trace.unique_blocks());
    if (is_cascade()) tokens_before_.resize(trace.unique_blocks());
  }

  /// The first tier that holds the block; the number of tiers when none does.
  std::size_t tier_of(BlockNumber block) const {
    std::size_t tier = 0;
    while (tier < caches_.size() && !caches_[tier]->contains(block)) ++tier;
    return tier;
  }

  void use(const BlockUse& use, std::uint32_t tokens) {
    if (caches_.size() == 1) {
      use_in(0, use, tokens);
    } else if (is_cascade()) {
      use_exclusive(use, tokens);
    } else {
      use_inclusive(use, tokens);
    }
  }

  /// What was written and evicted.
  void put_counts(std::vector<TierResult>& tiers) const {
    for (std::size_t i = 0; i < tiers.size(); ++i) {
      tiers[i].inserted_blocks = counts_[i].inserted_blocks;
      tiers[i].inserted_tokens = counts_[i].inserted_tokens;
      tiers[i].evicted_blocks = counts_[i].evicted_blocks;
    }
  }

 private:
  bool is_cascade() const {
    return options_.hierarchy == Hierarchy::kExclusive && options_.tiers.size() > 1;
  }

  // Returns what the tier evicted.
  BlockNumber use_in(std::size_t tier, const BlockUse& use, std::uint32_t tokens) {
    const CacheUse found = caches_[tier]->use(use);
    if (found.was_resident) return kNoBlock;
    TierCounts& counts = counts_[tier];
    ++counts.inserted_blocks;
    counts.inserted_tokens += tokens;
    if (found.evicted != kNoBlock) ++counts.evicted_blocks;
    return found.evicted;
  }

  // From the last tier on: what leaves a tier has left those above before they make room.
  void use_inclusive(const BlockUse& use, std::uint32_t tokens) {
    for (std::size_t tier = caches_.size(); tier-- > 0;) {
      const BlockNumber victim = use_in(tier, use, tokens);
      if (victim == kNoBlock) continue;
      for (std::size_t above = 0; above < tier; ++above) {
        if (!caches_[above]->contains(victim)) continue;
        caches_[above]->remove(victim);
        ++counts_[above].evicted_blocks;
      }
    }
  }

  void use_exclusive(const BlockUse& use, std::uint32_t tokens) {
    const std::size_t from = tier_of(use.block);
    if (from > 0 && from < caches_.size()) caches_[from]->remove(use.block);
    tokens_of_[use.block] = tokens;
    tokens_before_[use.block] = use.tokens_before;
    BlockUse moving = use;
    for (std::size_t tier = 0; tier < caches_.size(); ++tier) {
      const BlockNumber victim = use_in(tier, moving, tokens_of_[moving.block]);
      if (victim == kNoBlock) return;
      moving = {.block = victim, .tokens_before = tokens_before_[victim]};
    }
  }

  struct TierCounts {
    std::uint64_t inserted_blocks = 0;
    std::uint64_t inserted_tokens = 0;
    std::uint64_t evicted_blocks = 0;
  };

  const CacheRunOptions& options_;
  std::vector<std::unique_ptr<SimulatedCache>> caches_;
  std::vector<TierCounts> counts_;
  std::vector<std::uint32_t> tokens_of_;
  std::vector<std::uint64_t> tokens_before_;
};

/// Tokens in front of each block of a request; where blocks have one size, a product.
class Positions {
 public:
  Positions(const RequestTrace& trace, const TraceRequest& request) : trace_(trace) {
    if (trace.block_tokens() != 0) return;
    std::uint64_t before = 0;
    for (std::uint32_t i = 0; i < request.blocks; ++i) {
      before_.push_back(before);
      before += trace.tokens_at(request, i);
    }
  }
  std::uint64_t before(std::uint32_t i) const {
    return before_.empty() ? std::uint64_t{i} * trace_.block_tokens() : before_[i];
  }

 private:
  const RequestTrace& trace_;
  std::vector<std::uint64_t> before_;
};

}  // namespace

const char* to_string(Hierarchy hierarchy) {
  return hierarchy == Hierarchy::kInclusive ? "inclusive" : "exclusive";
}

SimulationRun run_cache(const RequestTrace& trace, const CacheRunOptions& options) {
  KVTIER_CHECK(!options.tiers.empty(), "no tier");
  SimulationRun run;
  run.policy = options.policy;
  for (const TierSpec& tier : options.tiers) {
    run.tiers.push_back({.name = tier.name, .capacity_blocks = tier.capacity_blocks});
  }
  TierStack tiers(trace, options);
  std::uint64_t distinct = 0;
  for (const TierSpec& tier : options.tiers) distinct += tier.capacity_blocks;
  run.capacity_blocks =
      options.hierarchy == Hierarchy::kExclusive ? distinct : options.tiers.back().capacity_blocks;
  const auto requests = trace.requests();
  for (std::size_t r = 0; r < requests.size(); ++r) {
    const TraceRequest& request = requests[r];
    const auto blocks = trace.blocks_of(request);
    std::uint32_t hits = 0;
    for (; hits < request.blocks; ++hits) {
      const std::size_t tier = tiers.tier_of(blocks[hits]);
      if (tier == options.tiers.size()) break;
      ++run.tiers[tier].hit_blocks;
      run.tiers[tier].hit_tokens += trace.tokens_at(request, hits);
    }
    const std::uint64_t tokens = trace.tokens_of_first(request, hits);
    run.hits.hit_blocks += hits;
    run.hits.hit_tokens += tokens;
    if (r >= requests.size() / 2) run.hits.second_half_hit_tokens += tokens;
    const Positions positions(trace, request);
    for (std::uint32_t n = 0; n < request.blocks; ++n) {
      const std::uint32_t i =
          options.touch_order == TouchOrder::kLastFirst ? request.blocks - 1 - n : n;
      tiers.use({.block = blocks[i], .tokens_before = positions.before(i)},
                trace.tokens_at(request, i));
    }
  }
  tiers.put_counts(run.tiers);
  return run;
}

}  // namespace kvtier
