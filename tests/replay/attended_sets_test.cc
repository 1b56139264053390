#include "tools/replay/attended_sets.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace kvtier {
namespace {

using ::testing::HasSubstr;
using Ranges = std::vector<AttendedRange>;

AttendedRange range(std::uint32_t group, std::uint32_t block, std::uint32_t first,
                    std::uint32_t tokens) {
  return {HeadGroup{group}, BlockIndex{block}, first, tokens};
}

// 20 visible tokens in blocks of 4, sinks [0, 2), window [17, 20).
const AttendedLimits kLimits{
    .head_groups = 1, .tokens_per_block = 4, .visible = 20, .budget = 11, .sinks = 2, .window = 3};

std::vector<std::pair<std::uint32_t, std::uint32_t>> spans_of(const AttendedSets& sets,
                                                              std::size_t index) {
  std::vector<std::pair<std::uint32_t, std::uint32_t>> pairs;
  for (const TokenSpan& span : sets.spans(index)) pairs.emplace_back(span.begin, span.end);
  return pairs;
}

TEST(AttendedSets, JoinsNeighboursAndKeepsGaps) {
  AttendedSets sets;
  const Ranges ranges = {range(0, 0, 0, 2), range(0, 2, 0, 4), range(0, 3, 0, 2),
                         range(0, 4, 1, 3)};
  ASSERT_TRUE(sets.add(ranges, kLimits).ok());
  EXPECT_THAT(spans_of(sets, 0),
              ::testing::ElementsAre(::testing::Pair(0u, 2u), ::testing::Pair(8u, 14u),
                                     ::testing::Pair(17u, 20u)));
  EXPECT_EQ(count_tokens(sets.spans(0)), 11u);
}

TEST(AttendedSets, TellsWhatWasAttendedWithKeptKeys) {
  AttendedSets sets;
  Ranges ranges = {range(0, 0, 0, 2), range(0, 1, 1, 3), range(0, 2, 0, 2), range(0, 3, 0, 1),
                   range(0, 4, 1, 3)};
  EXPECT_FALSE(sets.has_kept());
  ranges[1].kept_keys = ranges[2].kept_keys = ranges[3].kept_keys = true;
  ASSERT_TRUE(sets.add(ranges, kLimits).ok());
  EXPECT_TRUE(sets.has_kept());
  // What is refused leaves nothing behind, of kept keys neither.
  ranges[0].tokens = 1;
  ASSERT_FALSE(sets.add(ranges, kLimits).ok());
  ASSERT_EQ(sets.kept_spans(0).size(), 2u);
  EXPECT_EQ(sets.kept_spans(0)[0].begin, 5u);
  EXPECT_EQ(sets.kept_spans(0)[0].end, 10u);
  EXPECT_EQ(sets.kept_spans(0)[1].begin, 12u);
  EXPECT_TRUE(sets.kept_spans(1).empty());
}

TEST(AttendedSets, KeepsHeadGroupsAndStepsApart) {
  AttendedSets sets;
  AttendedLimits limits = kLimits;
  limits.head_groups = 2;
  const Ranges both = {range(0, 0, 0, 2), range(0, 4, 1, 3), range(1, 0, 0, 4), range(1, 4, 0, 4)};
  ASSERT_TRUE(sets.add(both, limits).ok());
  sets.add_nothing(2);
  ASSERT_EQ(sets.size(), 4u);
  EXPECT_EQ(count_tokens(sets.spans(0)), 5u);
  EXPECT_EQ(count_tokens(sets.spans(1)), 8u);
  EXPECT_EQ(count_tokens(sets.spans(2)), 0u);
}

TEST(AttendedSets, RefusesAnUnsoundAccount) {
  const AttendedRange sink = range(0, 0, 0, 2);
  const AttendedRange window = range(0, 4, 1, 3);
  const std::vector<std::pair<Ranges, std::string>> cases = {
      {{sink, range(0, 2, 0, 4), range(0, 2, 0, 1), window}, "twice"},
      {{sink, range(0, 3, 0, 1), range(0, 2, 0, 1), window}, "out of order"},
      {{range(0, 0, 1, 1), window}, "sinks"},
      {{sink, range(0, 4, 2, 2)}, "window"},
      {{sink, range(0, 4, 1, 2)}, "window"},
      {{sink, range(0, 1, 0, 4), range(0, 2, 0, 4), window}, "budget"},
      {{sink, range(0, 1, 2, 3), window}, "do not lie in it"},
      {{sink, window, range(0, 5, 0, 1)}, "before position 20"},
      {{sink, window, range(1, 0, 0, 1)}, "head groups"},
      {{}, "sinks"},
  };
  for (const auto& [ranges, expected] : cases) {
    AttendedSets sets;
    const Status status = sets.add(ranges, kLimits);
    EXPECT_FALSE(status.ok()) << expected;
    EXPECT_THAT(status.message(), HasSubstr(expected));
    ASSERT_EQ(sets.size(), 1u);
    EXPECT_EQ(count_tokens(sets.spans(0)), 0u) << "what is not sound must not be measured";
  }
}

TEST(AttendedSets, DigestTellsSetsApart) {
  const AttendedLimits limits{.head_groups = 2,
                              .tokens_per_block = 4,
                              .visible = 20,
                              .budget = 20,
                              .sinks = 0,
                              .window = 0};
  AttendedSets first, second, third;
  ASSERT_TRUE(first.add(Ranges{range(0, 1, 0, 4)}, limits).ok());
  ASSERT_TRUE(second.add(Ranges{range(0, 1, 0, 4)}, limits).ok());
  ASSERT_TRUE(third.add(Ranges{range(1, 1, 0, 4)}, limits).ok());
  EXPECT_EQ(first.digest(), second.digest());
  EXPECT_NE(first.digest(), third.digest());
}

}  // namespace
}  // namespace kvtier
