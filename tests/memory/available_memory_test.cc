#include "memory/available_memory.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <string>

namespace kvtier {
namespace {

namespace fs = std::filesystem;

constexpr std::size_t kMiB = std::size_t{1} << 20;

// A folder that looks like /proc and /sys/fs/cgroup, removed at the end.
class AvailableMemoryTest : public testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (fs::temp_directory_path() / "kvtier-accounts-XXXXXX").string();
    ASSERT_NE(mkdtemp(pattern.data()), nullptr);
    root_ = pattern;
    accounts_.proc = (root_ / "proc").string();
    accounts_.control_groups = (root_ / "cgroup").string();
  }
  void TearDown() override { fs::remove_all(root_); }

  void write(const std::string& path, const std::string& text) {
    fs::create_directories((root_ / path).parent_path());
    std::ofstream(root_ / path) << text;
  }
  void write_meminfo(std::size_t available_mib) {
    write("proc/meminfo",
          "MemTotal:       99999999 kB\nMemFree:               1 kB\nMemAvailable:   " +
              std::to_string(available_mib * 1024) + " kB\n");
  }

  fs::path root_;
  MemoryAccounts accounts_;
};

TEST_F(AvailableMemoryTest, ThisMachineHasSomeButNotEverything) {
  EXPECT_GT(available_memory_bytes(), kMiB);
  EXPECT_LT(available_memory_bytes(), std::size_t{1} << 50);
}

TEST_F(AvailableMemoryTest, NoAccountIsNoBound) {
  EXPECT_EQ(available_memory_bytes(accounts_), static_cast<std::size_t>(-1));
}

TEST_F(AvailableMemoryTest, SystemAloneBounds) {
  write_meminfo(100);
  EXPECT_EQ(available_memory_bytes(accounts_), 100 * kMiB);
}

TEST_F(AvailableMemoryTest, GroupOfVersion2BoundsAndItsCacheCountsAsFree) {
  write_meminfo(1000);
  write("proc/self/cgroup", "0::/job\n");
  write("cgroup/job/memory.max", std::to_string(50 * kMiB) + "\n");
  write("cgroup/job/memory.current", std::to_string(40 * kMiB) + "\n");
  write("cgroup/job/memory.stat", "anon 1\ninactive_file " + std::to_string(10 * kMiB) +
                                      "\nactive_file " + std::to_string(5 * kMiB) + "\nother 3\n");
  EXPECT_EQ(available_memory_bytes(accounts_), 25 * kMiB);
}

TEST_F(AvailableMemoryTest, GroupAboveBindsToo) {
  write_meminfo(1000);
  write("proc/self/cgroup", "0::/slice/job\n");
  write("cgroup/slice/memory.max", std::to_string(30 * kMiB) + "\n");
  write("cgroup/slice/memory.current", std::to_string(10 * kMiB) + "\n");
  write("cgroup/slice/job/memory.max", "max\n");
  write("cgroup/slice/job/memory.current", std::to_string(10 * kMiB) + "\n");
  EXPECT_EQ(available_memory_bytes(accounts_), 20 * kMiB);
}

TEST_F(AvailableMemoryTest, GroupOfVersion1AtTheMountWherePathIsTheHosts) {
  write_meminfo(1000);
  write("proc/self/cgroup", "5:cpu:/a\n4:memory:/containers/1234\n0::/\n");
  write("cgroup/memory/memory.limit_in_bytes", std::to_string(64 * kMiB) + "\n");
  write("cgroup/memory/memory.usage_in_bytes", std::to_string(16 * kMiB) + "\n");
  write("cgroup/memory/memory.stat",
        "cache 7\ntotal_inactive_file " + std::to_string(8 * kMiB) + "\ntotal_active_file 0\n");
  EXPECT_EQ(available_memory_bytes(accounts_), 56 * kMiB);
}

TEST_F(AvailableMemoryTest, GroupOverItsLimitLeavesNothing) {
  write_meminfo(1000);
  write("proc/self/cgroup", "garbage\n0::relative\n0::/job\n");
  write("cgroup/job/memory.max", "100\n");
  write("cgroup/job/memory.current", "500\n");
  EXPECT_EQ(available_memory_bytes(accounts_), 0u);
}

}  // namespace
}  // namespace kvtier
