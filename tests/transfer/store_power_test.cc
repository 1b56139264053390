// Loss of power at every kind of moment, on a drive that drops, tears, reorders and misdirects what
// was not synced.

#include "tests/transfer/store_world.h"
#include "transfer/store.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <iostream>
#include <map>
#include <random>
#include <set>

namespace kvtier {
namespace store_power {

using test::ItemShape;
using test::ItemVerdict;
using test::key_of;
using test::SimulatedDrive;

constexpr std::uint64_t kPowerCapacity = 3 << 20;

struct Outcomes {
  std::uint64_t items_checked = 0;
  std::uint64_t blocks_refused = 0;
  std::uint64_t rebuilt = 0;
};

ItemShape shape_of(std::uint64_t number) {
  return {.extents = 1 + static_cast<std::uint32_t>(number % 3),
          .blob_bytes = number % 5 == 0 ? 70'000 : number * 37 % 5000};
}

// One store through several losses of power.
class PowerWalk {
 public:
  PowerWalk(std::uint64_t seed, Durability level, SimulatedDrive::Misdirect misdirect)
      : random_(seed), level_(level), misdirect_(misdirect) {}

  void run(Outcomes& outcomes) {
    for (int life = 0; life < 3; ++life) {
      auto opened = Store::open(drive_.open(), test::store_options(kPowerCapacity, level_));
      if (!opened.ok() && misdirect_ == SimulatedDrive::Misdirect::kAnywhere) return;
      ASSERT_TRUE(opened.ok()) << opened.status().to_string();
      Store& store = **opened;
      outcomes.rebuilt += store.stats().rebuilt;
      check(store, outcomes);
      // The first opening makes the files: that much is allowed to be whole.
      drive_.stop_after(20 + random_() % 120);
      while (!drive_.stopped()) step(store);
      const Status closed = store.close();
      ASSERT_FALSE(closed.ok());
      drive_.lose_power(random_(), misdirect_);
    }
  }

 private:
  enum class State : unsigned char { kSure, kUnsure, kGone };

  void step(Store& store) {
    const std::uint64_t number = 1 + random_() % 30;
    if (random_() % 4 == 0) {
      if (!store.contains(key_of(number))) return;
      state_[number] = State::kUnsure;
      if (store.erase(key_of(number)).ok()) state_[number] = State::kGone;
    } else if (!store.contains(key_of(number))) {
      state_[number] = State::kUnsure;
      const Status status = test::put_item(store, layout_, number, shape_of(number));
      if (status.ok()) state_[number] = State::kSure;
    }
    // What was evicted may or may not be there later.
    for (auto& [known, state] : state_) {
      if (state == State::kSure && !store.contains(key_of(known))) state = State::kUnsure;
    }
  }

  void check(Store& store, Outcomes& outcomes) {
    std::set<StoreKey> possible;
    for (auto& [number, state] : state_) {
      possible.insert(key_of(number));
      const ItemVerdict verdict = test::read_item(store, layout_, number, shape_of(number));
      ++outcomes.items_checked;
      outcomes.blocks_refused += verdict.bad_blocks;
      ASSERT_FALSE(verdict.wrong) << "item " << number;
      const bool promised =
          level_ == Durability::kPower && misdirect_ == SimulatedDrive::Misdirect::kOntoUnsynced;
      if (promised && state == State::kSure) {
        ASSERT_TRUE(verdict.found && verdict.whole)
            << "item " << number << ": " << verdict.status.to_string() << "; " << store.notice();
      }
      if (promised && state == State::kGone) {
        ASSERT_FALSE(verdict.found) << "item " << number << "; " << store.notice();
      }
      // What is only half there is dropped by whoever finds it.
      if (verdict.found && !verdict.whole) {
        ASSERT_TRUE(store.erase(key_of(number)).ok());
      }
      // What was cut off may lie there whole without being listed, and a later rebuild finds it.
      if (store.contains(key_of(number))) {
        state = State::kSure;
      } else if (state == State::kSure) {
        state = State::kUnsure;
      }
    }
    store.for_each([&](const StoreKey& key) { ASSERT_TRUE(possible.contains(key)); });
  }

  BlockLayout layout_ = test::small_layout();
  SimulatedDrive drive_;
  std::mt19937_64 random_;
  Durability level_;
  SimulatedDrive::Misdirect misdirect_;
  std::map<std::uint64_t, State> state_;
};

void walk_all(std::uint64_t seeds, Durability level, SimulatedDrive::Misdirect misdirect) {
  if (const char* count = std::getenv("KVTIER_LONG_COUNT")) {
    seeds = std::strtoull(count, nullptr, 10);
  }
  Outcomes outcomes;
  for (std::uint64_t seed = 0; seed < seeds; ++seed) {
    SCOPED_TRACE(seed);
    PowerWalk walk(seed, level, misdirect);
    walk.run(outcomes);
    if (::testing::Test::HasFatalFailure()) return;
  }
  std::cout << seeds << " seeds of three losses each: " << outcomes.items_checked
            << " items checked, " << outcomes.blocks_refused << " blocks refused, "
            << outcomes.rebuilt << " rebuilt from the segments\n";
  // A drive that damages nothing would prove nothing.
  EXPECT_GT(outcomes.rebuilt, seeds / 50);
}

TEST(StorePowerTest, AcknowledgedItemsSurviveAtLevelPower) {
  walk_all(200, Durability::kPower, SimulatedDrive::Misdirect::kOntoUnsynced);
}

TEST(StorePowerTest, NothingWrongIsReturnedAtLevelCrash) {
  walk_all(60, Durability::kCrash, SimulatedDrive::Misdirect::kOntoUnsynced);
}

TEST(StorePowerTest, NothingWrongIsReturnedWhenSyncedContentIsHit) {
  walk_all(60, Durability::kPower, SimulatedDrive::Misdirect::kAnywhere);
}

}  // namespace store_power
}  // namespace kvtier
