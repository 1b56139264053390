#include "transfer/space_map.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <iostream>
#include <map>
#include <random>
#include <set>

namespace kvtier {
namespace space_map {

// Whether the map agrees with a plain set of taken units.
class Model {
 public:
  void take(std::uint32_t unit, std::uint32_t units) {
    ASSERT_EQ(unit % units, 0U);
    ASSERT_EQ(unit / 4, (unit + units - 1) / 4);
    for (std::uint32_t i = 0; i < units; ++i) ASSERT_TRUE(taken_.insert(unit + i).second);
  }
  void give_back(std::uint32_t unit, std::uint32_t units) {
    for (std::uint32_t i = 0; i < units; ++i) taken_.erase(unit + i);
  }
  std::size_t taken() const { return taken_.size(); }
  std::size_t free_chunks(std::uint32_t chunks) const {
    std::set<std::uint32_t> touched;
    for (const std::uint32_t unit : taken_) touched.insert(unit / 4);
    return chunks - touched.size();
  }

 private:
  std::set<std::uint32_t> taken_;
};

TEST(SpaceMapTest, AgreesWithASetOfUnits) {
  constexpr std::uint32_t kChunks = 50;
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    SCOPED_TRACE(seed);
    std::mt19937_64 random(seed);
    SpaceMap map(kChunks);
    Model model;
    std::vector<std::pair<std::uint32_t, std::uint32_t>> places;
    for (int step = 0; step < 2000; ++step) {
      if (random() % 5 < 3) {
        const std::uint32_t units = 1u << random() % 3;
        if (const auto unit = map.take(units)) {
          model.take(*unit, units);
          places.emplace_back(*unit, units);
        } else if (units == 1) {
          ASSERT_EQ(model.taken(), kChunks * 4);
        }
      } else if (!places.empty()) {
        std::swap(places[random() % places.size()], places.back());
        map.give_back(places.back().first, places.back().second);
        model.give_back(places.back().first, places.back().second);
        places.pop_back();
      }
      ASSERT_EQ(map.free_units(), kChunks * 4 - model.taken());
      ASSERT_EQ(map.free_chunks(), model.free_chunks(kChunks));
    }
    // Another map takes the same places by name, and no place twice.
    SpaceMap rebuilt(kChunks);
    for (const auto& [unit, units] : places) {
      ASSERT_TRUE(rebuilt.claim(unit, units));
      ASSERT_FALSE(rebuilt.claim(unit, units));
    }
    EXPECT_EQ(rebuilt.free_units(), map.free_units());
    EXPECT_EQ(rebuilt.free_chunks(), map.free_chunks());
  }
}

TEST(SpaceMapTest, RefusesPlacesThatAreNone) {
  SpaceMap map(2);
  EXPECT_FALSE(map.claim(1, 2));
  EXPECT_FALSE(map.claim(2, 4));
  EXPECT_FALSE(map.claim(8, 1));
  EXPECT_FALSE(map.claim(0, 3));
  EXPECT_FALSE(map.claim(0, 0));
  EXPECT_EQ(map.free_units(), 8U);
  EXPECT_TRUE(map.claim(4, 4));
  EXPECT_EQ(map.free_chunks(), 1U);
}

TEST(SpaceMapTest, HolesAreFilledBeforeChunksAreBroken) {
  SpaceMap map(4);
  EXPECT_EQ(map.take(1), 0U);
  EXPECT_EQ(map.take(2), 2U);  // The pair beside it.
  EXPECT_EQ(map.take(1), 1U);  // The hole that is left.
  EXPECT_EQ(map.free_chunks(), 3U);
  EXPECT_EQ(map.take(4), 4U);
  EXPECT_EQ(map.free_chunks(), 2U);
}

TEST(SpaceMapTest, MovesGatherWhatDeletionScattered) {
  constexpr std::uint32_t kChunks = 1000;
  SpaceMap map(kChunks);
  std::mt19937_64 random(1);
  std::map<std::uint32_t, std::uint32_t> places;
  while (true) {
    const std::uint32_t units = 1u << random() % 3;
    const auto unit = map.take(units);
    if (!unit) break;
    places[*unit] = units;
  }
  // Half of everything goes at random: next to no chunk is whole then.
  for (auto it = places.begin(); it != places.end();) {
    if (random() % 2 == 0) {
      map.give_back(it->first, it->second);
      it = places.erase(it);
    } else {
      ++it;
    }
  }
  const auto share = [&] {
    return static_cast<double>(map.free_chunks() * 4) / static_cast<double>(map.free_units());
  };
  EXPECT_LT(share(), 0.8);
  const std::uint64_t free = map.free_units();
  int moves = 0;
  while (const auto move = map.propose_move()) {
    ASSERT_LT(++moves, 4000) << "moving never ends";
    ASSERT_EQ(places.at(move->source), move->units);
    map.give_back(move->source, move->units);
    places.erase(move->source);
    ASSERT_TRUE(places.emplace(move->target, move->units).second);
  }
  EXPECT_EQ(map.free_units(), free);
  EXPECT_GE(share(), 0.99);
  for (const auto& [unit, units] : places) map.give_back(unit, units);
  EXPECT_EQ(map.free_chunks(), kChunks);
}

// Puts and deletes of mixed sizes, with the share of large ones and the filling going up and down;
// what random deletion scatters is moved together now and then, and the moves are counted.
void churn(std::uint64_t operations) {
  constexpr std::uint32_t kChunks = 1 << 15;
  SpaceMap map(kChunks);
  std::mt19937_64 random(7);
  std::vector<std::uint64_t> places;  // Unit << 3 | units.
  std::vector<std::uint32_t> at(kChunks * 4);
  const std::uint64_t phase_operations = operations / 20;
  std::uint64_t moves = 0;
  double worst = 1.0;
  const auto share = [&] {
    return static_cast<double>(map.free_chunks() * 4) / static_cast<double>(map.free_units());
  };
  for (std::uint64_t operation = 0; operation < operations; ++operation) {
    const std::uint64_t phase = operation / phase_operations;
    // From 70 to 95 percent full; now small places, now large ones are in fashion.
    const std::uint64_t full = 4ull * kChunks * (phase % 2 == 0 ? 95 : 70) / 100;
    const bool put =
        places.empty() ||
        (4ull * kChunks - map.free_units() < full ? random() % 8 < 5 : random() % 8 < 3);
    if (put) {
      const std::uint64_t draw = random() % 8;
      const std::uint32_t units = draw < 2 + phase % 3 * 2 ? 1 : draw < 6 + phase % 3 ? 2 : 4;
      const auto unit = map.take(units);
      if (!unit) continue;
      at[*unit] = static_cast<std::uint32_t>(places.size());
      places.push_back(std::uint64_t{*unit} << 3 | units);
    } else {
      const std::size_t victim = random() % places.size();
      const std::uint64_t place = places[victim];
      map.give_back(static_cast<std::uint32_t>(place >> 3), static_cast<std::uint32_t>(place & 7));
      places[victim] = places.back();
      at[places[victim] >> 3] = static_cast<std::uint32_t>(victim);
      places.pop_back();
    }
    if (operation % 64 != 0) continue;
    for (int i = 0; i < 64 && share() < 0.96; ++i) {
      const auto move = map.propose_move();
      if (!move) break;
      ++moves;
      map.give_back(move->source, move->units);
      const std::uint32_t index = at[move->source];
      places[index] = std::uint64_t{move->target} << 3 | move->units;
      at[move->target] = index;
    }
    worst = std::min(worst, share());
  }
  std::cout << operations << " operations, " << moves << " moves ("
            << static_cast<double>(moves) / static_cast<double>(operations)
            << " per operation), share of the free space in whole chunks: worst " << worst
            << ", at the end " << share() << "\n";
  EXPECT_GE(worst, 0.95);
}

TEST(SpaceMapTest, ChurnLeavesTheFreeSpaceWhole) {
  const char* count = std::getenv("KVTIER_LONG_COUNT");
  churn(count == nullptr ? 2'000'000 : std::strtoull(count, nullptr, 10));
}

}  // namespace space_map
}  // namespace kvtier
