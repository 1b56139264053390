#include "tools/cli/options.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace kvtier {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

struct Parsed {
  std::string path;
  std::uint64_t extent_bytes = 131072;
  std::vector<std::string> selectors = {"landmark"};
};

Result<std::string> as_is(std::string_view text) { return std::string(text); }

// What a verb would see, or the message that ends parsing.
Result<Parsed> parse(const std::vector<std::string>& arguments) {
  Parsed parsed;
  CLI::App app;
  app.add_option("PATH", parsed.path)->required();
  add_value(app, "--extent-bytes", parsed.extent_bytes, parse_bytes, "Extent", "128KiB");
  add_values(app, "--selector", parsed.selectors, as_is, "Selectors", "landmark");
  try {
    // CLI11 takes the words in reverse.
    app.parse(std::vector<std::string>(arguments.rbegin(), arguments.rend()));
  } catch (const CLI::ParseError& error) {
    return invalid_argument(error.what());
  }
  return parsed;
}

TEST(Options, DefaultsStayWithoutValues) {
  const auto parsed = parse({"trace"});
  ASSERT_TRUE(parsed.ok()) << parsed.status().message();
  EXPECT_EQ(parsed->extent_bytes, 131072u);
  EXPECT_THAT(parsed->selectors, ElementsAre("landmark"));
}

TEST(Options, ValuesAreParsed) {
  EXPECT_EQ(parse({"trace", "--extent-bytes", "64KiB"})->extent_bytes, 65536u);
  EXPECT_EQ(parse({"trace", "--extent-bytes=64KiB"})->extent_bytes, 65536u);
}

TEST(Options, SeveralValuesAreRepeatedOrSeparatedByCommas) {
  EXPECT_THAT(parse({"trace", "--selector", "a,b(c,d)"})->selectors, ElementsAre("a", "b(c,d)"));
  EXPECT_THAT(parse({"trace", "--selector", "a", "--selector", "b,c"})->selectors,
              ElementsAre("a", "b", "c"));
}

TEST(Options, APositionalArgumentMayFollowSeveralValues) {
  const auto parsed = parse({"--selector", "a,b", "trace"});
  ASSERT_TRUE(parsed.ok()) << parsed.status().message();
  EXPECT_EQ(parsed->path, "trace");
  EXPECT_THAT(parsed->selectors, ElementsAre("a", "b"));
}

TEST(Options, WrongValuesNameTheOption) {
  const auto bytes = parse({"trace", "--extent-bytes", "64KB"});
  ASSERT_FALSE(bytes.ok());
  EXPECT_THAT(bytes.status().message(), HasSubstr("--extent-bytes: found '64KB', expected bytes"));
  const auto list = parse({"trace", "--selector", "a,,b"});
  ASSERT_FALSE(list.ok());
  EXPECT_THAT(list.status().message(), HasSubstr("--selector: found 'a,,b', expected"));
}

}  // namespace
}  // namespace kvtier
