#include "tools/cli/parse.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace kvtier {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

TEST(ParseBytes, Accepts) {
  const std::pair<const char*, std::uint64_t> cases[] = {
      {"0", 0},
      {"4096", 4096},
      {"128KiB", 128 << 10},
      {"64MiB", 64 << 20},
      {"1GiB", 1 << 30},
      {"2TiB", std::uint64_t{2} << 40},
      {"18446744073709551615", ~std::uint64_t{0}},
  };
  for (const auto& [text, expected] : cases) {
    const auto bytes = parse_bytes(text);
    ASSERT_TRUE(bytes.ok()) << text;
    EXPECT_EQ(*bytes, expected) << text;
  }
}

TEST(ParseBytes, Refuses) {
  for (const char* text : {"", " 1", "1 ", "1 KiB", "-1", "+1", "1.5GiB", "64MB", "64M", "KiB",
                           "1KiBx", "0x10", "1e3", "18446744073709551616", "16777216TiB", "10%"}) {
    const auto bytes = parse_bytes(text);
    ASSERT_FALSE(bytes.ok()) << text;
    EXPECT_EQ(bytes.status().code(), StatusCode::kInvalidArgument);
    EXPECT_THAT(bytes.status().message(), HasSubstr(fmt::format("found '{}', expected", text)));
  }
}

TEST(ParseCount, TakesDigitsOnly) {
  EXPECT_EQ(parse_count("512").value(), 512u);
  EXPECT_EQ(parse_count("0").value(), 0u);
  for (const char* text : {"", "-1", "+1", "1.0", "1e3", "12a", " 1", "99999999999999999999"}) {
    EXPECT_FALSE(parse_count(text).ok()) << text;
  }
}

TEST(ParseNumber, TakesTheWholeText) {
  EXPECT_EQ(parse_number("1e-3").value(), 1e-3);
  EXPECT_EQ(parse_number("0.5").value(), 0.5);
  EXPECT_EQ(parse_number("-2").value(), -2.0);
  for (const char* text : {"", "1e-3x", "1,5", " 1", "nan", "inf", "1e999", "0x1p3", "--1"}) {
    EXPECT_FALSE(parse_number(text).ok()) << text;
  }
}

TEST(SplitList, RespectsParentheses) {
  EXPECT_THAT(split_list("a").value(), ElementsAre("a"));
  EXPECT_THAT(split_list("a,b,c").value(), ElementsAre("a", "b", "c"));
  EXPECT_THAT(split_list("a(x=1,y=2),b").value(), ElementsAre("a(x=1,y=2)", "b"));
  EXPECT_THAT(split_list("a((1,2),3)").value(), ElementsAre("a((1,2),3)"));
  for (const char* text : {"", ",", "a,", ",a", "a,,b", "a(b", "a)b", "a)(b", "a(b,c"}) {
    EXPECT_FALSE(split_list(text).ok()) << text;
  }
}

TEST(Share, IsExact) {
  const struct {
    const char* text;
    std::uint64_t whole;
    std::uint64_t expected;
  } cases[] = {
      {"100%", 7547, 7547},
      {"2%", 7379, 147},  // 147.58 rounds down: a budget is never exceeded.
      {"2%", 7400, 148},  // In floating point 0.02 * 7400 may fall below 148.
      {"7%", 100, 7},
      {"0.5%", 1000, 5},
      {"0.000001%", 100'000'000, 1},
      {"0%", 1000, 0},
      {"1000%", 5, 50},
      {"33.333333%", 300'000'000, 99'999'999},
      {"100%", std::uint64_t{1} << 60, std::uint64_t{1} << 60},
  };
  for (const auto& item : cases) {
    const auto share = Share::parse(item.text);
    ASSERT_TRUE(share.ok()) << item.text;
    EXPECT_EQ(share->of(item.whole), item.expected) << item.text << " of " << item.whole;
  }
}

TEST(Share, Refuses) {
  for (const char* text : {"", "%", "2", "2 %", "-2%", "2.%", ".5%", "1001%", "1000.1%", "2%%",
                           "1e1%", "0.0000001%", "2.-5%", "nan%"}) {
    EXPECT_FALSE(Share::parse(text).ok()) << text;
  }
}

TEST(Capacity, IsBytesOrAShareOfTheKvBytes) {
  EXPECT_EQ(Capacity::parse("64MiB")->bytes(1000), 64u << 20);
  EXPECT_EQ(Capacity::parse("10%")->bytes(1000), 100u);
  EXPECT_EQ(Capacity::parse("110%")->bytes(1000), 1100u);
  EXPECT_EQ(Capacity::parse("10%")->text(), "10%");
  for (const char* text : {"", "64MB", "10 %", "ten", "-1"}) {
    const auto capacity = Capacity::parse(text);
    ASSERT_FALSE(capacity.ok()) << text;
    EXPECT_THAT(capacity.status().message(), HasSubstr("expected"));
  }
}

TEST(Budget, IsTokensOrAShareOfTheVisibleOnes) {
  EXPECT_EQ(Budget::parse("512")->tokens(7547), 512u);
  EXPECT_EQ(Budget::parse("512")->tokens(100), 100u);
  EXPECT_EQ(Budget::parse("2%")->tokens(7400), 148u);
  EXPECT_EQ(Budget::parse("100%")->tokens(7547), 7547u);
  EXPECT_EQ(Budget::parse("2%")->text(), "2%");
  for (const char* text : {"", "0", "0%", "101%", "100.000001%", "-5", "5.5", "512KiB", "all"}) {
    EXPECT_FALSE(Budget::parse(text).ok()) << text;
  }
}

TEST(FormatBytes, UsesTheLargestUnitThatFits) {
  EXPECT_EQ(format_bytes(0), "0 B");
  EXPECT_EQ(format_bytes(1023), "1023 B");
  EXPECT_EQ(format_bytes(1024), "1.0 KiB");
  EXPECT_EQ(format_bytes(11'592'192), "11.1 MiB");
}

}  // namespace
}  // namespace kvtier
