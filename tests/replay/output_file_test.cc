#include "tools/replay/output_file.h"

#include "tests/tools/make_trace.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <sstream>

namespace kvtier {
namespace {

std::string content_of(const std::filesystem::path& path) {
  std::stringstream text;
  text << std::ifstream(path).rdbuf();
  return text.str();
}

std::size_t entries(const std::filesystem::path& folder) {
  std::size_t count = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator(folder)) ++count;
  return count;
}

TEST(OutputFile, LeavesNothingUntilItIsWritten) {
  const ScratchFolder folder;
  const std::string path = folder.path() / "result";
  auto file = OutputFile::open(path);
  ASSERT_TRUE(file.ok());
  EXPECT_EQ(entries(folder.path()), 0u);
  ASSERT_TRUE(file->write("first").ok());
  EXPECT_EQ(content_of(path), "first");
  ASSERT_TRUE(file->write("second").ok());
  EXPECT_EQ(content_of(path), "second");
  EXPECT_EQ(entries(folder.path()), 1u);
}

TEST(OutputFile, FollowsALinkInsteadOfReplacingIt) {
  const ScratchFolder folder;
  const auto target = folder.path() / "target";
  const auto link = folder.path() / "link";
  std::ofstream(target) << "old";
  std::filesystem::create_symlink(target, link);
  auto file = OutputFile::open(link);
  ASSERT_TRUE(file.ok());
  ASSERT_TRUE(file->write("new").ok());
  EXPECT_TRUE(std::filesystem::is_symlink(link));
  EXPECT_EQ(content_of(target), "new");
}

TEST(OutputFile, DoesNotReplaceADevice) {
  auto file = OutputFile::open("/dev/null");
  ASSERT_TRUE(file.ok());
  ASSERT_TRUE(file->write("gone").ok());
  EXPECT_TRUE(std::filesystem::is_character_file("/dev/null"));
}

TEST(OutputFile, RefusesWhatCannotBeWritten) {
  const ScratchFolder folder;
  for (const std::string& path : {folder.path().string(), (folder.path() / "no" / "where").string(),
                                  std::string("/proc/result")}) {
    const auto file = OutputFile::open(path);
    ASSERT_FALSE(file.ok()) << path;
    EXPECT_EQ(file.status().code(), StatusCode::kInvalidArgument);
    EXPECT_NE(file.status().message().find(path), std::string::npos);
  }
}

}  // namespace
}  // namespace kvtier
