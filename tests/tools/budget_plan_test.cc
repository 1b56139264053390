// What fits, how fast and what it costs, against arithmetic by hand on a machine of round figures.

#include "tools/profile/budget_plan.h"

#include "tests/tools/profile_files.h"
#include "tools/profile/selector_bytes.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

namespace kvtier {
namespace {

using testing::HasSubstr;

constexpr double kGiB = 1024.0 * 1024 * 1024;

BudgetOptions eight_sequences() {
  BudgetOptions options;
  options.model_path = config_path("llama-3.1-8b");
  options.context_tokens = 131072;
  options.sequences = 8;
  options.selector = "recency";  // Keeps nothing, so that the arithmetic is of KV alone.
  options.weight_bytes = std::uint64_t{10} << 30;
  options.machine_path = "round.json";
  return options;
}

BudgetInputs inputs_for(const BudgetOptions& options) {
  BudgetOptions without_machine = options;
  without_machine.machine_path.clear();
  BudgetInputs inputs = read_budget_inputs(without_machine).value();
  inputs.machine = round_machine();
  return inputs;
}

TEST(BudgetPlan, WhatFitsWhere) {
  const BudgetOptions options = eight_sequences();
  const BudgetPlan plan = plan_budget(inputs_for(options), options).value();
  // 128 KiB per token, 16 GiB per sequence, 128 GiB in all.
  EXPECT_EQ(plan.bytes.growing_per_token, 131072);
  EXPECT_EQ(plan.bytes.growing, 16 * kGiB);
  // 2 % of the context are 2621 tokens; a step needs their slots and a block of 8.
  EXPECT_EQ(plan.bytes.held, 131072.0 * (2621 + 8));
  // 100 GiB less a tenth and 10 of weights leave 80 for slots.
  EXPECT_DOUBLE_EQ(plan.fit.device_cache, 80 * kGiB);
  EXPECT_DOUBLE_EQ(plan.fit.device_share, 80.0 / 128);
  EXPECT_EQ(plan.fit.host_share, 1);
  EXPECT_EQ(plan.fit.sequences_on_device, 5u);   // 80 / 16
  EXPECT_EQ(plan.fit.sequences_with_host, 11u);  // 180 / 16
  EXPECT_EQ(plan.fit.sequences_with_disk, 73u);  // (180 + 1000) / 16
  EXPECT_TRUE(plan.passed());
}

TEST(BudgetPlan, AStepInMilliseconds) {
  const BudgetOptions options = eight_sequences();
  const BudgetInputs inputs = inputs_for(options);
  const BudgetPlan plan = plan_budget(inputs, options).value();
  const StepTime& step = *plan.step;
  // All but the input embedding, 128256 x 4096, is read once.
  const double total = inputs.model.parameters->total;
  EXPECT_NEAR(step.weights, 10 * kGiB * (1 - 128256.0 * 4096 / total) / 1e12, 1e-9);
  EXPECT_NEAR(step.attend, 8.0 * 2621 * 131072 / 1e12, 1e-12);
  // 2621 less 4 sinks and 64 of the window can be missed.
  const double missed = 0.32 * std::pow(std::log(80.0 / 128) / std::log(2621.0 / 131072), 2);
  EXPECT_NEAR(step.link, 8.0 * 2553 * 131072 * missed / 1e10, 1e-9);
  EXPECT_EQ(step.select, 0);
  EXPECT_EQ(step.disk, 0);
  EXPECT_DOUBLE_EQ(step.total(), step.weights + std::max(step.attend, step.link));
  EXPECT_NEAR(plan.full->attend, 8.0 * 131072 * 131072 / 1e12, 1e-9);
}

TEST(BudgetPlan, TheDiskIsReadWhereTheHostEnds) {
  BudgetOptions options = eight_sequences();
  options.host_memory = std::uint64_t{100} << 30;  // 90 of 128 GiB.
  const BudgetPlan plan = plan_budget(inputs_for(options), options).value();
  EXPECT_DOUBLE_EQ(plan.fit.host_share, 90.0 / 128);
  EXPECT_DOUBLE_EQ(plan.fit.disk_share, 38.0 / 128);
  const double off_host = 0.32 * std::pow(std::log(90.0 / 128) / std::log(2621.0 / 131072), 2);
  // A block of 8 tokens of a head is 4 KiB, and each brings an extent of 128 KiB.
  EXPECT_NEAR(plan.step->disk, 8.0 * 2553 * 131072 * off_host * 32 / 1e9, 1e-9);
  options.disk_space = 0;
  const BudgetPlan without = plan_budget(inputs_for(options), options).value();
  EXPECT_FALSE(without.fit.homes_fit);
  EXPECT_FALSE(without.passed());
  // Of what does not fit there is no time; with which memory it would be how fast there is.
  EXPECT_FALSE(without.step.has_value());
  EXPECT_FALSE(without.curve.empty());
  EXPECT_THAT(without.unanswered, testing::Contains(HasSubstr("does not fit")));
}

TEST(BudgetPlan, BreakEvenOfAPrefix) {
  BudgetOptions options = eight_sequences();
  options.gemm_flops = 2e14;
  const BudgetInputs inputs = inputs_for(options);
  const BudgetPlan plan = plan_budget(inputs, options).value();
  // From disk: 131072 B a token at 1 GB/s. Computing: two operations per parameter, and per pair of
  // tokens 32 layers x 32 heads x 256 products, of half of all pairs.
  const double load = 131072 / 1e9;
  const double product = 2 * inputs.model.parameters->active() / 2e14;
  const double pair = 2 * (32.0 * 32 * 256 / 2) / 2e14;
  const auto expected = static_cast<std::uint64_t>(std::ceil((load - product) / pair));
  ASSERT_TRUE(plan.from_disk->tokens.has_value());
  EXPECT_NEAR(double(*plan.from_disk->tokens), double(expected), 1);
  EXPECT_GT(expected, 16384u);
  EXPECT_EQ(plan.from_host->tokens, std::uint64_t{0});
  EXPECT_NEAR(plan.from_host->load_s, 16 * kGiB / 1e10, 1e-9);
  options.gemm_flops = 1e18;
  EXPECT_FALSE(plan_budget(inputs, options)->from_disk->tokens.has_value());
}

TEST(BudgetPlan, WearOfTheDisk) {
  BudgetOptions options = eight_sequences();
  options.tokens_per_day = 1'000'000;
  const BudgetPlan plan = plan_budget(inputs_for(options), options).value();
  EXPECT_EQ(plan.wear->bytes_per_day, 131072e6);
  EXPECT_DOUBLE_EQ(*plan.wear->drive_writes_per_day, 131072e6 / (1000 * kGiB));
}

TEST(BudgetPlan, MoreMemoryIsNeverSlower) {
  BudgetOptions options = eight_sequences();
  const BudgetInputs inputs = inputs_for(options);
  for (const std::uint64_t host : {80u, 100u, 200u}) {
    double before = 1e9;
    for (const std::uint64_t device : {20u, 40u, 60u, 80u, 100u, 140u, 200u}) {
      options.host_memory = host << 30;
      options.device_memory = device << 30;
      const BudgetPlan plan = plan_budget(inputs, options).value();
      if (!plan.fit.fits()) continue;
      EXPECT_LE(plan.ms(), before) << device << " GiB beside " << host;
      EXPECT_GE(*plan.ms_per_device_gib, 0);
      EXPECT_GE(*plan.ms_per_host_gib, 0);
      before = plan.ms();
    }
    EXPECT_LT(before, 1e9);
  }
}

TEST(BudgetPlan, MlaIsWholeOnEachGpuAndOnceInTheHost) {
  BudgetOptions options = eight_sequences();
  options.model_path = config_path("deepseek-v3.2");
  options.gpus = 8;
  options.sequences = 1;
  const BudgetInputs inputs = inputs_for(options);
  const BudgetPlan plan = plan_budget(inputs, options).value();
  EXPECT_EQ(plan.bytes.growing_per_token, 61.0 * 576 * 2);
  EXPECT_EQ(plan.bytes.home_per_token, 61.0 * 576 * 2);
  EXPECT_EQ(plan.bytes.index, 61.0 * 128 * 2 * 131072);
  // Its own indexer chooses: 2048 tokens, and no selector of ours keeps anything.
  EXPECT_EQ(plan.bytes.selector, 0);
  EXPECT_EQ(plan.bytes.held, 61.0 * 576 * 2 * (2048 + 8));
}

TEST(BudgetPlan, WhatIsMissingIsSaid) {
  const BudgetOptions options = eight_sequences();
  BudgetInputs inputs = inputs_for(options);
  std::erase_if(inputs.machine->entries,
                [](const ProfileEntry& entry) { return entry.name == "gemm"; });
  const BudgetPlan plan = plan_budget(inputs, options).value();
  EXPECT_THAT(plan.unanswered, testing::Contains(HasSubstr("--gemm-flops")));
  inputs.machine->entries.clear();
  const auto none = plan_budget(inputs, options);
  ASSERT_FALSE(none.ok());
  EXPECT_THAT(none.status().message(), HasSubstr("device.read has no figure"));
}

TEST(BudgetPlan, SuggestionsPass) {
  BudgetOptions options = eight_sequences();
  options.target_ms = 11.0;
  options.sequences = 64;
  const BudgetInputs inputs = inputs_for(options);
  const BudgetPlan plan = plan_budget(inputs, options).value();
  EXPECT_FALSE(plan.passed());
  const auto suggestions = suggest(inputs, options, plan);
  ASSERT_FALSE(suggestions.empty());
  for (const Suggestion& each : suggestions) EXPECT_THAT(each.why, HasSubstr("PASS"));
}

TEST(ReuseCurve, StandardAndMeasured) {
  const ReuseCurve curve = ReuseCurve::standard(0.05, 0.68);
  EXPECT_EQ(curve.missed(1), 0);
  EXPECT_NEAR(curve.missed(0.05), 0.32, 1e-12);
  EXPECT_EQ(curve.missed(0.01), 1);
  double before = 1;
  for (double share = 0.01; share < 1; share += 0.01) {
    EXPECT_LE(curve.missed(share), before);
    before = curve.missed(share);
  }
  EXPECT_EQ(ReuseCurve::standard(1, 0.68).missed(0.5), 0.5);
}

// The shipped trace replayed: the standard curve is what was fitted to it.
TEST(ReuseCurve, OfTheShippedTraceIsNearTheStandardOne) {
  Progress progress;
  const auto measured = ReuseCurve::from_trace(KVTIER_SOURCE_DIR "/tests/traces/smollm2-8k-demo",
                                               "scan", Budget::parse("5%").value(), 8, progress);
  ASSERT_TRUE(measured.ok()) << measured.status().to_string();
  const ReuseCurve standard = ReuseCurve::standard(0.05, kStandardReuse);
  ASSERT_GE(measured->points().size(), 4u);
  for (const ReuseCurve::Point& point : measured->points()) {
    EXPECT_EQ(measured->missed(point.share), point.missed);
    if (point.share <= 0.05) continue;
    EXPECT_NEAR(point.missed, standard.missed(point.share), 0.06);
  }
  EXPECT_FALSE(
      ReuseCurve::from_trace("/nowhere", "scan", Budget::parse("5%").value(), 8, progress).ok());
}

TEST(SelectorBytes, AreThoseThatFamiliesState) {
  // Means of eight keys of 128 halves, and 4 bytes: 260 / 8 per token.
  EXPECT_NEAR(measure_selector_bytes("mean", 128, 128, 8)->per_token, 32.5, 1);
  // Codes of 4 bits: 64 bytes; scales and means of values come on top.
  const double scan = measure_selector_bytes("scan", 128, 128, 8)->per_token;
  EXPECT_GT(scan, 64);
  EXPECT_LT(scan, 0.17 * 512);
  EXPECT_EQ(measure_selector_bytes("recency", 128, 128, 8)->at(1e6), 0);
  EXPECT_FALSE(measure_selector_bytes("nonsense", 128, 128, 8).ok());
  EXPECT_EQ(measure_selector_bytes("mean", 100, 100, 8).status().code(), StatusCode::kUnsupported);
}

}  // namespace
}  // namespace kvtier
