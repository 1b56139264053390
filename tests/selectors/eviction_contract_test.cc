#include "selectors/eviction_policy.h"
#include "tests/allocation_counter.h"
#include "tests/selectors/context.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <list>
#include <map>
#include <random>
#include <set>
#include <string>
#include <vector>

// What every eviction policy promises, over all that the registry knows.

namespace kvtier {
namespace {

/// A full tier as its owner sees it: which id lies where, and what is held.
class Cache {
 public:
  Cache(std::string_view policy, std::uint32_t capacity)
      : policy_(make_eviction_policy(policy, capacity).value()), held_(capacity) {
    ids_.resize(capacity, kNothing);
    for (std::uint32_t place = capacity; place-- > 0;) free_.push_back(place);
  }

  /// Uses `id`, fetching it when absent; whether it was there, or nothing if it found no place.
  std::optional<bool> use(std::uint64_t id) {
    if (const auto found = places_.find(id); found != places_.end()) {
      policy_->touch(found->second);
      return true;
    }
    std::uint32_t place = 0;
    if (free_.empty()) {
      const auto victim = policy_->evict(held_);
      if (!victim.has_value()) return std::nullopt;
      place = *victim;
      EXPECT_LT(place, ids_.size());
      EXPECT_EQ(held_[place], 0) << "a held place was evicted";
      EXPECT_NE(ids_[place], kNothing) << "an empty place was evicted";
      places_.erase(ids_[place]);
      evicted_.push_back(ids_[place]);
    } else {
      place = free_.back();
      free_.pop_back();
    }
    ids_[place] = id;
    places_[id] = place;
    policy_->admit(place, id, Admission::kUsed);
    return false;
  }

  void remove(std::uint64_t id) {
    const std::uint32_t place = places_.at(id);
    policy_->remove(place);
    places_.erase(id);
    ids_[place] = kNothing;
    held_[place] = 0;
    free_.push_back(place);
  }

  void hold(std::uint64_t id) { ++held_[places_.at(id)]; }
  void release(std::uint64_t id) { --held_[places_.at(id)]; }
  bool contains(std::uint64_t id) const { return places_.contains(id); }
  std::size_t size() const { return places_.size(); }
  const std::map<std::uint64_t, std::uint32_t>& places() const { return places_; }
  const std::vector<std::uint64_t>& evicted() const { return evicted_; }

 private:
  static constexpr std::uint64_t kNothing = ~std::uint64_t{0};
  std::unique_ptr<EvictionPolicy> policy_;
  std::vector<std::uint16_t> held_;
  std::vector<std::uint64_t> ids_;
  std::vector<std::uint32_t> free_;
  std::map<std::uint64_t, std::uint32_t> places_;
  std::vector<std::uint64_t> evicted_;
};

class EvictionContract : public ::testing::TestWithParam<std::string> {};

/// Random uses, holds and removals; the checks are in Cache, the answer is the order of evictions.
std::vector<std::uint64_t> random_run(std::string_view policy, std::uint32_t capacity,
                                      std::uint64_t seed) {
  Cache cache(policy, capacity);
  std::mt19937_64 random(seed);
  std::set<std::uint64_t> held;
  for (int i = 0; i < 20000; ++i) {
    const std::uint64_t id = std::min(random() % (3 * capacity), random() % (3 * capacity));
    switch (random() % 8) {
      case 0:
        if (cache.contains(id) && held.insert(id).second) cache.hold(id);
        break;
      case 1:
      case 2:
        if (!held.empty()) {
          cache.release(*held.begin());
          held.erase(held.begin());
        }
        break;
      case 3:
        if (cache.contains(id) && !held.contains(id)) cache.remove(id);
        break;
      default: {
        const bool full_of_held = cache.size() == capacity && held.size() == capacity;
        const auto hit = cache.use(id);
        EXPECT_EQ(hit.has_value(), cache.contains(id));
        // There is a victim exactly when something is not held.
        EXPECT_TRUE(hit.has_value() || full_of_held);
      }
    }
    EXPECT_LE(cache.size(), capacity);
  }
  return cache.evicted();
}

TEST_P(EvictionContract, EvictsWhatIsThereAndNotHeld) {
  for (std::uint32_t capacity : {1u, 2u, 9u, 40u}) {
    EXPECT_FALSE(random_run(GetParam(), capacity, capacity).empty());
  }
}

TEST_P(EvictionContract, TheSameCallsGiveTheSameAnswers) {
  EXPECT_EQ(random_run(GetParam(), 30, 5), random_run(GetParam(), 30, 5));
}

TEST_P(EvictionContract, AllHeldIsNoVictimAndChangesNothing) {
  Cache cache(GetParam(), 8);
  for (std::uint64_t id = 0; id < 8; ++id) {
    cache.use(id);
    cache.hold(id);
  }
  for (int i = 0; i < 3; ++i) EXPECT_FALSE(cache.use(100).has_value());
  cache.release(5);
  EXPECT_EQ(cache.use(100), false);
  EXPECT_FALSE(cache.contains(5));
}

TEST_P(EvictionContract, WhatIsUsedOftenCanStillLeaveWhenTheRestIsHeld) {
  Cache cache(GetParam(), 40);
  for (int round = 0; round < 4; ++round) {
    for (std::uint64_t id = 0; id < 40; ++id) cache.use(id);
  }
  // One leaves, so that a policy with two queues moves the others to its main one; they are held.
  cache.use(100);
  for (const auto& [id, place] : cache.places()) cache.hold(id);
  cache.release(100);
  for (int i = 0; i < 5; ++i) cache.use(100);
  EXPECT_EQ(cache.use(101), false);
  EXPECT_FALSE(cache.contains(100));
}

TEST_P(EvictionContract, NothingLiesInACacheWithoutPlaces) {
  Cache cache(GetParam(), 0);
  EXPECT_FALSE(cache.use(1).has_value());
}

TEST_P(EvictionContract, WhatIsRemovedIsForgotten) {
  Cache cache(GetParam(), 4);
  for (std::uint64_t id = 0; id < 4; ++id) cache.use(id);
  cache.remove(2);
  cache.remove(0);
  EXPECT_EQ(cache.use(10), false);
  EXPECT_EQ(cache.use(11), false);
  EXPECT_EQ(cache.size(), 4u);
  EXPECT_TRUE(cache.evicted().empty());
}

TEST_P(EvictionContract, WhatIsStreamedLeavesFirstUnlessItIsUsed) {
  auto policy = make_eviction_policy(GetParam(), 8).value();
  std::vector<std::uint16_t> held(8);
  for (std::uint32_t place = 0; place < 5; ++place) policy->admit(place, place, Admission::kUsed);
  for (std::uint32_t place = 5; place < 8; ++place) {
    policy->admit(place, place, Admission::kStreamed);
  }
  policy->touch(6);
  held[5] = 1;
  EXPECT_EQ(policy->evict(held), 7u);
  // A stream goes on in the place that it left, past what it still holds.
  for (std::uint64_t id = 10; id < 20; ++id) {
    policy->admit(7, id, Admission::kStreamed);
    EXPECT_EQ(policy->evict(held), 7u);
  }
  held[5] = 0;
  EXPECT_EQ(policy->evict(held), 5u);
  const std::optional<std::uint32_t> used = policy->evict(held);
  ASSERT_TRUE(used.has_value());
  EXPECT_NE(*used, 6u) << "used last";
  policy->remove(6);
}

TEST_P(EvictionContract, AllocatesNothingAfterItIsMade) {
  auto policy = make_eviction_policy(GetParam(), 64).value();
  const std::vector<std::uint16_t> held(64);
  const std::uint64_t before = testing::allocation_count();
  for (std::uint32_t place = 0; place < 64; ++place) policy->admit(place, place, Admission::kUsed);
  for (std::uint64_t id = 64; id < 5000; ++id) {
    const auto place = policy->evict(held);
    if (!place.has_value()) break;
    policy->admit(*place, id % 200, Admission::kUsed);
    policy->touch(static_cast<std::uint32_t>(id % 64));
  }
  EXPECT_EQ(testing::allocation_count(), before);
}

INSTANTIATE_TEST_SUITE_P(All, EvictionContract, ::testing::ValuesIn([] {
                           std::vector<std::string> names;
                           for (std::string_view name : known_eviction_policies()) {
                             names.emplace_back(name);
                           }
                           return names;
                         }()),
                         [](const auto& instance) {
                           std::string name = instance.param;
                           std::ranges::replace(name, '-', '_');
                           return name;
                         });

TEST(Lru, EqualsAPlainList) {
  constexpr std::uint32_t kCapacity = 20;
  auto policy = make_eviction_policy("lru", kCapacity).value();
  std::list<std::uint32_t> model;  // Places, the coldest last.
  std::vector<std::uint16_t> held(kCapacity);
  std::mt19937_64 random(3);
  const auto in_model = [&](std::uint32_t place) {
    return std::ranges::find(model, place) != model.end();
  };
  int evictions = 0;
  for (int i = 0; i < 50000; ++i) {
    const auto place = static_cast<std::uint32_t>(random() % kCapacity);
    switch (random() % 6) {
      case 0:
      case 1:
        if (in_model(place)) {
          policy->touch(place);
          model.remove(place);
        } else {
          policy->admit(place, random(), Admission::kUsed);
        }
        model.push_front(place);
        break;
      case 2:
        if (in_model(place)) {
          policy->remove(place);
          model.remove(place);
        }
        break;
      case 3: held[place] = static_cast<std::uint16_t>(random() % 2); break;
      default: {
        std::optional<std::uint32_t> expected;
        std::list<std::uint32_t> passed;
        while (!model.empty() && !expected.has_value()) {
          if (held[model.back()] == 0) {
            expected = model.back();
          } else {
            passed.push_front(model.back());
          }
          model.pop_back();
        }
        model.splice(model.begin(), passed);
        ASSERT_EQ(policy->evict(held), expected) << "call " << i;
        evictions += expected.has_value() ? 1 : 0;
      }
    }
  }
  EXPECT_GT(evictions, 1000);
}

/// Share of the uses of a hot set that are hits while a scan of ids used once runs through.
double hot_hits_under_a_scan(std::string_view policy) {
  Cache cache(policy, 100);
  std::uint64_t once = 1000;
  int hits = 0;
  int uses = 0;
  for (int round = 0; round < 200; ++round) {
    for (std::uint64_t hot = 0; hot < 50; ++hot) {
      const auto hit = cache.use(hot);
      if (round < 20) continue;  // Until then everyone learns.
      ++uses;
      hits += *hit ? 1 : 0;
    }
    // More at once than the cache holds: by recency alone the hot set is gone each time.
    for (int i = 0; i < 120 && round >= 10; ++i) cache.use(once++);
  }
  return static_cast<double>(hits) / uses;
}

TEST(ScanResistance, AScanDoesNotWashOutWhatIsUsedAgain) {
  EXPECT_EQ(hot_hits_under_a_scan("lru"), 0.0);
  for (std::string_view policy : known_eviction_policies()) {
    if (policy == "lru") continue;
    EXPECT_GT(hot_hits_under_a_scan(policy), 0.9) << policy;
  }
}

}  // namespace
}  // namespace kvtier
