#include "transfer/fault_plan.h"

#include <gtest/gtest.h>

namespace kvtier {
namespace {

double disk(const FaultPlan& plan, FaultKind kind) {
  return plan.disk_rate[static_cast<std::size_t>(kind)];
}

TEST(FaultPlanTest, ReadsEveryKind) {
  for (int i = 0; i < kFaultKindCount; ++i) {
    const auto kind = static_cast<FaultKind>(i);
    const auto plan = FaultPlan::parse(fmt::format("{}:0.25", to_string(kind)));
    ASSERT_TRUE(plan.ok()) << plan.status().to_string();
    EXPECT_EQ(disk(*plan, kind), 0.25);
    EXPECT_TRUE(plan->any());
    for (int other = 0; other < kFaultKindCount; ++other) {
      if (other != i) {
        EXPECT_EQ(disk(*plan, static_cast<FaultKind>(other)), 0.0);
      }
    }
  }
}

TEST(FaultPlanTest, ReadsTargetsAndSeed) {
  const auto plan = FaultPlan::parse(
      "bitflip:disk:1e-3,bitflip:link:0.5,shortread:1e-3,eio:1e-4,misplaced:1e-4,seed=7");
  ASSERT_TRUE(plan.ok()) << plan.status().to_string();
  EXPECT_EQ(disk(*plan, FaultKind::kBitFlip), 1e-3);
  EXPECT_EQ(disk(*plan, FaultKind::kShortRead), 1e-3);
  EXPECT_EQ(disk(*plan, FaultKind::kIoError), 1e-4);
  EXPECT_EQ(disk(*plan, FaultKind::kMisplaced), 1e-4);
  EXPECT_EQ(plan->link_bitflip_rate, 0.5);
  EXPECT_EQ(plan->seed, 7U);
}

TEST(FaultPlanTest, NothingInjectsNothing) {
  const auto plan = FaultPlan::parse("");
  ASSERT_TRUE(plan.ok());
  EXPECT_FALSE(plan->any());
  EXPECT_FALSE(FaultPlan::parse("seed=9")->any());
  EXPECT_FALSE(FaultPlan::parse("eio:0")->any());
  EXPECT_TRUE(FaultPlan::parse("bitflip:link:1")->any());
}

TEST(FaultPlanTest, CanonicalFormReadsBackAsItself) {
  for (const char* spec :
       {"seed=0", "eio:disk:0.0001,seed=3", "bitflip:disk:1,bitflip:link:1,seed=1",
        "rot:disk:1e-09,delay:disk:0.125,seed=18446744073709551615"}) {
    const auto plan = FaultPlan::parse(spec);
    ASSERT_TRUE(plan.ok()) << plan.status().to_string();
    EXPECT_EQ(plan->to_string(), spec);
  }
}

struct BadSpec {
  const char* spec;
  const char* named;
};

class BadFaultPlanTest : public ::testing::TestWithParam<BadSpec> {};

TEST_P(BadFaultPlanTest, IsRefusedByName) {
  const auto plan = FaultPlan::parse(GetParam().spec);
  ASSERT_FALSE(plan.ok()) << GetParam().spec;
  EXPECT_EQ(plan.status().code(), StatusCode::kInvalidArgument);
  EXPECT_NE(plan.status().message().find(GetParam().named), std::string::npos)
      << plan.status().message();
  EXPECT_NE(plan.status().message().find("misplaced"), std::string::npos) << "lists what is known";
}

INSTANTIATE_TEST_SUITE_P(
    Table, BadFaultPlanTest,
    ::testing::Values(
        BadSpec{"flip:0.1", "unknown kind 'flip'"}, BadSpec{"eio", "no rate"},
        BadSpec{"eio:", "'' is not a rate"}, BadSpec{"eio:1.5", "'1.5' is not a rate"},
        BadSpec{"eio:-0.1", "'-0.1' is not a rate"}, BadSpec{"eio:nan", "'nan' is not a rate"},
        BadSpec{"eio:inf", "'inf' is not a rate"}, BadSpec{"eio:0.1x", "'0.1x' is not a rate"},
        BadSpec{"eio:0,1", "unknown kind '1'"}, BadSpec{"eio:tape:0.1", "unknown target 'tape'"},
        BadSpec{"eio:link:0.1", "a link takes bitflip only"},
        BadSpec{"eio:disk:0.1:2", "too many fields"},
        BadSpec{"eio:0.1,,rot:0.1", "unknown kind ''"}, BadSpec{",", "unknown kind ''"},
        BadSpec{"eio:0.1,eio:disk:0.2", "given twice"}, BadSpec{"seed=1,seed=2", "given twice"},
        BadSpec{"seed=", "not a whole number"}, BadSpec{"seed=-1", "not a whole number"},
        BadSpec{"seed=0x7", "not a whole number"}, BadSpec{" eio:0.1", "unknown kind ' eio'"}));

TEST(FaultDrawTest, RatesAreMetAndInputsMatter) {
  constexpr int kDraws = 100000;
  int hits = 0;
  for (int i = 0; i < kDraws; ++i) {
    if (fault_hits(fault_draw(1, 2, static_cast<std::uint64_t>(i) * 4096, 0), 0.01)) ++hits;
  }
  // 1000 expected; six standard deviations of a binomial are 190.
  EXPECT_NEAR(hits, 1000, 190);
  const std::uint64_t draw = fault_draw(1, 2, 3, 4);
  EXPECT_EQ(draw, fault_draw(1, 2, 3, 4));
  EXPECT_NE(draw, fault_draw(9, 2, 3, 4));
  EXPECT_NE(draw, fault_draw(1, 9, 3, 4));
  EXPECT_NE(draw, fault_draw(1, 2, 9, 4));
  EXPECT_NE(draw, fault_draw(1, 2, 3, 9));
  EXPECT_TRUE(fault_hits(UINT64_MAX, 1.0));
  EXPECT_FALSE(fault_hits(0, 0.0));
}

}  // namespace
}  // namespace kvtier
