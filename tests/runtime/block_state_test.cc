#include "runtime/block_state.h"

#include <gtest/gtest.h>

#include <fstream>
#include <iterator>
#include <regex>
#include <set>
#include <sstream>
#include <string>

namespace kvtier {
namespace {

template <typename State, typename Event, std::size_t kRows>
void expect_sound(const Transition<State, Event> (&table)[kRows], int states, int events) {
  std::set<std::pair<int, int>> seen;
  for (const auto& row : table) {
    EXPECT_TRUE(seen.emplace(static_cast<int>(row.from), static_cast<int>(row.event)).second)
        << to_string(row.from) << " has two answers to " << to_string(row.event);
    EXPECT_EQ(advance(row.from, row.event), row.to);
  }
  int legal = 0;
  for (int state = 0; state < states; ++state) {
    for (int event = 0; event < events; ++event) {
      legal += is_legal(static_cast<State>(state), static_cast<Event>(event)) ? 1 : 0;
    }
  }
  EXPECT_EQ(static_cast<std::size_t>(legal), kRows);
}

TEST(BlockState, TablesAreFunctions) {
  expect_sound(kHomeTransitions, kHomeStateCount, kHomeEventCount);
  expect_sound(kResidencyTransitions, kResidencyStateCount, kResidencyEventCount);
}

TEST(BlockState, EveryStateCanBeReachedAndLeft) {
  std::set<HomeState> reached{HomeState::kFree};
  std::set<HomeState> left;
  for (const auto& row : kHomeTransitions) {
    reached.insert(row.to);
    left.insert(row.from);
  }
  EXPECT_EQ(reached.size(), static_cast<std::size_t>(kHomeStateCount));
  EXPECT_EQ(left.size(), static_cast<std::size_t>(kHomeStateCount));
}

TEST(BlockStateDeath, IllegalEventsAbortWithBothNames) {
  EXPECT_DEATH((void)advance(HomeState::kHost, HomeEvent::kDropFrame), "drop_frame.*host");
  EXPECT_DEATH((void)advance(ResidencyState::kOpen, ResidencyEvent::kEvict), "evict.*open");
}

// The drawing in the folder's README names every transition; one that is added here and not there
// (or the other way round) fails.
TEST(BlockState, DrawingInTheReadmeIsUpToDate) {
  std::ifstream file(KVTIER_SOURCE_DIR "/runtime/README.md");
  ASSERT_TRUE(file.is_open());
  std::stringstream text;
  text << file.rdbuf();
  const std::string readme = text.str();
  const std::regex row_of_the_table("(^|\\n)\\| `[a-z]+` \\| [a-z_]+ \\| `[a-z]+` \\|");
  const auto rows = static_cast<std::size_t>(
      std::distance(std::sregex_iterator(readme.begin(), readme.end(), row_of_the_table),
                    std::sregex_iterator()));
  const auto expect_row = [&](const char* from, const char* event, const char* to) {
    const std::string row = std::string("| `") + from + "` | " + event + " | `" + to + "` |";
    EXPECT_NE(readme.find(row), std::string::npos) << row;
  };
  for (const auto& row : kHomeTransitions) {
    expect_row(to_string(row.from), to_string(row.event), to_string(row.to));
  }
  for (const auto& row : kResidencyTransitions) {
    expect_row(to_string(row.from), to_string(row.event), to_string(row.to));
  }
  EXPECT_EQ(rows, std::size(kHomeTransitions) + std::size(kResidencyTransitions));
}

}  // namespace
}  // namespace kvtier
