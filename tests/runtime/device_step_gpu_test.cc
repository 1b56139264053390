#include "runtime/device_step.h"
#include "tests/runtime/device_step_case.h"

#include <algorithm>
#include <cmath>

namespace kvtier {
namespace {

DeviceStepShape small_shape() {
  DeviceStepShape shape;
  shape.kv_heads = 2;
  shape.softmax.scale = 0.12f;
  shape.sinks = 8;
  shape.runs_max = 12;
  shape.chosen_max = 20;
  return shape;
}

class DeviceStepGpu : public GpuTest {
 protected:
  DeviceStep make(const DeviceStepCase& c, const DeviceStepOptions& options = {}) {
    return DeviceStep::make(gpu(), c.shape(), options, stream()).value();
  }
  void run(const DeviceStep& step, const DeviceStepCase& c) {
    const Status status = step.enqueue(c.tables(), stream());
    ASSERT_TRUE(status.ok()) << status.to_string();
    wait();
  }
  /// Values are about 1: means in 8 bits, weights in float32.
  static void expect_near(const std::vector<float>& actual, const std::vector<float>& expected) {
    ASSERT_EQ(actual.size(), expected.size());
    for (std::size_t i = 0; i < actual.size(); ++i) {
      ASSERT_NEAR(actual[i], expected[i], 2e-3f) << i;
    }
  }
};

TEST_F(DeviceStepGpu, AgreesWithAttentionOverTheSameBlocks) {
  for (const std::uint32_t tokens : {1u, 4u, 8u}) {
    for (const bool estimate : {true, false}) {
      for (const FetchOrder order : {FetchOrder::kBeside, FetchOrder::kBefore}) {
        for (const bool verify : {true, false}) {
          DeviceStepShape shape = small_shape();
          shape.sequences = tokens == 4 ? 3 : 1;
          shape.tokens_per_block = tokens;
          shape.queries_per_kv_head = tokens == 1 ? 7 : 4;
          shape.dtype = tokens == 8 ? DType::kBF16 : DType::kF16;
          DeviceStepCase c(gpu(), stream(), shape, 20 * 6 + 30, tokens);
          const DeviceStep step =
              make(c, {.order = order, .verify = verify, .estimate_rest = estimate});
          for (int round = 0; round < 3; ++round) {
            SCOPED_TRACE(fmt::format("T {} estimate {} order {} verify {} round {}", tokens,
                                     estimate, int(order), verify, round));
            run(step, c);
            expect_near(c.out(), c.reference(c.chosen(step), estimate));
            if (HasFatalFailure()) return;
            const std::uint32_t wanted = shape.lists() * shape.chosen_max;
            EXPECT_EQ(c.report().step, static_cast<std::uint32_t>(round + 1));
            EXPECT_EQ(c.report().failed, 0u);
            EXPECT_EQ(c.report().hits + c.report().misses, wanted);
            EXPECT_EQ(c.report().fetched, c.report().misses);
            EXPECT_EQ(c.report().misses == wanted, round == 0);
            if (round != 1) continue;
            EXPECT_EQ(c.report().hits, wanted);
            c.new_queries();
          }
        }
      }
    }
  }
}

TEST_F(DeviceStepGpu, AGraphGivesTheBitsOfTheLaunches) {
  DeviceStepCase launched(gpu(), stream(), small_shape(), 60, 4);
  DeviceStepCase replayed(gpu(), stream(), small_shape(), 60, 4);
  const DeviceStep first = make(launched);
  const DeviceStep second = make(replayed);
  Result<GpuGraph> graph = GpuGraph::capture(
      gpu(), stream(), [&] { return second.enqueue(replayed.tables(), stream()); });
  ASSERT_TRUE(graph.ok()) << graph.status().to_string();
  for (int round = 0; round < 8; ++round) {
    run(first, launched);
    ASSERT_TRUE(graph->launch(stream()).ok());
    wait();
    EXPECT_EQ(launched.out(), replayed.out()) << round;
    EXPECT_EQ(launched.chosen(first), replayed.chosen(second)) << round;
    EXPECT_EQ(std::memcmp(&launched.report(), &replayed.report(), sizeof(FetchReport)), 0);
    EXPECT_EQ(replayed.report().step, static_cast<std::uint32_t>(round + 1));
    launched.new_queries();
    replayed.new_queries();
  }
}

TEST_F(DeviceStepGpu, ACorruptBlockMakesItsHeadNaNAndIsAskedForAgain) {
  for (const FetchOrder order : {FetchOrder::kBeside, FetchOrder::kBefore}) {
    DeviceStepCase c(gpu(), stream(), small_shape(), 60, 5);
    const DeviceStep step = make(c, {.order = order});
    run(step, c);
    const std::uint32_t block = c.chosen(step)[3];  // Of the first list.
    // The same step again with nothing resident, and a flipped bit in what it will fetch.
    DeviceStepCase again(gpu(), stream(), small_shape(), 60, 5);
    const DeviceStep second = make(again, {.order = order});
    again.host_block(0, block)[77] ^= std::byte{4};
    const std::size_t half = again.out().size() / 2;
    for (int round = 0; round < 2; ++round) {
      run(second, again);
      const auto out = again.out();
      for (std::size_t i = 0; i < out.size(); ++i) {
        ASSERT_EQ(std::isnan(out[i]), i < half) << i;
      }
      ASSERT_EQ(again.report().failed, 1u);
      EXPECT_EQ(again.failed()[0].block, block);
      EXPECT_EQ(again.failed()[0].state, FetchState::kCorrupt);
      EXPECT_EQ(again.report().misses, round == 0 ? 40u : 1u);
    }
    again.host_block(0, block)[77] ^= std::byte{4};
    run(second, again);
    EXPECT_EQ(again.report().failed, 0u);
    expect_near(again.out(), c.out());
  }
}

TEST_F(DeviceStepGpu, WhatIsNotInHostMemoryIsNamed) {
  DeviceStepCase c(gpu(), stream(), small_shape(), 60, 6);
  const DeviceStep step = make(c);
  c.set_frame(1, kNoFrame);
  run(step, c);
  const auto out = c.out();
  for (std::size_t i = 0; i < out.size(); ++i) ASSERT_EQ(std::isnan(out[i]), i >= out.size() / 2);
  ASSERT_EQ(c.report().failed, 20u);
  for (std::uint32_t i = 0; i < 20; ++i) {
    EXPECT_EQ(c.failed()[i].state, FetchState::kNotInHost);
    EXPECT_EQ(c.failed()[i].list, 1u);
  }
  c.set_frame(1, 1);
  run(step, c);
  EXPECT_EQ(c.report().failed, 0u);
  expect_near(c.out(), c.reference(c.chosen(step), true));
}

TEST_F(DeviceStepGpu, TooFewSlotsFailTheStepAndNotTheNextOne) {
  DeviceStepCase c(gpu(), stream(), small_shape(), 30, 6);  // 40 are wanted.
  const DeviceStep step = make(c);
  run(step, c);
  EXPECT_EQ(c.report().failed, 10u);
  EXPECT_EQ(c.report().fetched, 30u);
  EXPECT_EQ(c.failed()[0].state, FetchState::kNoSlot);
  const auto out = c.out();
  EXPECT_TRUE(std::ranges::any_of(out, [](float x) { return std::isnan(x); }));
  EXPECT_TRUE(std::ranges::any_of(out, [](float x) { return std::isfinite(x); }));
}

TEST_F(DeviceStepGpu, AShorterContextThanTheBound) {
  DeviceStepCase c(gpu(), stream(), small_shape(), 60, 8);
  const DeviceStep step = make(c);
  const DeviceBuffer none = to_device(std::vector<std::uint32_t>{0});
  c.tables().run_counts = none.as<std::uint32_t>();
  run(step, c);
  // Nothing is far: only what is near is attended.
  EXPECT_EQ(c.report().hits + c.report().misses, 0u);
  const auto out = c.out();
  EXPECT_TRUE(std::ranges::all_of(out, [](float x) { return std::isfinite(x); }));
  const DeviceBuffer few = to_device(std::vector<std::uint32_t>{2});
  c.tables().run_counts = few.as<std::uint32_t>();
  run(step, c);
  EXPECT_EQ(c.report().misses, 30u);  // Two runs of eight blocks but for the sinks, in two lists.
}

}  // namespace
}  // namespace kvtier
