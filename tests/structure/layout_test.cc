#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <set>
#include <string>
#include <vector>

namespace kvtier {
namespace {

namespace fs = std::filesystem;

const std::set<std::string> kFolders = {"kernels", "memory", "runtime", "selectors",
                                        "tests",   "tools",  "transfer"};
const std::set<std::string> kFiles = {"CHANGELOG.md", "CMakeLists.txt", "CMakePresets.json",
                                      "LICENSE",      "README.md",      "pyproject.toml"};
// What tools leave behind; all of it is ignored by git.
const std::set<std::string> kIgnored = {"build", "compile_commands.json"};

// Names at the top level that have no place there. Dot files are the business of their tools.
std::vector<std::string> strangers(const std::set<std::string>& names) {
  std::vector<std::string> found;
  for (const std::string& name : names) {
    const bool known =
        kFolders.count(name) > 0 || kFiles.count(name) > 0 || kIgnored.count(name) > 0;
    if (!known && !name.starts_with('.')) found.push_back(name);
  }
  return found;
}

std::set<std::string> top_level(const fs::path& root) {
  std::set<std::string> names;
  for (const auto& entry : fs::directory_iterator(root)) {
    names.insert(entry.path().filename().string());
  }
  return names;
}

TEST(Layout, TopLevelIsTheFixedSet) {
  const std::set<std::string> names = top_level(KVTIER_SOURCE_DIR);
  EXPECT_THAT(strangers(names), testing::IsEmpty());
  for (const std::string& folder : kFolders) EXPECT_EQ(names.count(folder), 1u) << folder;
  for (const char* file : {"CMakeLists.txt", "CMakePresets.json", "LICENSE", "README.md"}) {
    EXPECT_EQ(names.count(file), 1u) << file;
  }
}

TEST(Layout, StrangersAreCaught) {
  EXPECT_THAT(strangers({".git", "memory", "build", "README.md", "util", "notes.txt"}),
              testing::ElementsAre("notes.txt", "util"));
}

TEST(Layout, EveryFolderSaysWhatItIsFor) {
  for (const std::string& folder : kFolders) {
    const fs::path readme = fs::path(KVTIER_SOURCE_DIR) / folder / "README.md";
    ASSERT_TRUE(fs::exists(readme)) << readme;
    EXPECT_GT(fs::file_size(readme), 200u) << readme;
  }
}

}  // namespace
}  // namespace kvtier
