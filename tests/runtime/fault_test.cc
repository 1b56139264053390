#include "tests/runtime/harness.h"

#include <gtest/gtest.h>

#include <array>
#include <cstdint>
#include <random>
#include <string>

namespace kvtier::testing {
namespace {

/// What a campaign of seeded runs has seen.
struct Campaign {
  std::uint64_t fetches_min = ~std::uint64_t{0};
  std::uint64_t wrong_blocks = 0;
  std::uint64_t failed_steps = 0;
  std::uint64_t unnamed_failures = 0;
  std::uint64_t mismatched = 0;
  std::uint64_t recovered = 0;
  std::uint64_t over_capacity = 0;
  std::array<std::uint64_t, kFaultKindCount> fired{};
  std::uint64_t link_flips = 0;
};

FaultPlan every_fault(std::uint64_t seed, bool link) {
  FaultPlan plan;
  plan.seed = seed;
  plan.disk_rate.fill(2e-3);
  // An extent is written once and read many times, so faults on writes are made likelier.
  for (FaultKind kind : {FaultKind::kWriteError, FaultKind::kLostWrite, FaultKind::kRot}) {
    plan.disk_rate[static_cast<std::size_t>(kind)] = 1e-2;
  }
  // A disk that refuses for lack of space ends a run early, as it should: such runs come apart.
  plan.disk_rate[static_cast<std::size_t>(FaultKind::kNoSpace)] = 0.0;
  if (link) plan.link_bitflip_rate = 2e-3;
  return plan;
}

// Appends, steps with random selections (so that most blocks have to be fetched) and truncations,
// on tiers as small as they may be, until `fetches` blocks have been fetched.
void run_seed(std::uint64_t seed, VerifyMode verify, std::uint64_t fetches, Campaign& campaign,
              double no_space_rate = 0.0) {
  HarnessOptions options;
  options.seed = seed;
  options.compute = false;
  options.layers = 1;
  options.window = 8;
  options.verify = verify;
  options.look_ahead_bytes = seed % 2 == 0 ? 0 : 36 * 1024;
  options.faults = every_fault(seed, verify == VerifyMode::kAll);
  options.faults.disk_rate[static_cast<std::size_t>(FaultKind::kNoSpace)] = no_space_rate;
  Harness harness(options);
  std::mt19937_64 random(seed);
  if (!harness.append(900).ok()) ++campaign.failed_steps;
  std::uint64_t fetched = 0;
  // A failed step fetches little: bounded, so that a broken store cannot make this endless.
  for (int round = 0; fetched < fetches && round < 2000; ++round) {
    const std::uint32_t roll = static_cast<std::uint32_t>(random() % 64);
    if (roll == 0) {
      (void)harness.truncate(800 + static_cast<std::uint32_t>(random() % (harness.tokens() - 800)));
    }
    if (harness.tokens() < 1024) (void)harness.append(1);
    const Status status = harness.step(0, 500 + roll);
    if (!status.ok()) {
      ++campaign.failed_steps;
      if (harness.report().failures.empty()) ++campaign.unnamed_failures;
    }
    const RuntimeStats stats = harness.runtime().stats();
    fetched = stats.tiers[1].hits + stats.tiers[2].hits;
  }
  campaign.wrong_blocks += harness.device().wrong_blocks();
  (void)harness.close();
  const RuntimeStats stats = harness.runtime().stats();
  campaign.fetches_min = std::min(campaign.fetches_min, fetched);
  campaign.mismatched += stats.verification.mismatched;
  campaign.recovered += stats.verification.recovered;
  for (const TierStats& tier : stats.tiers) {
    campaign.over_capacity += tier.peak_bytes > tier.capacity_bytes ? 1 : 0;
  }
  for (std::size_t kind = 0; kind < kFaultKindCount; ++kind) {
    campaign.fired[kind] += harness.faults().fired[kind].load();
    campaign.link_flips += harness.link_faults().fired[kind].load();
  }
}

// A thousand seeds in ten parts, so that they can run side by side.
constexpr std::uint64_t kParts = 10;
constexpr std::uint64_t kSeedsPerPart = 100;
constexpr std::uint64_t kFetches = 10'000;

class Faults : public ::testing::TestWithParam<std::uint64_t> {};

TEST_P(Faults, NoWrongBlock) {
  Campaign campaign;
  for (std::uint64_t i = 0; i < kSeedsPerPart; ++i) {
    const std::uint64_t seed = 1 + GetParam() + kParts * i;
    const VerifyMode verify = seed % 3 == 0 ? VerifyMode::kAll : VerifyMode::kArrivals;
    run_seed(seed, verify, kFetches, campaign);
    ASSERT_EQ(campaign.wrong_blocks, 0u) << "seed " << seed;
  }
  EXPECT_GE(campaign.fetches_min, kFetches);
  // And a few whose disk fills up on the way: they end where nothing can be written any more.
  for (std::uint64_t seed = 1; seed <= 5; ++seed) {
    run_seed(1'000'000 + 10 * seed + GetParam(), VerifyMode::kArrivals, 500, campaign, 0.1);
    ASSERT_EQ(campaign.wrong_blocks, 0u) << "seed " << seed << " of a full disk";
  }
  EXPECT_EQ(campaign.unnamed_failures, 0u);
  EXPECT_EQ(campaign.over_capacity, 0u);
  EXPECT_GT(campaign.mismatched, 0u);
  EXPECT_GT(campaign.recovered, 0u);
  EXPECT_GT(campaign.failed_steps, 0u) << "faults on writes cannot always be recovered from";
  for (int kind = 0; kind < kFaultKindCount; ++kind) {
    EXPECT_GT(campaign.fired[static_cast<std::size_t>(kind)], 0u)
        << to_string(static_cast<FaultKind>(kind)) << " never fired";
  }
  EXPECT_GT(campaign.link_flips, 0u);
}

INSTANTIATE_TEST_SUITE_P(ThousandSeeds, Faults, ::testing::Range<std::uint64_t>(0, kParts));

// The canary: the same campaign without verification lets wrong blocks through. If it does not, the
// test above proves nothing.
TEST(FaultCases, WithoutVerificationTheSameCampaignFails) {
  Campaign campaign;
  for (std::uint64_t seed = 1; seed <= 20 && campaign.wrong_blocks == 0; ++seed) {
    run_seed(seed, VerifyMode::kNone, kFetches, campaign);
  }
  EXPECT_GT(campaign.wrong_blocks, 0u);
}

// Faults that go away are recovered from without anybody noticing more than a counter.
TEST(FaultCases, TransientFaultsAreRecoveredFrom) {
  for (const char* spec : {"bitflip:disk:0.05,seed=1", "shortread:0.05,seed=2", "eio:0.05,seed=3",
                           "misplaced:0.05,seed=4", "delay:0.2,seed=5"}) {
    HarnessOptions options;
    options.faults = FaultPlan::parse(spec).value();
    options.deterministic = true;
    // Many small extents: most selected blocks have to come from disk.
    options.block.extent_bytes = 8192;
    HarnessOptions sound = options;
    sound.faults = {};
    Harness faulty(options);
    Harness clean(sound);
    for (Harness* harness : {&faulty, &clean}) {
      ASSERT_TRUE(harness->append(1000).ok());
    }
    std::uint64_t failed = 0;
    for (int step = 0; step < 40; ++step) {
      ASSERT_TRUE(clean.step(0, 400).ok());
      if (faulty.step(0, 400).ok()) {
        EXPECT_EQ(faulty.out(), clean.out()) << spec;
      } else {
        ++failed;
      }
    }
    EXPECT_LE(failed, 2u) << spec << ": three attempts at 5 % each fail about once in 8,000";
    const RuntimeStats stats = faulty.runtime().stats();
    std::uint64_t fired = 0;
    for (const auto& count : faulty.faults().fired) fired += count.load();
    EXPECT_GT(fired, 0u) << spec;
    EXPECT_EQ(faulty.device().wrong_blocks(), 0u) << spec;
    if (std::string(spec).find("bitflip") == 0 || std::string(spec).find("misplaced") == 0) {
      EXPECT_GT(stats.verification.mismatched, 0u) << spec;
      EXPECT_GT(stats.verification.recovered, 0u) << spec;
    }
  }
}

// Stored bytes that have gone bad cannot be recovered: the step fails and names every block.
TEST(FaultCases, RottenExtentsAreNamed) {
  HarnessOptions options;
  options.selector = "oracle";
  Harness harness(options);
  ASSERT_TRUE(harness.append(1000).ok());
  // One bit in every extent's payload, at a place that only one block of it covers.
  const std::span<std::byte> stored = harness.stored().bytes();
  const BlockLayout& layout = harness.runtime().layout();
  for (std::size_t offset = 0; offset + layout.extent_bytes() <= stored.size();
       offset += layout.extent_bytes()) {
    stored[offset + layout.block_offset(3) + 17] ^= std::byte{4};
  }
  ASSERT_FALSE(harness.step(0, 1000).ok());
  ASSERT_FALSE(harness.report().failures.empty());
  for (const BlockFailure& failure : harness.report().failures) {
    EXPECT_EQ(failure.tier, Tier::kDisk);
    EXPECT_EQ(failure.code, StatusCode::kCorrupt);
    EXPECT_EQ(failure.identity.index.value % layout.blocks_per_extent(), 3u);
    EXPECT_NE(failure.checksum_expected, failure.checksum_found);
    EXPECT_NE(failure.message.find("disk: block "), std::string::npos) << failure.message;
  }
  for (float value : harness.out()) EXPECT_TRUE(value != value) << "a failed step's output";
  EXPECT_EQ(harness.device().wrong_blocks(), 0u);
  // The sequence goes on: what is intact can still be attended.
  ASSERT_TRUE(harness.step(0, 20).ok());
  EXPECT_LE(max_difference(harness.out(), harness.reference_out()), 1e-5);
}

TEST(FaultCases, LinkFlipsAreSeenOnlyByVerifyingEveryHop) {
  HarnessOptions options;
  options.faults = FaultPlan::parse("bitflip:link:0.02,seed=9").value();
  options.verify = VerifyMode::kAll;
  Harness every_hop(options);
  options.verify = VerifyMode::kArrivals;
  Harness arrivals(options);
  for (Harness* harness : {&every_hop, &arrivals}) {
    ASSERT_TRUE(harness->append(900).ok());
    for (int step = 0; step < 60; ++step) (void)harness->step(0, 300);
  }
  EXPECT_EQ(every_hop.device().wrong_blocks(), 0u);
  EXPECT_GT(every_hop.runtime().stats().verification.recovered, 0u);
  EXPECT_GT(arrivals.device().wrong_blocks(), 0u);
}

}  // namespace
}  // namespace kvtier::testing
