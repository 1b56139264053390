#include "kernels/scan_codes.h"
#include "kernels/top_k.h"
#include "tests/kernels/scan_case.h"

#include <gmock/gmock.h>

#include <bit>
#include <limits>

namespace kvtier {
namespace {

class ScanGpu : public GpuTest {
 protected:
  void code(ScanOnGpu& on_gpu) {
    const Status status = code_runs(gpu(), on_gpu.code, stream());
    ASSERT_TRUE(status.ok()) << status.to_string();
  }
  void weigh(ScanOnGpu& on_gpu) {
    for (const auto step : {scan_codes, pool_scan}) {
      const Status status = step(gpu(), on_gpu.scan, stream());
      ASSERT_TRUE(status.ok()) << status.to_string();
    }
  }

  /// Codes byte for byte, means within the rounding of a float32 sum and of the type.
  void expect_codes(ScanCase& c) {
    ScanOnGpu on_gpu(gpu(), stream(), c);
    code(on_gpu);
    const ScanCaseShape& shape = c.shape();
    const std::size_t run_bytes = c.layout().run_bytes();
    const std::size_t runs = std::size_t{shape.lists()} * shape.runs;
    const auto codes = on_gpu.read(on_gpu.code.codes, runs * run_bytes);
    const auto means = on_gpu.read(on_gpu.code.value_means, runs * shape.dim * 2);
    std::vector<std::byte> expected(run_bytes);
    for (std::uint32_t place = 0; place < runs; ++place) {
      const std::uint32_t list = place / shape.runs;
      const std::uint32_t run = place % shape.runs;
      reorder_run(c.key_codes(), c.cpu_codes(list, run).data(), expected);
      ASSERT_TRUE(std::equal(expected.begin(), expected.end(),
                             codes.begin() + std::ptrdiff_t(place * run_bytes)))
          << "list " << list << " run " << run << ", " << shape.describe();
      const auto mean = c.mean_values(list, run);
      const float unit = shape.dtype == DType::kBF16 ? 0x1p-8f : 0x1p-11f;
      for (std::uint32_t i = 0; i < shape.dim; ++i) {
        const float actual =
            load_element(means.data(), shape.dtype, std::size_t{place} * shape.dim + i);
        ASSERT_NEAR(actual, mean[i], unit * std::abs(mean[i]) + 0x1p-18f * shape.spread)
            << shape.describe();
      }
    }
  }

  /// Scores, choice and estimate of every list against float64 loops.
  void expect_scan(ScanCase& c, std::uint32_t k, bool near) {
    const ScanCaseShape& shape = c.shape();
    ScanOnGpu on_gpu(gpu(), stream(), c);
    code(on_gpu);
    std::vector<float> near_lse;
    if (near) {
      for (std::uint32_t i = 0; i < shape.lists() * shape.group; ++i) {
        near_lse.push_back(i % 5 == 0 ? kEmptyLse : 1.5f * float(i % 7) - 3.0f);
      }
      on_gpu.set_near_lse(near_lse);
    }
    weigh(on_gpu);
    const auto scores =
        on_gpu.read(on_gpu.scan.weights.scores, std::size_t{shape.lists()} * shape.cells_max());
    const ChooseCellsParams choice = on_gpu.choice(k);
    ASSERT_TRUE(choose_cells(gpu(), on_gpu.scan, choice, stream()).ok());
    ASSERT_TRUE(estimate_rest(gpu(), on_gpu.scan, on_gpu.rest, stream()).ok());
    const auto chosen = on_gpu.read(choice.chosen, std::size_t{shape.lists()} * k);
    const std::size_t rows = std::size_t{shape.lists()} * shape.group;
    const auto out = on_gpu.read(on_gpu.rest.out, rows * shape.dim);
    const auto lse = on_gpu.read(on_gpu.rest.lse, rows);
    for (std::uint32_t list = 0; list < shape.lists(); ++list) {
      SCOPED_TRACE(fmt::format("list {} k {} near {}, {}", list, k, near, shape.describe()));
      expect_list(
          c, list,
          std::span(near_lse).subspan(near ? list * shape.group : 0, near ? shape.group : 0),
          std::span(scores).subspan(std::size_t{list} * shape.cells_max()),
          std::span(chosen).subspan(std::size_t{list} * k, k),
          std::span(out).subspan(std::size_t{list} * shape.group * shape.dim),
          std::span(lse).subspan(std::size_t{list} * shape.group));
      if (HasFatalFailure()) return;
    }
  }

  void expect_list(const ScanCase& c, std::uint32_t list, std::span<const float> near_lse,
                   std::span<const float> scores, std::span<const std::uint32_t> chosen,
                   std::span<const float> out, std::span<const float> lse) {
    const ScanCaseShape& shape = c.shape();
    const std::uint32_t runs = shape.run_count(list / shape.heads);
    const std::uint32_t cells = runs * shape.blocks_per_run();
    const std::uint32_t sink_cells = runs == 0 ? 0 : shape.sinks / shape.tokens_per_block;
    // The choice: exact for the scores there are, in index order.
    std::vector<std::uint32_t> order(cells - sink_cells);
    const auto best =
        top_k_reference(scores.subspan(sink_cells, cells - sink_cells), chosen.size(), order);
    std::vector<std::uint32_t> expected(best.begin(), best.end());
    for (std::uint32_t& cell : expected) cell += sink_cells;
    std::ranges::sort(expected);
    expected.resize(chosen.size(), kNoIndex);
    ASSERT_THAT(chosen, testing::ElementsAreArray(expected));

    std::vector<CodeLine> lines;
    std::vector<float> means;
    for (std::uint32_t run = 0; run < runs; ++run) {
      const auto codes = c.cpu_codes(list, run);
      lines.insert(lines.end(), codes.begin(), codes.end());
      for (const float mean : c.mean_values(list, run)) means.push_back(mean);
    }
    const auto queries = c.list_queries(list);
    std::vector<float> logits(std::size_t{shape.group} * runs * 64);
    score_codes_reference(c.softmax(), {.codes = c.key_codes(),
                                        .runs = lines.data(),
                                        .run_count = runs,
                                        .queries = queries.data(),
                                        .query_stride = shape.dim,
                                        .query_count = shape.group,
                                        .logits = logits.data(),
                                        .logit_stride = std::size_t{runs} * 64});
    std::vector<float> true_scores(cells);
    std::vector<float> true_out(std::size_t{shape.group} * shape.dim);
    std::vector<float> true_lse(shape.group);
    while (!expected.empty() && expected.back() == kNoIndex) expected.pop_back();
    scan_reference({.group = shape.group,
                    .tokens_per_cell = shape.tokens_per_block,
                    .sinks = runs == 0 ? 0 : shape.sinks,
                    .value_dim = shape.dim,
                    .logits = logits,
                    .near_lse = near_lse,
                    .value_means = means,
                    .chosen = expected,
                    .scores = true_scores,
                    .out = true_out,
                    .lse = true_lse});
    // A logit is a sum of `dim` products of which each is right to about 2^-21: |logits| here are
    // below 2^6 times the spread, and a weight errs by as much as its logit.
    const float tolerance = 0x1p-21f * 64.0f * std::max(1.0f, shape.spread) * 4.0f + 0x1p-20f;
    for (std::uint32_t cell = 0; cell < cells; ++cell) {
      ASSERT_NEAR(scores[cell], true_scores[cell],
                  tolerance * std::max(true_scores[cell], 1e-6f) + 1e-12f)
          << cell;
    }
    for (std::uint32_t q = 0; q < shape.group; ++q) {
      if (true_lse[q] == kEmptyLse) {
        ASSERT_TRUE(lse[q] == kEmptyLse || lse[q] < -80.0f) << lse[q];
        continue;
      }
      ASSERT_NEAR(lse[q], true_lse[q], tolerance * 4.0f + 0x1p-20f * std::abs(true_lse[q]));
      // Means are rounded to the type, and so is their mean.
      const float unit = shape.dtype == DType::kBF16 ? 0x1p-8f : 0x1p-11f;
      for (std::uint32_t i = 0; i < shape.dim; ++i) {
        const std::size_t at = std::size_t{q} * shape.dim + i;
        ASSERT_NEAR(out[at], true_out[at],
                    unit * 6.0f * shape.spread + tolerance * 8.0f * shape.spread);
      }
    }
  }
};

TEST_F(ScanGpu, CodesAreTheCpusToTheLastBit) {
  std::uint32_t seed = 0;
  for (const DType dtype : {DType::kBF16, DType::kF16}) {
    for (const std::uint32_t dim : {64u, 128u}) {
      for (const std::uint32_t tokens : {1u, 4u, 8u, 16u, 64u}) {
        for (const std::uint32_t sinks : {0u, 3u, 64u}) {
          ScanCase c({.dtype = dtype,
                      .dim = dim,
                      .tokens_per_block = tokens,
                      .runs = 3,
                      .sinks = sinks,
                      .spread = sinks == 3 ? 20.0f : 1.0f},
                     ++seed);
          expect_codes(c);
          if (HasFatalFailure()) return;
        }
      }
    }
  }
}

TEST_F(ScanGpu, AgreesWithPlainLoopsOnAGridOfShapes) {
  std::uint32_t seed = 100;
  for (const DType dtype : {DType::kBF16, DType::kF16}) {
    for (const std::uint32_t dim : {64u, 128u}) {
      for (const std::uint32_t tokens : {1u, 4u, 8u}) {
        for (const std::uint32_t group : {1u, 4u, 7u}) {
          ScanCase c({.dtype = dtype,
                      .dim = dim,
                      .sequences = 3,
                      .group = group,
                      .tokens_per_block = tokens,
                      .runs = 9,
                      .sinks = tokens * 2},
                     ++seed);
          expect_scan(c, 11, group != 4);
          if (HasFatalFailure()) return;
        }
      }
    }
  }
}

TEST_F(ScanGpu, AgreesWithPlainLoopsOnRandomShapes) {
  std::mt19937 random(7);
  for (int round = 0; round < 12; ++round) {
    ScanCaseShape shape;
    shape.dtype = random() % 2 == 0 ? DType::kBF16 : DType::kF16;
    shape.dim = random() % 2 == 0 ? 64 : 128;
    shape.sequences = 1 + random() % 3;
    shape.heads = 1 + random() % 4;
    shape.group = 1 + random() % 8;
    shape.tokens_per_block = 1u << (random() % 3 == 0 ? 0 : 2 + random() % 2);
    shape.runs = 1 + random() % 90;
    shape.sinks = shape.tokens_per_block * (random() % (1 + 64 / shape.tokens_per_block));
    shape.spread = random() % 3 == 0 ? 4.0f : 1.0f;
    shape.logit_cap = random() % 4 == 0 ? 20.0f : 0.0f;
    ScanCase c(shape, random());
    expect_scan(c, 1 + random() % 300, random() % 2 == 0);
    if (HasFatalFailure()) return;
  }
}

TEST_F(ScanGpu, AllIsChosenAndNothingIsLeft) {
  ScanCase c({.runs = 2}, 5);
  expect_scan(c, 40, true);
}

TEST_F(ScanGpu, EqualScoresAreTakenInIndexOrder) {
  ScanCase c({.heads = 1, .tokens_per_block = 1, .runs = 200, .sinks = 0, .spread = 0.0f}, 5);
  ScanOnGpu on_gpu(gpu(), stream(), c);
  code(on_gpu);
  weigh(on_gpu);
  const ChooseCellsParams choice = on_gpu.choice(4096);
  ASSERT_TRUE(choose_cells(gpu(), on_gpu.scan, choice, stream()).ok());
  const auto chosen = on_gpu.read(choice.chosen, 4096);
  for (std::uint32_t i = 0; i < 4096; ++i) ASSERT_EQ(chosen[i], i);
}

TEST_F(ScanGpu, WhatIsNotANumberShowsInEveryResult) {
  for (const float poison :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    ScanCase c({.heads = 2, .runs = 6}, 9);
    // A key of the first list, in its fourth run.
    const std::size_t block = 3 * c.shape().blocks_per_run() + 2;
    store_element(c.slab().data() + block * c.block_bytes(), c.shape().dtype, 5, poison);
    ScanOnGpu on_gpu(gpu(), stream(), c);
    code(on_gpu);
    weigh(on_gpu);
    const ChooseCellsParams choice = on_gpu.choice(7);
    ASSERT_TRUE(choose_cells(gpu(), on_gpu.scan, choice, stream()).ok());
    ASSERT_TRUE(estimate_rest(gpu(), on_gpu.scan, on_gpu.rest, stream()).ok());
    const auto lse = on_gpu.read(on_gpu.rest.lse, 8);
    for (std::uint32_t q = 0; q < 4; ++q) {
      EXPECT_TRUE(std::isnan(lse[q])) << q;
      EXPECT_TRUE(std::isfinite(lse[4 + q])) << q;
    }
  }
}

TEST_F(ScanGpu, ASlotOutsideTheSlabPoisonsItsRunOnly) {
  ScanCase c({.heads = 1, .runs = 4}, 9);
  ScanOnGpu on_gpu(gpu(), stream(), c);
  on_gpu.code.slab.slots = 3 * c.shape().blocks_per_run();
  code(on_gpu);
  const std::size_t run_bytes = c.layout().run_bytes();
  const auto codes = on_gpu.read(on_gpu.code.codes, 4 * run_bytes);
  const std::size_t scales = c.layout().scales_offset();
  const DType dtype = c.shape().dtype;
  EXPECT_TRUE(std::isnan(load_element(codes.data() + 3 * run_bytes + scales, dtype, 128)));
  EXPECT_FALSE(std::isnan(load_element(codes.data() + 2 * run_bytes + scales, dtype, 128)));
}

TEST_F(ScanGpu, OneBitsOnEveryRun) {
  ScanCase c({.heads = 3, .runs = 70}, 3);
  ScanOnGpu on_gpu(gpu(), stream(), c);
  code(on_gpu);
  std::vector<std::vector<float>> results;
  for (int round = 0; round < 3; ++round) {
    weigh(on_gpu);
    const ChooseCellsParams choice = on_gpu.choice(50);
    ASSERT_TRUE(choose_cells(gpu(), on_gpu.scan, choice, stream()).ok());
    ASSERT_TRUE(estimate_rest(gpu(), on_gpu.scan, on_gpu.rest, stream()).ok());
    results.push_back(on_gpu.read(on_gpu.rest.out, std::size_t{3} * 4 * 128));
    EXPECT_EQ(results.back(), results.front());
  }
}

TEST_F(ScanGpu, RowsThatAreNotEstimatedAreEmpty) {
  ScanCase c({.heads = 1, .runs = 6}, 4);
  ScanOnGpu on_gpu(gpu(), stream(), c);
  code(on_gpu);
  weigh(on_gpu);
  const DeviceBuffer rows = to_device(std::vector<std::uint8_t>{1, 0, 1, 0});
  on_gpu.rest.rows = rows.as<std::uint8_t>();
  ASSERT_TRUE(choose_cells(gpu(), on_gpu.scan, on_gpu.choice(7), stream()).ok());
  ASSERT_TRUE(estimate_rest(gpu(), on_gpu.scan, on_gpu.rest, stream()).ok());
  const auto lse = on_gpu.read(on_gpu.rest.lse, 4);
  EXPECT_TRUE(std::isfinite(lse[0]) && std::isfinite(lse[2]));
  EXPECT_EQ(lse[1], kEmptyLse);
  EXPECT_EQ(lse[3], kEmptyLse);
}

TEST_F(ScanGpu, OtherShapesAreRefused) {
  ScanParams scan;
  for (const std::uint32_t group : {0u, 9u}) {
    scan.group = group;
    EXPECT_EQ(scan_codes(gpu(), scan, stream()).code(), StatusCode::kUnsupported);
  }
  scan.group = 4;
  scan.tokens_per_cell = 2;
  EXPECT_EQ(scan_codes(gpu(), scan, stream()).code(), StatusCode::kUnsupported);
  CodeRunsParams code;
  code.slab.head_dim = 96;
  EXPECT_EQ(code_runs(gpu(), code, stream()).code(), StatusCode::kUnsupported);
}

}  // namespace
}  // namespace kvtier
