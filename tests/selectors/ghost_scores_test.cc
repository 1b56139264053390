#include "selectors/ghost_scores.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <deque>
#include <random>

namespace kvtier {
namespace {

TEST(GhostScores, EqualsAPlainQueue) {
  for (std::uint32_t capacity : {0u, 1u, 2u, 7u, 64u}) {
    GhostScores ghosts(capacity);
    // Every push takes a cell of the ring; what was taken out, or pushed again, leaves a hole.
    struct Cell {
      std::uint64_t id;
      double score;
      bool live;
    };
    std::deque<Cell> model;
    std::mt19937_64 random(capacity);
    const auto forget = [&](std::uint64_t id) -> std::optional<double> {
      for (Cell& cell : model) {
        if (cell.live && cell.id == id) {
          cell.live = false;
          return cell.score;
        }
      }
      return std::nullopt;
    };
    for (int i = 0; i < 20000; ++i) {
      // Few ids, far apart and all alike below, so that probes collide and wrap around.
      const std::uint64_t id = (random() % (2 * capacity + 3)) << 40;
      if (random() % 3 == 0) {
        ASSERT_EQ(ghosts.take(id), forget(id)) << "capacity " << capacity << ", call " << i;
      } else {
        ghosts.push(id, i);
        forget(id);
        model.push_back({id, static_cast<double>(i), true});
        if (model.size() > capacity) model.pop_front();
      }
    }
  }
}

}  // namespace
}  // namespace kvtier
