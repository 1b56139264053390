#include "runtime/device_step.h"

#include "tests/kernels/fake_cuda_calls.h"

#include <gtest/gtest.h>

#include <vector>

// Without a GPU: the calls are fakes and the kernels never run. What is tested is that a failed
// call comes back, that nothing is left behind, and what a step takes.

namespace kvtier {
namespace {

DeviceStepShape small_shape() {
  DeviceStepShape shape;
  shape.runs_max = 12;
  shape.chosen_max = 20;
  shape.near_ranges_max = 9;
  return shape;
}

const StreamRef kStream{reinterpret_cast<CUstream_st*>(0x1000)};

struct StepOverFakes {
  std::vector<std::byte> slab = std::vector<std::byte>(8 * 4096);
  std::uint64_t sum = 0;

  DeviceStepTables tables() {
    DeviceStepTables tables;
    tables.slab = {.slots = 8, .block_bytes = 4096, .head_dim = 128, .value_dim = 128};
    tables.slab_bytes = slab;
    tables.map.slots = 8;
    tables.places.block_bytes = 4096;
    tables.places.blocks_per_extent = 16;
    tables.places.seeds = tables.places.sums = &sum;
    return tables;
  }
  Status run(FakeCudaCalls& calls, const DeviceStepOptions& options) {
    KVTIER_ASSIGN_OR_RETURN(const Gpu gpu, Gpu::open(calls));
    KVTIER_ASSIGN_OR_RETURN(const DeviceStep step,
                            DeviceStep::make(gpu, small_shape(), options, kStream));
    KVTIER_RETURN_IF_ERROR(step.enqueue_selection(tables(), kStream));
    return step.enqueue(tables(), kStream);
  }
};

TEST(DeviceStep, EveryFailedCallComesBackAndNothingIsLeft) {
  for (const FetchOrder order : {FetchOrder::kBeside, FetchOrder::kBefore}) {
    StepOverFakes step;
    FakeCudaCalls calls;
    ASSERT_TRUE(step.run(calls, {.order = order}).ok());
    EXPECT_EQ(calls.alive(), 0u);
    for (int first = 0; first < calls.calls(); ++first) {
      FakeCudaCalls broken;
      broken.fail_from(first, 2);
      EXPECT_EQ(step.run(broken, {.order = order}).code(), StatusCode::kNoSpace) << first;
      EXPECT_EQ(broken.alive(), 0u) << first;
    }
  }
}

TEST(DeviceStep, AStepAllocatesAndWaitsForNothing) {
  StepOverFakes over;
  FakeCudaCalls calls;
  const Gpu gpu = Gpu::open(calls).value();
  const DeviceStep step = DeviceStep::make(gpu, small_shape(), {}, kStream).value();
  const std::size_t alive = calls.alive();
  ASSERT_TRUE(step.enqueue(over.tables(), kStream).ok());
  EXPECT_EQ(calls.alive(), alive);
  EXPECT_EQ(calls.waits, 0);
  EXPECT_GE(calls.launches, 12);
  const int launches = calls.launches;
  ASSERT_TRUE(step.enqueue(over.tables(), kStream).ok());
  EXPECT_EQ(calls.launches, 2 * launches);
}

TEST(DeviceStep, OtherShapesAreRefused) {
  FakeCudaCalls calls;
  const Gpu gpu = Gpu::open(calls).value();
  const auto code = [&](const DeviceStepShape& shape) {
    return DeviceStep::make(gpu, shape, {}, kStream).status().code();
  };
  DeviceStepShape shape = small_shape();
  shape.tokens_per_block = 16;
  EXPECT_EQ(code(shape), StatusCode::kUnsupported);
  shape = small_shape();
  shape.sinks = 9;
  EXPECT_EQ(code(shape), StatusCode::kUnsupported);
  shape = small_shape();
  shape.queries_per_kv_head = 9;
  EXPECT_EQ(code(shape), StatusCode::kUnsupported);
  EXPECT_EQ(calls.alive(), 0u);
}

}  // namespace
}  // namespace kvtier
