#include "selectors/eviction_policy.h"
#include "tests/replay/replay_runner.h"
#include "tools/replay/best_choice.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <iostream>
#include <limits>
#include <map>
#include <optional>

// Eviction policies on what a real model attends: the best choice of 8-token blocks at each step of
// the shipped trace, without sinks and window, as one cache of all layers and heads sees it. The
// figures in selectors/README.md are printed here.

namespace kvtier {
namespace {

using Step = std::vector<std::uint64_t>;  ///< The blocks that one layer attends at one step.

struct Accesses {
  std::vector<Step> steps;
  std::uint64_t blocks = 0;  ///< That there are in all.
};

Accesses record_accesses(const AttentionTrace& trace, double budget_share) {
  const TraceModel& model = trace.manifest().model;
  const SelectorShape shape{.dtype = trace.manifest().dtype,
                            .kv_heads = model.kv_heads,
                            .heads_per_group = 1,
                            .queries_per_kv_head = model.query_heads / model.kv_heads,
                            .head_dim = model.head_dim,
                            .tokens_per_block = 8,
                            .sinks = 4,
                            .window = 64,
                            .tokens_max = trace.manifest().tokens};
  WorkerPool pool(0);
  ExactAttention exact(trace, pool);
  BestChoice best(shape);
  const std::size_t layers = trace.layers().size();
  const std::size_t steps = trace.query_positions().size();
  const std::uint64_t per_head = trace.manifest().tokens / shape.tokens_per_block + 1;
  Accesses accesses{.steps = std::vector<Step>(steps * layers),
                    .blocks = per_head * layers * model.kv_heads};
  for (std::size_t layer = 0; layer < layers; ++layer) {
    exact.move_to_layer(layer);
    for (std::uint32_t step = 0; step < steps; ++step) {
      EXPECT_TRUE(exact.move_to_step(step).ok());
      const std::uint32_t visible = exact.visible();
      const FarRegion far = FarRegion::of(shape, visible - 1);
      const auto budget = static_cast<std::uint32_t>(budget_share * visible);
      const auto& spans = best.choose(exact, budget);
      for (std::size_t head = 0; head < model.kv_heads; ++head) {
        for (const TokenSpan& span : spans[head]) {
          for (std::uint32_t t = std::max(span.begin, far.begin); t < std::min(span.end, far.end);
               t = (t / shape.tokens_per_block + 1) * shape.tokens_per_block) {
            accesses.steps[step * layers + layer].push_back(
                (layer * model.kv_heads + head) * per_head + t / shape.tokens_per_block);
          }
        }
      }
    }
  }
  return accesses;
}

double hit_ratio(const Accesses& accesses, std::string_view name, std::uint32_t places) {
  auto policy = make_eviction_policy(name, places).value();
  std::vector<std::uint16_t> held(places);
  std::vector<std::uint64_t> id_in(places);
  std::map<std::uint64_t, std::uint32_t> place_of;
  std::uint64_t hits = 0;
  std::uint64_t uses = 0;
  for (const Step& step : accesses.steps) {
    // As the runtime does it: what is there is held and touched, then the rest finds its places.
    std::vector<std::uint64_t> missing;
    std::vector<std::uint32_t> taken;
    for (std::uint64_t id : step) {
      ++uses;
      const auto found = place_of.find(id);
      if (found == place_of.end()) {
        missing.push_back(id);
        continue;
      }
      ++hits;
      policy->touch(found->second);
      taken.push_back(found->second);
      ++held[found->second];
    }
    for (std::uint64_t id : missing) {
      auto place = static_cast<std::uint32_t>(place_of.size());
      if (place_of.size() == places) {
        const auto victim = policy->evict(held);
        if (!victim) break;  // A step larger than the cache: its last blocks pass through.
        place = *victim;
        place_of.erase(id_in[place]);
      }
      id_in[place] = id;
      place_of[id] = place;
      policy->admit(place, id, Admission::kUsed);
      taken.push_back(place);
      ++held[place];
    }
    for (std::uint32_t place : taken) --held[place];
  }
  return static_cast<double>(hits) / static_cast<double>(uses);
}

/// Belady's choice: the block whose next use is farthest leaves.
double best_hit_ratio(const Accesses& accesses, std::size_t places) {
  constexpr std::size_t kNever = std::numeric_limits<std::size_t>::max();
  std::map<std::uint64_t, std::vector<std::size_t>> uses_of;
  for (std::size_t i = accesses.steps.size(); i > 0; --i) {
    for (std::uint64_t id : accesses.steps[i - 1]) uses_of[id].push_back(i - 1);
  }
  std::map<std::uint64_t, std::size_t> next_use;  ///< Of what is in the cache.
  std::uint64_t hits = 0;
  std::uint64_t uses = 0;
  for (const Step& step : accesses.steps) {
    for (std::uint64_t id : step) {
      ++uses;
      hits += next_use.contains(id) ? 1u : 0u;
      std::vector<std::size_t>& future = uses_of[id];
      future.pop_back();
      next_use[id] = future.empty() ? kNever : future.back();
    }
    while (next_use.size() > places) {
      next_use.erase(
          std::ranges::max_element(next_use, {}, [](const auto& entry) { return entry.second; }));
    }
  }
  return static_cast<double>(hits) / static_cast<double>(uses);
}

TEST(EvictionReplay, LrfuIsNearerToTheOptimumThanLru) {
  const auto trace = AttentionTrace::open(shipped_trace());
  ASSERT_TRUE(trace.ok()) << trace.status().to_string();
  for (const double budget : {0.05, 0.10}) {
    const Accesses accesses = record_accesses(*trace, budget);
    for (const double share : {0.05, 0.10, 0.20}) {
      const auto places = static_cast<std::uint32_t>(share * static_cast<double>(accesses.blocks));
      const double lru = hit_ratio(accesses, "lru", places);
      const double lrfu = hit_ratio(accesses, "lrfu", places);
      const double best = best_hit_ratio(accesses, places);
      std::cout << fmt::format(
          "budget {:.0f} %, cache {:.0f} %: lru {:.3f}, lrfu {:.3f}, optimum {:.3f}\n",
          100 * budget, 100 * share, lru, lrfu, best);
      EXPECT_GT(lrfu, lru);
      EXPECT_LT(lrfu, best);
    }
  }
}

}  // namespace
}  // namespace kvtier
