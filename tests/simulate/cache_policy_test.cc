// Every policy against its naive twin, use by use.

#include "tests/simulate/naive_caches.h"
#include "tools/simulate/simulated_cache.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>
#include <set>
#include <string>

namespace kvtier {
namespace {

constexpr std::uint32_t kUnique = 40;

class CachePolicy : public testing::TestWithParam<std::string> {};

TEST_P(CachePolicy, HoldsWhatItsNaiveTwinHolds) {
  for (const std::uint32_t capacity : {1u, 2u, 3u, 7u, 10u, 20u, 25u, 39u, 60u}) {
    std::mt19937_64 random(capacity);
    const auto cache = make_simulated_cache(
        GetParam(), {.unique_blocks = kUnique, .capacity = capacity, .costs = {}});
    const auto naive = make_naive_cache(GetParam(), capacity);
    ASSERT_NE(naive, nullptr);
    std::uint32_t scan = 0;
    for (int use = 0; use < 4000; ++use) {
      // Popular blocks, between stretches of a scan.
      const bool scans = use / 50 % 3 == 0;
      const auto skewed = static_cast<std::uint32_t>(
          std::min(random() % kUnique, std::min(random() % kUnique, random() % kUnique)));
      const std::uint32_t block = scans ? scan++ % kUnique : skewed;
      const std::uint64_t tokens_before = random() % 4 * 100'000;
      const bool was_resident = cache->contains(block);
      const CacheUse found = cache->use({.block = block, .tokens_before = tokens_before});
      naive->use(block, tokens_before);
      ASSERT_EQ(found.was_resident, was_resident);
      ASSERT_FALSE(was_resident && found.evicted != kNoBlock);
      std::uint32_t resident = 0;
      for (std::uint32_t b = 0; b < kUnique; ++b) {
        ASSERT_EQ(cache->contains(b), naive->contains(b))
            << "block " << b << ", use " << use << ", capacity " << capacity;
        resident += cache->contains(b) ? 1u : 0u;
      }
      ASSERT_EQ(cache->size(), resident);
    }
  }
}

TEST_P(CachePolicy, KeepsItsBookWhenBlocksAreTakenAway) {
  std::mt19937_64 random(7);
  const auto cache =
      make_simulated_cache(GetParam(), {.unique_blocks = kUnique, .capacity = 11, .costs = {}});
  std::set<std::uint32_t> resident;
  for (int use = 0; use < 5000; ++use) {
    const auto block = static_cast<std::uint32_t>(random() % kUnique);
    if (random() % 3 == 0 && resident.contains(block)) {
      cache->remove(block);
      resident.erase(block);
    } else {
      const CacheUse found = cache->use({.block = block, .tokens_before = 0});
      ASSERT_EQ(found.was_resident, resident.contains(block));
      if (found.evicted != kNoBlock) {
        ASSERT_EQ(resident.erase(found.evicted), 1u);
      }
      resident.insert(block);
    }
    ASSERT_LE(resident.size(), 11u);
    for (std::uint32_t b = 0; b < kUnique; ++b) {
      ASSERT_EQ(cache->contains(b), resident.contains(b)) << "block " << b << ", use " << use;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, CachePolicy,
                         testing::Values("lru", "fifo", "s3-fifo", "sieve", "arc", "gdsf"),
                         [](const auto& info) {
                           std::string name = info.param;
                           std::erase(name, '-');
                           return name;
                         });

TEST(BlockCosts, LoadingThatCostsMoreThanComputingSavesNothing) {
  const BlockCosts costs{
      .recompute_ps_per_token = 10, .recompute_ps_per_token_before = 2, .load_ps_per_token = 30};
  EXPECT_EQ(costs.saving_ps_per_token(5), 0u);
  EXPECT_EQ(costs.saving_ps_per_token(10), 0u);
  EXPECT_EQ(costs.saving_ps_per_token(11), 2u);
}

}  // namespace
}  // namespace kvtier
