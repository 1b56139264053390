#include "kernels/attend_slots.h"
#include "kernels/choose_cells.h"
#include "kernels/code_runs.h"
#include "kernels/merge_states.h"
#include "kernels/move_blocks.h"
#include "kernels/read_bytes.h"
#include "kernels/resolve_slots.h"
#include "kernels/scan_codes.h"
#include "kernels/score_rows.h"
#include "kernels/top_k.h"
#include "tests/kernels/fake_cuda_calls.h"

#include <gtest/gtest.h>

#include <functional>
#include <vector>

// Launchers without a GPU: the calls are fakes and the kernels never run. What is tested is that a
// failed call comes back, and that nothing is launched for nothing.

namespace kvtier {
namespace {

constexpr CudaError kLaunchFailure = 719;

struct Launchers {
  explicit Launchers(const Gpu& gpu) : gpu(gpu) {}
  const Gpu& gpu;
  StreamRef stream{reinterpret_cast<CUstream_st*>(0x1000)};
  std::vector<std::byte> memory = std::vector<std::byte>(1 << 20);

  Status move() {
    return move_blocks(
        gpu, {.source = memory, .target = memory, .block_bytes = 512, .moves_max = 9}, stream);
  }
  Status attend() {
    AttendSlotsParams params;
    params.slab = {
        .blocks = nullptr, .slots = 1, .block_bytes = 4096, .head_dim = 128, .value_dim = 128};
    params.sequences = 1;
    params.list_ranges_max = 1000;
    params.workspace = memory.data();
    return attend_slots(gpu, params, stream);
  }
  Status merge() {
    MergeStatesParams params;
    params.rows = 1;
    params.value_dim = 64;
    return merge_states(gpu, params, stream);
  }
  Status score() {
    return score_rows(gpu, {.dim = 128, .tasks = 1, .rows_max = 1, .query_count = 1}, stream);
  }
  Status choose() {
    return top_k(gpu, {.lists = 1, .count_max = 9, .k = 2, .workspace = memory.data()}, stream);
  }
  Status read() { return read_bytes(gpu, memory, nullptr, stream); }
  Status code() {
    return code_runs(gpu, {.slab = {.head_dim = 128, .value_dim = 128}, .job_count = 1}, stream);
  }
  ScanParams one_list() const { return {.lists = 1, .runs_max = 1}; }
  Status scan() { return scan_codes(gpu, one_list(), stream); }
  Status pool() { return pool_scan(gpu, one_list(), stream); }
  Status rest() { return estimate_rest(gpu, one_list(), {}, stream); }
  Status choose_cell() {
    return choose_cells(gpu, one_list(), {.k = 1, .workspace = memory.data()}, stream);
  }
  Status choose_of_many() {
    return choose_cells(gpu, {.lists = 1, .runs_max = 9999}, {.k = 1, .workspace = memory.data()},
                        stream);
  }
  ResolveParams one_choice() const {
    ResolveParams params;
    params.places.blocks_per_extent = 1;
    params.lists = params.k = 1;
    return params;
  }
  Status resolve() { return resolve_slots(gpu, one_choice(), stream); }
  Status settle() { return settle_fetch(gpu, one_choice(), {}, stream); }
};

TEST(Launchers, EveryFailedCallComesBack) {
  using Launcher = Status (Launchers::*)();
  for (const Launcher launcher :
       {&Launchers::move, &Launchers::attend, &Launchers::merge, &Launchers::score,
        &Launchers::choose, &Launchers::read, &Launchers::code, &Launchers::scan, &Launchers::pool,
        &Launchers::rest, &Launchers::choose_cell, &Launchers::choose_of_many, &Launchers::resolve,
        &Launchers::settle}) {
    FakeCudaCalls calls;
    const Gpu gpu = Gpu::open(calls).value();
    Launchers launchers(gpu);
    const int before = calls.calls();
    ASSERT_TRUE((launchers.*launcher)().ok());
    const int all = calls.calls() - before;
    ASSERT_GE(all, 1);
    for (int first = 0; first < all; ++first) {
      FakeCudaCalls broken;
      const Gpu broken_gpu = Gpu::open(broken).value();
      Launchers over_broken(broken_gpu);
      broken.fail_from(first, kLaunchFailure);
      EXPECT_EQ((over_broken.*launcher)().code(), StatusCode::kIoError) << first << " of " << all;
    }
  }
}

TEST(Launchers, AttentionOverLongListsIsTwoKernelsAndAsksForSharedMemoryOnce) {
  FakeCudaCalls calls;
  const Gpu gpu = Gpu::open(calls).value();
  Launchers launchers(gpu);
  const int before = calls.calls();
  ASSERT_TRUE(launchers.attend().ok());
  EXPECT_EQ(calls.launches, 2);
  EXPECT_EQ(calls.calls() - before, 3);
  ASSERT_TRUE(launchers.attend().ok());
  EXPECT_EQ(calls.launches, 4);
  EXPECT_EQ(calls.calls() - before, 5);
}

}  // namespace
}  // namespace kvtier
