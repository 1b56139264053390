#include "tests/tools/make_trace.h"
#include "tools/replay/replay_report.h"
#include "tools/replay/samples.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <optional>

namespace kvtier {
namespace {

using ::testing::IsEmpty;
using ::testing::Not;

constexpr std::uint32_t kTokens = 40;
constexpr std::uint32_t kSteps = 4;
constexpr std::uint32_t kHeads = 2;
constexpr std::uint32_t kDim = 8;
constexpr std::uint32_t kBlock = 4;
constexpr std::uint32_t kSinks = 2;
constexpr std::uint32_t kWindow = 4;
constexpr const char* kLayerFile = "layer-001.safetensors";

/// One layer and one KV head whose queries are all zero: every visible token weighs the same, so
/// the figures can be counted on fingers. `heavy` gets the logit `heavy_logit` instead of 0. One
/// turn, its answer at positions 38 and 39, its evidence at [8, 12).
class UniformTrace {
 public:
  explicit UniformTrace(std::optional<std::uint32_t> heavy = {}, float heavy_logit = 0) {
    TraceDraft draft = make_trace({.tokens = kTokens,
                                   .steps = kSteps,
                                   .query_heads = kHeads,
                                   .kv_heads = 1,
                                   .head_dim = kDim,
                                   .value_dim = kDim,
                                   .kept_layers = {1},
                                   .prompt_queries = 0,
                                   .with_oracle = false,
                                   .evidence = {{8, 12}}});
    draft.manifest["softmax_scale"] = 1.0;
    auto& queries = draft.tensor(kLayerFile, "queries").bytes;
    auto& keys = draft.tensor(kLayerFile, "keys").bytes;
    std::fill(queries.begin(), queries.end(), std::byte{0});
    std::fill(keys.begin(), keys.end(), std::byte{0});
    for (std::size_t row = 0; row < kSteps * kHeads; ++row) {
      store_element(queries.data(), DType::kF16, row * kDim, 1.0f);
    }
    if (heavy) store_element(keys.data(), DType::kF16, *heavy * kDim, heavy_logit);
    write_trace(draft, folder_.path() / "trace");
    auto trace = AttentionTrace::open(folder_.path() / "trace");
    KVTIER_CHECK(trace.ok(), "{}", trace.status().message());
    trace_.emplace(std::move(*trace));
  }

  const AttentionTrace& trace() const { return *trace_; }

  /// A run that attends sinks, window and the given blocks at every step, with the right output for
  /// weights that are all equal.
  RunRecord run(const std::vector<std::uint32_t>& blocks, std::uint32_t budget) const {
    RunRecord record;
    for (std::uint32_t position : trace_->query_positions()) {
      const std::uint32_t visible = position + 1;
      std::vector<bool> attended(visible, false);
      for (std::uint32_t t = 0; t < kSinks; ++t) attended[t] = true;
      for (std::uint32_t t = visible - kWindow; t < visible; ++t) attended[t] = true;
      for (std::uint32_t block : blocks) {
        for (std::uint32_t t = block * kBlock; t < (block + 1) * kBlock; ++t) attended[t] = true;
      }
      add_step(attended, budget, record);
    }
    return record;
  }

 private:
  void add_step(const std::vector<bool>& attended, std::uint32_t budget, RunRecord& record) const {
    std::vector<AttendedRange> ranges;
    std::vector<double> sum(kDim);
    std::uint32_t count = 0;
    for (std::uint32_t t = 0; t < attended.size(); ++t) {
      if (!attended[t]) continue;
      ranges.push_back({HeadGroup{0}, BlockIndex{t / kBlock}, t % kBlock, 1});
      ++count;
      for (std::uint32_t i = 0; i < kDim; ++i) {
        sum[i] +=
            double{load_element(trace_->layers()[0].values.data(), DType::kF16, t * kDim + i)};
      }
    }
    const AttendedLimits limits{.head_groups = 1,
                                .tokens_per_block = kBlock,
                                .visible = static_cast<std::uint32_t>(attended.size()),
                                .budget = budget,
                                .sinks = kSinks,
                                .window = kWindow};
    const Status status = record.attended.add(ranges, limits);
    KVTIER_CHECK(status.ok(), "{}", status.message());
    for (std::uint32_t head = 0; head < kHeads; ++head) {
      for (double value : sum) record.outs.push_back(static_cast<float>(value / count));
    }
    record.failed.push_back(0);
    record.tokens_attended.push_back(count);
    record.timings.emplace_back();
  }

  ScratchFolder folder_;
  std::optional<AttentionTrace> trace_;
};

SelectorShape shape() {
  return {.kv_heads = 1,
          .heads_per_group = 1,
          .queries_per_kv_head = kHeads,
          .head_dim = kDim,
          .tokens_per_block = kBlock,
          .sinks = kSinks,
          .window = kWindow,
          .softmax = {},
          .tokens_max = kTokens};
}

RunQuality measure(const UniformTrace& uniform, const RunRecord& record, const char* budget,
                   unsigned threads = 1) {
  WorkerPool pool(threads);
  Progress progress;
  const Budget parsed = Budget::parse(budget).value();
  auto qualities = measure_runs(uniform.trace(), shape(), std::span(&record, 1),
                                std::span(&parsed, 1), pool, progress);
  KVTIER_CHECK(qualities.ok(), "{}", qualities.status().message());
  return qualities->front();
}

TEST(Measure, CountsEqualWeights) {
  const UniformTrace uniform;
  // 2 sinks, 4 of the window, blocks [8, 12) and [20, 24): 14 of 37, 38, 39, 40 tokens.
  const RunQuality quality = measure(uniform, uniform.run({2, 5}, 14), "14");
  const QualityFigures& figures = quality.overall;
  const double mean = 14 * (1.0 / 37 + 1.0 / 38 + 1.0 / 39 + 1.0 / 40) / 4;
  EXPECT_EQ(figures.failed_steps, 0u);
  EXPECT_DOUBLE_EQ(*figures.tokens_attended_mean, 14);
  EXPECT_NEAR(figures.recall->mean, mean, 1e-6);
  EXPECT_NEAR(figures.recall->min, 14.0 / 40, 1e-6);
  EXPECT_NEAR(figures.recall->p5, 14.0 / 40, 1e-6);
  double found = 0;
  double there = 0;
  for (double visible : {37.0, 38.0, 39.0, 40.0}) {
    found += 8 / visible;
    there += (visible - kSinks - kWindow) / visible;
  }
  EXPECT_NEAR(*figures.recall_long_range, found / there, 1e-6);
  // Nothing weighs more than these: another choice of two whole blocks is no better.
  EXPECT_NEAR(*figures.recall_ratio, 1, 1e-9);
  EXPECT_NEAR(*figures.recall_long_range_ratio, 1, 1e-9);
  EXPECT_NEAR(*figures.evidence_recall, 1, 1e-9);
  ASSERT_EQ(quality.layers.size(), 1u);
  EXPECT_EQ(quality.layers[0].recall->mean, figures.recall->mean);
}

TEST(Measure, EvidenceOutsideTheAttendedBlocksIsNotFound) {
  const UniformTrace uniform;
  EXPECT_EQ(*measure(uniform, uniform.run({4, 5}, 14), "14").overall.evidence_recall, 0);
}

TEST(Measure, AMissedHeavyTokenCostsItsMass) {
  constexpr float kLogit = 4;  // e^4 is about 54.6: more than all other tokens together.
  const UniformTrace uniform(20, kLogit);
  const RunQuality hit = measure(uniform, uniform.run({5, 6}, 14), "14");
  const RunQuality miss = measure(uniform, uniform.run({6, 7}, 14), "14");
  const double heavy = std::exp(double{kLogit});
  double found = 0;
  double best = 0;
  for (double visible : {37.0, 38.0, 39.0, 40.0}) {
    found += 14 / (heavy + visible - 1) / 4;
    best += (heavy + 13) / (heavy + visible - 1) / 4;
  }
  EXPECT_NEAR(hit.overall.recall->mean, best, 1e-6);
  EXPECT_NEAR(*hit.overall.recall_ratio, 1, 1e-9);
  EXPECT_NEAR(miss.overall.recall->mean, found, 1e-6);
  EXPECT_NEAR(*miss.overall.recall_ratio, found / best, 1e-6);
  EXPECT_LT(*miss.overall.recall_long_range_ratio, 0.2);
}

TEST(Measure, OutputErrorIsTheDistanceFromAttentionOverEverything) {
  const UniformTrace uniform;
  const RunRecord record = uniform.run({2, 5}, 14);
  const RunRecord whole = uniform.run({0, 1, 2, 3, 4, 5, 6, 7, 8}, 40);
  const QualityFigures figures = measure(uniform, record, "14").overall;
  double worst = 0;
  for (std::size_t step = 0; step < kSteps; ++step) {
    const std::size_t first = step * kHeads * kDim;
    worst = std::max(worst, relative_error(std::span(record.outs).subspan(first, kDim),
                                           std::span(whole.outs).subspan(first, kDim)));
  }
  EXPECT_GT(worst, 0.01);
  EXPECT_NEAR(figures.output_error->max, worst, 1e-5);
  EXPECT_LT(figures.attended_error->max, 1e-5);
  const QualityFigures all = measure(uniform, whole, "100%").overall;
  EXPECT_LT(all.output_error->max, 1e-6);
  EXPECT_EQ(all.recall->min, 1);
  EXPECT_EQ(*all.recall_long_range, 1);
}

TEST(Measure, AnOutputThatIsNotOfTheAttendedBlocksIsNoticed) {
  const UniformTrace uniform;
  RunRecord record = uniform.run({2, 5}, 14);
  EXPECT_THAT(verification_failures(record, measure(uniform, record, "14")), IsEmpty());
  const RunRecord swapped = uniform.run({2, 6}, 14);
  // One step of one head as if another block had been read.
  std::copy_n(swapped.outs.begin() + kDim, kDim, record.outs.begin() + kDim);
  const RunQuality quality = measure(uniform, record, "14");
  EXPECT_GT(quality.overall.attended_error->max, kAttendedErrorMax);
  EXPECT_THAT(verification_failures(record, quality), Not(IsEmpty()));
}

TEST(Measure, AnOutputThatIsNoNumberIsNoticed) {
  const UniformTrace uniform;
  for (const std::size_t step : {std::size_t{0}, std::size_t{kSteps - 1}}) {
    RunRecord record = uniform.run({2, 5}, 14);
    record.outs[step * kHeads * kDim] = std::nanf("");
    const RunQuality quality = measure(uniform, record, "14");
    EXPECT_THAT(verification_failures(record, quality), Not(IsEmpty())) << "step " << step;
  }
}

TEST(Measure, FailedStepsAreCountedAndNotMeasured) {
  const UniformTrace uniform;
  RunRecord record = uniform.run({2, 5}, 14);
  record.failed[1] = 1;
  record.failed_steps = 1;
  std::fill_n(record.outs.begin() + kHeads * kDim, kHeads * kDim, std::nanf(""));
  const RunQuality quality = measure(uniform, record, "14");
  EXPECT_EQ(quality.overall.failed_steps, 1u);
  EXPECT_TRUE(std::isfinite(quality.overall.output_error->max));
  EXPECT_NEAR(quality.overall.recall->mean, 14 * (1.0 / 37 + 1.0 / 39 + 1.0 / 40) / 3, 1e-6);
  EXPECT_THAT(verification_failures(record, quality), Not(IsEmpty()));
  std::ranges::fill(record.failed, std::uint8_t{1});
  EXPECT_FALSE(measure(uniform, record, "14").overall.recall.has_value());
}

TEST(Measure, DoesNotDependOnTheNumberOfThreads) {
  const UniformTrace uniform(20, 2.0f);
  const RunRecord record = uniform.run({2, 5}, 14);
  const QualityFigures one = measure(uniform, record, "14", 1).overall;
  const QualityFigures three = measure(uniform, record, "14", 3).overall;
  EXPECT_EQ(one.recall->mean, three.recall->mean);
  EXPECT_EQ(one.output_error->mean, three.output_error->mean);
  EXPECT_EQ(one.attended_error->max, three.attended_error->max);
  EXPECT_EQ(*one.recall_long_range, *three.recall_long_range);
}

TEST(Samples, QuantilesAreNearestRank) {
  const std::vector<double> samples = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10};
  EXPECT_EQ(*quantile_of_sorted(samples, 0.05), 1);
  EXPECT_EQ(*quantile_of_sorted(samples, 0.5), 5);
  EXPECT_EQ(*quantile_of_sorted(samples, 0.99), 10);
  EXPECT_FALSE(quantile_of_sorted({}, 0.5).has_value());
  EXPECT_FALSE(mean_of({}).has_value());
}

TEST(RelativeError, OfAZeroReferenceHasNoInfinity) {
  const float zeros[] = {0, 0};
  const float ones[] = {1, 0};
  EXPECT_EQ(relative_error(zeros, zeros), 0);
  EXPECT_EQ(relative_error(ones, zeros), 1);
}

}  // namespace
}  // namespace kvtier
