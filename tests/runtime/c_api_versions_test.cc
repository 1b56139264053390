// Callers that were compiled against another version of kvtier.h, and what they hand over besides.

#include "tests/runtime/c_api_engine.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace kvtier::testing {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

/// A struct of a version to come: ours, and fields that this library does not know.
template <typename Struct>
struct Newer {
  Struct known;
  std::uint64_t unknown[4];
};

TEST(CApiVersions, AnOlderCallerGetsTheDefaults) {
  // As if everything from `device_allocator` on had been added later.
  constexpr std::size_t kOlder = offsetof(kvtier_options, device_allocator);
  kvtier_options options;
  std::memset(&options, 0xEE, sizeof options);
  ASSERT_EQ(kvtier_options_init(&options, kOlder), KVTIER_OK);
  const auto* bytes = reinterpret_cast<const unsigned char*>(&options);
  for (std::size_t i = kOlder; i < sizeof options; ++i) {
    ASSERT_EQ(bytes[i], 0xEE) << "byte " << i << " is not the caller's";
  }
  const kvtier_options full = small_options();
  std::memcpy(&options, &full, kOlder);
  options.struct_size = kOlder;
  kvtier_runtime* runtime = nullptr;
  ASSERT_EQ(kvtier_runtime_open(&options, &runtime), KVTIER_OK) << kvtier_last_error();
  // Results likewise: what the caller knows is written, what is behind is left alone.
  constexpr std::size_t kOlderStats = offsetof(kvtier_stats, host);
  kvtier_stats stats;
  std::memset(&stats, 0xEE, sizeof stats);
  stats.struct_size = kOlderStats;
  ASSERT_EQ(kvtier_get_stats(runtime, &stats), KVTIER_OK);
  EXPECT_EQ(stats.struct_size, kOlderStats);
  EXPECT_EQ(stats.device.capacity_bytes, full.device_capacity_bytes);
  EXPECT_EQ(stats.host.capacity_bytes, 0xEEEEEEEEEEEEEEEEu);
  EXPECT_EQ(kvtier_runtime_close(runtime), KVTIER_OK);
}

TEST(CApiVersions, ANewerCallerIsServedWhileItWantsNothingNew) {
  Newer<kvtier_options> options;
  std::memset(&options, 0xEE, sizeof options);
  ASSERT_EQ(kvtier_options_init(&options.known, sizeof options), KVTIER_OK);
  EXPECT_EQ(options.unknown[3], 0u);
  const kvtier_options full = small_options();
  options.known = full;
  options.known.struct_size = sizeof options;
  kvtier_runtime* runtime = nullptr;
  ASSERT_EQ(kvtier_runtime_open(&options.known, &runtime), KVTIER_OK) << kvtier_last_error();
  Newer<kvtier_stats> stats;
  std::memset(&stats, 0xEE, sizeof stats);
  stats.known.struct_size = sizeof stats;
  ASSERT_EQ(kvtier_get_stats(runtime, &stats.known), KVTIER_OK);
  EXPECT_EQ(stats.known.device.capacity_bytes, full.device_capacity_bytes);
  for (const std::uint64_t unknown : stats.unknown) EXPECT_EQ(unknown, 0u);
  EXPECT_EQ(kvtier_runtime_close(runtime), KVTIER_OK);

  options.unknown[2] = 1;
  runtime = nullptr;
  EXPECT_EQ(kvtier_runtime_open(&options.known, &runtime), KVTIER_UNSUPPORTED);
  EXPECT_THAT(kvtier_last_error(), HasSubstr(kvtier_version_string()));
  EXPECT_EQ(runtime, nullptr);
}

TEST(CApiVersions, SizesThatNobodySet) {
  kvtier_options options = small_options();
  kvtier_runtime* runtime = nullptr;
  for (const std::size_t size : {std::size_t{0}, std::size_t{7}, ~std::size_t{0}}) {
    options.struct_size = size;
    EXPECT_EQ(kvtier_runtime_open(&options, &runtime), KVTIER_INVALID_ARGUMENT) << size;
    EXPECT_THAT(kvtier_last_error(), HasSubstr("_init")) << size;
  }
  Engine engine(small_options());
  kvtier_stats stats = {};
  EXPECT_EQ(kvtier_get_stats(engine.runtime, &stats), KVTIER_INVALID_ARGUMENT);
  EXPECT_THAT(kvtier_last_error(), HasSubstr("sizeof"));
  stats.struct_size = ~std::size_t{0};
  EXPECT_EQ(kvtier_get_stats(engine.runtime, &stats), KVTIER_INVALID_ARGUMENT);
}

/// Counts what it gives out.
struct CountingAllocator {
  static void* allocate(void* context, std::size_t bytes) {
    auto& self = *static_cast<CountingAllocator*>(context);
    if (self.refuse) return nullptr;
    ++self.taken;
    self.bytes += bytes;
    auto* memory = static_cast<char*>(std::aligned_alloc(4096, (bytes + 8191) / 4096 * 4096));
    return self.misalign ? memory + 64 : memory;
  }
  static void release(void* context, void* memory, std::size_t bytes) {
    auto& self = *static_cast<CountingAllocator*>(context);
    ++self.given_back;
    self.bytes -= bytes;
    std::free(self.misalign ? static_cast<char*>(memory) - 64 : memory);
  }

  kvtier_allocator callbacks() { return {&allocate, &release, this}; }

  int taken = 0;
  int given_back = 0;
  std::size_t bytes = 0;
  bool refuse = false;
  bool misalign = false;
};

TEST(CApiHooks, MemoryComesFromTheEngine) {
  CountingAllocator device;
  CountingAllocator host;
  const kvtier_allocator device_callbacks = device.callbacks();
  const kvtier_allocator host_callbacks = host.callbacks();
  kvtier_options options = small_options();
  options.device_allocator = &device_callbacks;
  options.host_allocator = &host_callbacks;
  {
    Engine engine(options);
    EXPECT_EQ(device.taken, 1);
    EXPECT_EQ(host.taken, 1);
    EXPECT_EQ(device.bytes, options.device_capacity_bytes);
    const kvtier_sequence sequence = engine.create();
    engine.append(sequence, 0, 60);
    const kvtier_query query = engine.ask(0, 1, 256);
    ASSERT_EQ(kvtier_step(engine.runtime, sequence, &query, nullptr), KVTIER_OK);
    EXPECT_LT(distance(engine.out(), engine.exact_reference(0, 60)), kTolerance);
  }
  EXPECT_EQ(device.given_back, 1);
  EXPECT_EQ(host.given_back, 1);
  EXPECT_EQ(device.bytes + host.bytes, 0u);
}

TEST(CApiHooks, AllocatorsThatFailAreToldOf) {
  CountingAllocator good;
  CountingAllocator bad;
  const kvtier_allocator good_callbacks = good.callbacks();
  kvtier_allocator bad_callbacks = bad.callbacks();
  kvtier_options options = small_options();
  options.device_allocator = &good_callbacks;
  options.host_allocator = &bad_callbacks;
  kvtier_runtime* runtime = nullptr;
  bad.refuse = true;
  EXPECT_EQ(kvtier_runtime_open(&options, &runtime), KVTIER_NO_SPACE);
  EXPECT_THAT(kvtier_last_error(), HasSubstr("host tier"));
  EXPECT_EQ(good.taken, good.given_back);
  bad.refuse = false;
  bad.misalign = true;
  EXPECT_EQ(kvtier_runtime_open(&options, &runtime), KVTIER_INVALID_ARGUMENT);
  EXPECT_THAT(kvtier_last_error(), HasSubstr("4096"));
  EXPECT_EQ(bad.taken, bad.given_back);
  bad_callbacks.release = nullptr;
  EXPECT_EQ(kvtier_runtime_open(&options, &runtime), KVTIER_INVALID_ARGUMENT);
  EXPECT_THAT(kvtier_last_error(), HasSubstr("host_allocator"));
  EXPECT_EQ(good.taken, good.given_back);
}

// On a file system without O_DIRECT the reason for another backend is worth knowing.
TEST(CApiHooks, TheLoggerHearsWhyADiskIsNotTheFirstChoice) {
  std::vector<std::string> heard;
  kvtier_options options = small_options();
  options.logger = [](void* context, const char* message) {
    static_cast<std::vector<std::string>*>(context)->emplace_back(message);
  };
  options.logger_context = &heard;
  options.disk_capacity_bytes = 1 << 20;
  options.disk_path = "/dev/shm";
  if (access(options.disk_path, W_OK) != 0) GTEST_SKIP() << "no /dev/shm to write to";
  Engine engine(options);
  ASSERT_FALSE(heard.empty());
  for (const std::string& line : heard) EXPECT_THAT(line, Not(HasSubstr("\n")));
}

}  // namespace
}  // namespace kvtier::testing
