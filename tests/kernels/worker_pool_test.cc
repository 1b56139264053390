#include "kernels/worker_pool.h"

#include <gtest/gtest.h>

#include <atomic>
#include <numeric>
#include <thread>
#include <vector>

namespace kvtier {
namespace {

TEST(WorkerPool, RunsEveryItemOnce) {
  for (const unsigned threads : {1u, 2u, 5u}) {
    WorkerPool pool(threads);
    EXPECT_EQ(pool.threads(), threads);
    for (const std::size_t count : {0u, 1u, 2u, 1000u}) {
      std::vector<int> runs(count, 0);
      pool.run(count, [&runs](std::size_t i) { ++runs[i]; });
      EXPECT_EQ(runs, std::vector<int>(count, 1));
    }
  }
}

TEST(WorkerPool, OneThreadRunsInOrderOnTheCaller) {
  WorkerPool pool(1);
  std::vector<std::size_t> order;
  const std::thread::id caller = std::this_thread::get_id();
  pool.run(10, [&](std::size_t i) {
    EXPECT_EQ(std::this_thread::get_id(), caller);
    order.push_back(i);
  });
  std::vector<std::size_t> expected(10);
  std::iota(expected.begin(), expected.end(), std::size_t{0});
  EXPECT_EQ(order, expected);
}

TEST(WorkerPool, WhatItemsWroteIsThereAfterwards) {
  WorkerPool pool(2);
  std::vector<std::size_t> squares(10000);
  for (std::size_t round = 1; round < 20; ++round) {
    pool.run(squares.size(), [&](std::size_t i) { squares[i] = i * i + round; });
    for (std::size_t i = 0; i < squares.size(); ++i) ASSERT_EQ(squares[i], i * i + round);
  }
}

TEST(WorkerPool, ZeroMeansAsManyAsTheProcessMayUse) { EXPECT_GE(WorkerPool(0).threads(), 1u); }

}  // namespace
}  // namespace kvtier
