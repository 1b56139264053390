#include "kernels/attend_slots.h"
#include "tests/kernels/slots_case.h"

#include <cmath>

namespace kvtier {
namespace {

std::vector<SlotsShape> slots_shapes() {
  std::vector<SlotsShape> shapes;
  for (const std::uint32_t dim : {64u, 80u, 96u, 128u, 256u}) {
    shapes.push_back({.head_dim = dim, .sequences = 2});
    shapes.push_back({.head_dim = dim, .sequences = 2, .ranges = 90, .ragged = true});
    shapes.push_back({.head_dim = dim, .group = 5, .queries = 4, .ranges = 11, .causal = true});
  }
  for (std::uint32_t group = 1; group <= 16; ++group) {
    shapes.push_back({.group = group, .queries = 1 + group % 8, .ranges = 13});
  }
  for (const std::uint32_t tokens : {1u, 2u, 3u, 4u, 5u, 7u, 16u, 17u, 64u}) {
    shapes.push_back({.sequences = 2, .tokens_per_block = tokens, .ranges = 37, .ragged = true});
  }
  // MLA: one head, values in the key row.
  for (const std::uint32_t group : {1u, 16u}) {
    shapes.push_back({.head_dim = 576,
                      .values_in_keys = true,
                      .sequences = 3,
                      .head_groups = 1,
                      .tokens_per_block = 4,
                      .group = group,
                      .queries = 2,
                      .ranges = 50,
                      .ragged = true,
                      .causal = true});
  }
  // Several heads in a block, caps, most rows, one token, long lists, many tasks.
  shapes.push_back({.sequences = 3, .heads = 4, .ranges = 21, .ragged = true});
  shapes.push_back({.head_dim = 64, .heads = 2, .group = 3, .queries = 3, .causal = true});
  shapes.push_back({.group = 2, .ranges = 30, .logit_cap = 1.5f});
  shapes.push_back({.queries = 3, .causal = true, .logit_cap = 50.0f});
  shapes.push_back({.group = 16, .queries = 8, .ranges = 30, .causal = true});
  shapes.push_back({.head_groups = 1, .tokens_per_block = 1, .group = 1, .ranges = 1});
  shapes.push_back({.head_groups = 1, .ranges = 3000});
  shapes.push_back({.head_groups = 1, .tokens_per_block = 1, .group = 7, .ranges = 9000});
  shapes.push_back({.sequences = 40, .head_groups = 8, .ranges = 20, .ragged = true});
  return shapes;
}

class AttendSlotsGpu : public GpuTest {
 protected:
  /// Runs a case; every output is poisoned first.
  AttentionResult attend(const SlotsCase& c, std::vector<std::byte> slab_bytes,
                         std::uint32_t ranges_max = 0) {
    const DeviceBuffer slab = to_device(slab_bytes);
    const DeviceBuffer ranges = to_device(c.ranges());
    const DeviceBuffer offsets = to_device(c.offsets());
    const DeviceBuffer queries = to_device(c.queries());
    const DeviceBuffer positions = to_device(c.positions());
    AttentionResult result;
    result.out.assign(c.shape().rows() * c.shape().value_dim(), 1e30f);
    result.lse.assign(c.shape().rows(), 1e30f);
    const DeviceBuffer out = to_device(result.out);
    const DeviceBuffer lse = to_device(result.lse);
    AttendSlotsParams params = c.params();
    if (ranges_max != 0) params.list_ranges_max = ranges_max;
    params.slab.blocks = slab.data();
    params.queries = queries.data();
    params.query_positions = c.positions().empty() ? nullptr : positions.as<std::uint32_t>();
    params.ranges = ranges.as<SlotRange>();
    params.list_offsets = offsets.as<std::uint32_t>();
    params.out = out.as<float>();
    params.lse = lse.as<float>();
    params.workspace = workspace(params);
    const Status status = attend_slots(gpu(), params, stream());
    EXPECT_TRUE(status.ok()) << status.to_string();
    result.out = to_host<float>(out);
    result.lse = to_host<float>(lse);
    return result;
  }
  AttentionResult attend(SlotsCase& c, std::uint32_t ranges_max = 0) {
    return attend(c, c.slab(), ranges_max);
  }

  /// One workspace for all calls, whatever their shapes; NaN at first.
  std::byte* workspace(const AttendSlotsParams& params) {
    const std::size_t bytes = attend_slots_workspace_bytes(gpu(), params);
    if (!workspace_ || workspace_->size() < bytes) {
      workspace_.reset();
      workspace_.emplace(device_bytes(bytes));
      EXPECT_TRUE(workspace_->fill(0xFF).ok());
    }
    return workspace_->data();
  }

 private:
  std::optional<DeviceBuffer> workspace_;
};

TEST_F(AttendSlotsGpu, AgreesWithTheReferenceOnEveryShapeAndType) {
  std::uint32_t seed = 1;
  float worst = 0.0f;
  for (const SlotsShape& shape : slots_shapes()) {
    for (const DType dtype : {DType::kF16, DType::kBF16}) {
      SlotsCase c(shape, dtype, seed++);
      const float difference = largest_difference(attend(c), c.reference());
      EXPECT_LE(difference, c.tolerance()) << shape.describe() << " " << to_string(dtype);
      worst = std::max(worst, difference / c.tolerance());
    }
  }
  RecordProperty("worst_share_of_tolerance", std::to_string(worst));
}

TEST_F(AttendSlotsGpu, AgreesWithTheReferenceOnRandomShapes) {
  std::mt19937 random(77);
  const std::uint32_t dims[] = {64, 80, 96, 128, 256};
  for (std::uint32_t i = 0; i < 60; ++i) {
    SlotsShape shape;
    shape.head_dim = dims[random() % 5];
    shape.sequences = 1 + random() % 4;
    shape.head_groups = 1 + random() % 3;
    shape.heads = 1 + random() % 3;
    shape.tokens_per_block = 1 + random() % 20;
    shape.group = 1 + random() % 16;
    shape.queries = 1 + random() % 8;
    shape.ranges = 1 + random() % 60;
    shape.ragged = random() % 2 == 0;
    shape.causal = random() % 2 == 0;
    shape.logit_cap = random() % 3 == 0 ? 20.0f : 0.0f;
    SlotsCase c(shape, random() % 2 == 0 ? DType::kF16 : DType::kBF16, i);
    EXPECT_LE(largest_difference(attend(c), c.reference()), c.tolerance()) << shape.describe();
  }
}

TEST_F(AttendSlotsGpu, TheBoundOnListsChangesTheDivisionAndNotTheAnswer) {
  SlotsCase c({.sequences = 2, .ranges = 200, .ragged = true}, DType::kBF16, 5);
  const AttentionResult expected = c.reference();
  for (const std::uint32_t bound : {1u, 10u, 200u, 5000u, 1000000u}) {
    const AttentionResult first = attend(c, bound);
    EXPECT_LE(largest_difference(first, expected), c.tolerance()) << bound;
    const AttentionResult again = attend(c, bound);
    EXPECT_EQ(first.out, again.out) << bound;
    EXPECT_EQ(first.lse, again.lse) << bound;
  }
}

// The canary: what the comparison must not overlook.
TEST_F(AttendSlotsGpu, OneTokenLessIsSeen) {
  SlotsCase c({.ranges = 60}, DType::kBF16, 6);
  const AttentionResult whole = c.reference();
  --c.ranges()[17].tokens;
  EXPECT_GT(largest_difference(attend(c), whole), 2.0f * c.tolerance());
}

TEST_F(AttendSlotsGpu, WhatIsNotThereOrNotANumberMakesItsRowsNaNAndNoOthers) {
  const SlotsShape shape = {.sequences = 2, .head_groups = 1, .ranges = 100};
  for (const char* what : {"no slot", "slot", "tokens", "nan"}) {
    SlotsCase c(shape, DType::kF16, 7);
    std::vector<std::byte> slab = c.slab();
    SlotRange& range = c.ranges()[50];
    if (what == std::string("no slot")) range.slot = kNoSlot;
    if (what == std::string("slot")) range.slot = c.slots();
    if (what == std::string("tokens")) range.first_token = 1;
    if (what == std::string("nan")) {
      std::fill_n(slab.begin() + std::ptrdiff_t(range.slot * c.block_bytes()), c.block_bytes(),
                  std::byte{0xFF});
    }
    for (const std::uint32_t bound : {1u, 1000u}) {
      const AttentionResult result = attend(c, slab, bound);
      const std::size_t rows = shape.rows() / 2;
      for (std::size_t r = 0; r < shape.rows(); ++r) {
        EXPECT_EQ(std::isnan(result.lse[r]), r < rows) << what;
        for (std::uint32_t d = 0; d < shape.head_dim; ++d) {
          ASSERT_EQ(std::isnan(result.out[r * shape.head_dim + d]), r < rows) << what << " " << d;
        }
      }
    }
  }
}

TEST_F(AttendSlotsGpu, OffsetsReachBeyondFourGiB) {
  SlotsCase c({.head_groups = 1, .ranges = 4}, DType::kBF16, 8);
  const std::size_t far = (std::size_t{4} << 30) / c.block_bytes() + 5;
  Result<DeviceBuffer> slab =
      DeviceBuffer::allocate(gpu(), (far + c.slots()) * c.block_bytes(), stream());
  if (!slab.ok()) GTEST_SKIP() << slab.status().to_string();
  ASSERT_TRUE(slab->upload(c.slab(), far * c.block_bytes()).ok());
  const AttentionResult expected = c.reference();
  for (SlotRange& range : c.ranges()) range.slot += static_cast<std::uint32_t>(far);
  const DeviceBuffer ranges = to_device(c.ranges());
  const DeviceBuffer offsets = to_device(c.offsets());
  const DeviceBuffer queries = to_device(c.queries());
  const DeviceBuffer out = device_bytes(expected.out.size() * 4);
  const DeviceBuffer lse = device_bytes(expected.lse.size() * 4);
  AttendSlotsParams params = c.params();
  params.slab.blocks = slab->data();
  params.slab.slots = static_cast<std::uint32_t>(far + c.slots());
  params.queries = queries.data();
  params.ranges = ranges.as<SlotRange>();
  params.list_offsets = offsets.as<std::uint32_t>();
  params.out = out.as<float>();
  params.lse = lse.as<float>();
  params.workspace = workspace(params);
  ASSERT_TRUE(attend_slots(gpu(), params, stream()).ok());
  EXPECT_LE(largest_difference({to_host<float>(out), to_host<float>(lse)}, expected),
            c.tolerance());
}

TEST_F(AttendSlotsGpu, AGraphReplaysTheSameBits) {
  SlotsCase c({.sequences = 3, .ranges = 300}, DType::kBF16, 9);
  const AttentionResult expected = attend(c);
  const DeviceBuffer slab = to_device(c.slab());
  const DeviceBuffer ranges = to_device(c.ranges());
  const DeviceBuffer offsets = to_device(c.offsets());
  const DeviceBuffer queries = to_device(c.queries());
  const DeviceBuffer out = device_bytes(expected.out.size() * 4);
  const DeviceBuffer lse = device_bytes(expected.lse.size() * 4);
  AttendSlotsParams params = c.params();
  params.slab.blocks = slab.data();
  params.queries = queries.data();
  params.ranges = ranges.as<SlotRange>();
  params.list_offsets = offsets.as<std::uint32_t>();
  params.out = out.as<float>();
  params.lse = lse.as<float>();
  params.workspace = workspace(params);
  const Result<GpuGraph> graph =
      GpuGraph::capture(gpu(), stream(), [&] { return attend_slots(gpu(), params, stream()); });
  ASSERT_TRUE(graph.ok()) << graph.status().to_string();
  for (int replay = 0; replay < 3; ++replay) {
    ASSERT_TRUE(out.fill(0x7F).ok());
    ASSERT_TRUE(graph->launch(stream()).ok());
    EXPECT_EQ(to_host<float>(out), expected.out) << replay;
    EXPECT_EQ(to_host<float>(lse), expected.lse) << replay;
  }
}

TEST_F(AttendSlotsGpu, NoSequencesIsSuccessAndOtherShapesAreRefused) {
  const SlotsCase c({}, DType::kBF16, 10);
  AttendSlotsParams params = c.params();
  params.sequences = 0;
  EXPECT_TRUE(attend_slots(gpu(), params, stream()).ok());
  const auto code = [&](auto change) {
    AttendSlotsParams changed = c.params();
    change(changed);
    return attend_slots(gpu(), changed, stream()).code();
  };
  EXPECT_EQ(code([](auto& p) { p.slab.dtype = DType::kF32; }), StatusCode::kUnsupported);
  EXPECT_EQ(code([](auto& p) { p.slab.head_dim = 72; }), StatusCode::kUnsupported);
  EXPECT_EQ(code([](auto& p) { p.slab.value_dim = 64; }), StatusCode::kUnsupported);
  EXPECT_EQ(code([](auto& p) { p.slab.values_in_keys = true; }), StatusCode::kUnsupported);
  EXPECT_EQ(code([](auto& p) { p.queries_per_kv_head = 17; }), StatusCode::kUnsupported);
  EXPECT_EQ(code([](auto& p) { p.query_count = 9; }), StatusCode::kUnsupported);
  wait();
}

}  // namespace
}  // namespace kvtier
