#include "tools/trace/head_classes.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <string>

namespace kvtier {
namespace {

using ::testing::HasSubstr;

class HeadClassesTest : public ::testing::Test {
 protected:
  HeadClassesTest() { std::filesystem::create_directories(folder_); }
  ~HeadClassesTest() override { std::filesystem::remove_all(folder_); }

  std::string write(const std::string& text) const {
    const std::string path = folder_ / "heads.json";
    std::ofstream(path) << text;
    return path;
  }

  std::filesystem::path folder_ = std::filesystem::temp_directory_path() /
                                  ::testing::UnitTest::GetInstance()->current_test_info()->name();
};

TEST_F(HeadClassesTest, ReadsLayersAndHeads) {
  const auto classes =
      read_head_classes(write(R"({"schema": "kvtier.head-classes", "version": 1, "model": "ignored",
                "retrieval": [[true, false], [false, false]]})"));
  ASSERT_TRUE(classes.ok()) << classes.status().to_string();
  EXPECT_EQ(classes->retrieval, (std::vector<std::vector<bool>>{{true, false}, {false, false}}));
}

TEST_F(HeadClassesTest, SaysWhatIsWrong) {
  const struct {
    const char* text;
    const char* says;
  } kCases[] = {
      {"", "document"},
      {"[]", "expected an object"},
      {R"({"schema": "other", "version": 1, "retrieval": []})", "kvtier.head-classes"},
      {R"({"schema": "kvtier.head-classes", "version": 2, "retrieval": []})", "version"},
      {R"({"schema": "kvtier.head-classes", "version": 1})", "retrieval"},
      {R"({"schema": "kvtier.head-classes", "version": 1, "retrieval": [[1]]})", "retrieval[0][0]"},
      {R"({"schema": "kvtier.head-classes", "version": 1, "retrieval": [true]})", "retrieval[0]"},
  };
  for (const auto& each : kCases) {
    const std::string path = write(each.text);
    const auto classes = read_head_classes(path);
    ASSERT_FALSE(classes.ok()) << each.text;
    EXPECT_THAT(classes.status().message(), HasSubstr(each.says));
    EXPECT_THAT(classes.status().message(), HasSubstr("heads.json"));
  }
  EXPECT_EQ(read_head_classes(folder_ / "nowhere.json").status().code(), StatusCode::kNotFound);
  EXPECT_THAT(read_head_classes("").status().message(), HasSubstr("file="));
}

TEST_F(HeadClassesTest, NamesOnTheCommandLineReachTheFile) {
  const std::string path =
      write(R"({"schema": "kvtier.head-classes", "version": 1, "retrieval": [[true]]})");
  EXPECT_TRUE(
      make_selector_factory("head-class(file=" + path + ")/mean", selector_resources()).ok());
  EXPECT_FALSE(make_selector_factory("head-class/mean", selector_resources()).ok());
}

}  // namespace
}  // namespace kvtier
