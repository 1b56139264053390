// Sizes that a caller may ask for through the C ABI and that are not to be had: each is refused in
// words before anything is lost.

#include "tests/runtime/c_api_engine.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <fstream>
#include <functional>
#include <string>

namespace kvtier::testing {
namespace {

using ::testing::HasSubstr;

rlim_t address_space_bytes() {
  std::ifstream file("/proc/self/statm");
  rlim_t pages = 0;
  file >> pages;
  return pages * static_cast<rlim_t>(::sysconf(_SC_PAGESIZE));
}

// Sizes that no machine has are refused before memory is touched for them.
TEST(CApiSizes, AbsurdSizesAreRefused) {
  const std::function<void(kvtier_options&)> cases[] = {
      [](kvtier_options& o) { o.sequences_max = UINT32_MAX; },
      [](kvtier_options& o) { o.layers = UINT32_MAX; },
      [](kvtier_options& o) { o.tokens_max = UINT32_MAX; },
      [](kvtier_options& o) { o.timeline_events = UINT32_MAX; },
      [](kvtier_options& o) { o.device_capacity_bytes = UINT64_MAX; },
      [](kvtier_options& o) { o.host_capacity_bytes = UINT64_MAX; },
  };
  for (const auto& spoil : cases) {
    kvtier_options options = small_options();
    spoil(options);
    // A long sequence costs nothing before it is appended, so that one may open.
    kvtier_runtime* runtime = nullptr;
    const kvtier_status status = kvtier_runtime_open(&options, &runtime);
    EXPECT_THAT(status, ::testing::AnyOf(kInvalid, KVTIER_NO_SPACE, KVTIER_OK))
        << kvtier_last_error();
    EXPECT_EQ(status == KVTIER_OK, runtime != nullptr);
    EXPECT_EQ(kvtier_runtime_close(runtime), KVTIER_OK);
  }
}

// Sizes each possible by itself, of which the product wraps around to almost nothing.
TEST(CApiSizes, SizesWhoseProductOverflowsAreRefused) {
  kvtier_options options = small_options();
  options.kv_heads = 4;
  options.layers = 1u << 31;
  options.sequences_max = 1u << 31;
  kvtier_needs needs{};
  needs.struct_size = sizeof needs;
  EXPECT_EQ(kvtier_runtime_needs(&options, &needs), kInvalid);
  EXPECT_THAT(kvtier_last_error(), HasSubstr("layers is 2147483648"));
  EXPECT_EQ(refused_open(options), kInvalid);
  options = small_options();
  options.tokens_max = UINT32_MAX;
  options.sinks = UINT32_MAX;
  options.sequences_max = UINT32_MAX;
  EXPECT_EQ(refused_open(options), kInvalid);
}

TEST(CApiSizes, TooSmallACapacitySaysHowMuchWouldDo) {
  kvtier_options options = small_options();
  kvtier_needs needs = {};
  needs.struct_size = sizeof needs;
  ASSERT_EQ(kvtier_runtime_needs(&options, &needs), KVTIER_OK);
  options.device_capacity_bytes = needs.device_bytes - 1;
  EXPECT_EQ(refused_open(options), kInvalid);
  EXPECT_THAT(kvtier_last_error(), HasSubstr(std::to_string(needs.device_bytes)));
  options.device_capacity_bytes = needs.device_bytes;
  options.host_capacity_bytes = needs.host_bytes - 1;
  EXPECT_EQ(refused_open(options), kInvalid);
  EXPECT_THAT(kvtier_last_error(), HasSubstr(std::to_string(needs.host_bytes)));
  options.host_capacity_bytes = needs.host_bytes;
  Engine engine(options);
}

// Whatever it is that memory does not suffice for, opening says so and leaves nothing behind.
TEST(CApiSizes, OpeningWithoutMemoryIsAFailureLikeAnyOther) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "a sanitizer's own memory does not fit under a limit";
#endif
  kvtier_options options = small_options();
  options.host_capacity_bytes = 16 << 20;
  options.disk_capacity_bytes = 256 << 20;  // Its tables are what memory runs out for.
  const std::string folder = ::testing::TempDir();
  options.disk_path = folder.c_str();
  const rlim_t used = address_space_bytes();
  bool opened = false;
  for (rlim_t more = 0; !opened; more += 1 << 20) {
    ASSERT_LT(more, rlim_t{1} << 30);
    const pid_t child = ::fork();
    if (child == 0) {
      const rlimit limit = {used + more, used + more};
      ::setrlimit(RLIMIT_AS, &limit);
      kvtier_runtime* runtime = nullptr;
      const kvtier_status status = kvtier_runtime_open(&options, &runtime);
      ::_exit(status == KVTIER_OK ? 0 : 1 + (runtime != nullptr || *kvtier_last_error() == '\0'));
    }
    int status = 0;
    ASSERT_EQ(::waitpid(child, &status, 0), child);
    ASSERT_TRUE(WIFEXITED(status)) << "with " << more << " B more: signal " << WTERMSIG(status);
    ASSERT_LE(WEXITSTATUS(status), 1) << "with " << more << " B more";
    opened = WEXITSTATUS(status) == 0;
  }
}

TEST(CApiSizes, NoSuchFolder) {
  kvtier_options options = small_options();
  options.disk_capacity_bytes = 1 << 20;
  options.disk_path = "/nowhere/at/all";
  EXPECT_EQ(refused_open(options), KVTIER_NOT_FOUND);
  EXPECT_THAT(kvtier_last_error(), HasSubstr("/nowhere/at/all"));
}

}  // namespace
}  // namespace kvtier::testing
