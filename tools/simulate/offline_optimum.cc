#include "tools/simulate/offline_optimum.h"

#include "memory/check.h"

#include <algorithm>
#include <bit>

namespace kvtier {

NextUses::NextUses(const RequestTrace& trace) : next_(trace.references().size()) {
  std::vector<std::uint32_t> next_of_block(trace.unique_blocks(), kNever);
  const auto requests = trace.requests();
  for (std::size_t r = requests.size(); r-- > 0;) {
    const TraceRequest& request = requests[r];
    const auto blocks = trace.blocks_of(request);
    for (std::uint32_t i = 0; i < blocks.size(); ++i)
      next_[request.first + i] = next_of_block[blocks[i]];
    // Of a block that occurs twice in one request, the shallower place counts.
    for (std::uint32_t i = request.blocks; i-- > 0;) next_of_block[blocks[i]] = request.first + i;
  }
}

NumberSet::NumberSet(std::uint64_t bound) {
  std::uint64_t words = bound / 64 + 1;
  levels_.emplace_back(words);
  while (words > 1) {
    words = (words + 63) / 64;
    levels_.emplace_back(words);
  }
}

void NumberSet::insert(std::uint64_t number) {
  ++size_;
  for (auto& level : levels_) {
    std::uint64_t& word = level[number / 64];
    const bool was_empty = word == 0;
    word |= std::uint64_t{1} << number % 64;
    if (!was_empty) return;
    number /= 64;
  }
}

void NumberSet::erase(std::uint64_t number) {
  --size_;
  for (auto& level : levels_) {
    std::uint64_t& word = level[number / 64];
    word &= ~(std::uint64_t{1} << number % 64);
    if (word != 0) return;
    number /= 64;
  }
}

std::uint64_t NumberSet::largest() const {
  KVTIER_CHECK(size_ > 0, "the set is empty");
  std::uint64_t number = 0;
  for (std::size_t level = levels_.size(); level-- > 0;) {
    const std::uint64_t word = levels_[level][number];
    number = number * 64 + 63 - static_cast<std::uint64_t>(std::countl_zero(word));
  }
  return number;
}

namespace {

/// What a cache of one capacity holds, each block by the reference that uses it next. Request by
/// request, the references of the present one leave the set and their next uses compete for it.
class OptimalCache {
 public:
  OptimalCache(std::uint64_t references, std::uint64_t capacity)
      : kept_(references), capacity_(capacity) {}

  bool contains(std::uint64_t reference) const { return kept_.contains(reference); }

  void use(const TraceRequest& request, const NextUses& next_uses) {
    const std::uint64_t end = std::uint64_t{request.first} + request.blocks;
    for (std::uint64_t reference = request.first; reference < end; ++reference) {
      if (kept_.contains(reference)) kept_.erase(reference);
    }
    for (std::uint64_t reference = request.first; reference < end; ++reference) {
      const std::uint32_t next = next_uses.of(reference);
      if (next != NextUses::kNever && !kept_.contains(next)) keep(next);
    }
  }

 private:
  void keep(std::uint32_t next) {
    if (kept_.size() == capacity_) {
      const std::uint64_t farthest = kept_.largest();
      if (next > farthest) return;
      kept_.erase(farthest);
    }
    kept_.insert(next);
  }

  NumberSet kept_;
  std::uint64_t capacity_;
};

/// Whether block `i` of the request is kept, of which those before it are. A block that occurs
/// twice in one request is kept under its first place.
bool is_kept(const OptimalCache& cache, const RequestTrace& trace, const TraceRequest& request,
             std::uint32_t i) {
  if (cache.contains(std::uint64_t{request.first} + i)) return true;
  const auto blocks = trace.blocks_of(request);
  const auto before = blocks.first(i);
  const auto first = std::ranges::find(before, blocks[i]);
  return first != before.end() &&
         cache.contains(request.first + static_cast<std::uint64_t>(first - before.begin()));
}

}  // namespace

SimulationRun simulate_optimal(const RequestTrace& trace, const NextUses& next_uses,
                               std::span<const OptimalTier> tiers) {
  KVTIER_CHECK(!tiers.empty(), "no tier");
  SimulationRun run;
  run.policy = "optimal";
  run.capacity_blocks = tiers.back().cumulative_blocks;
  std::vector<OptimalCache> caches;
  for (const OptimalTier& tier : tiers) {
    KVTIER_CHECK(tier.cumulative_blocks > 0, "tier {} holds nothing", tier.name);
    caches.emplace_back(trace.references().size(), tier.cumulative_blocks);
    run.tiers.push_back({.name = tier.name, .capacity_blocks = tier.capacity_blocks});
  }
  const auto requests = trace.requests();
  for (std::size_t r = 0; r < requests.size(); ++r) {
    const TraceRequest& request = requests[r];
    std::uint32_t hits = 0;
    while (hits < request.blocks && is_kept(caches.back(), trace, request, hits)) {
      std::size_t tier = 0;
      while (!is_kept(caches[tier], trace, request, hits)) ++tier;
      ++run.tiers[tier].hit_blocks;
      run.tiers[tier].hit_tokens += trace.tokens_at(request, hits);
      ++hits;
    }
    const std::uint64_t tokens = trace.tokens_of_first(request, hits);
    run.hits.hit_blocks += hits;
    run.hits.hit_tokens += tokens;
    if (r >= requests.size() / 2) run.hits.second_half_hit_tokens += tokens;
    for (OptimalCache& cache : caches) cache.use(request, next_uses);
  }
  return run;
}

}  // namespace kvtier
