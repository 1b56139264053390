#include "tests/runtime/harness.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <string>

// Seeded walks over shapes, options and calls, on tiers that are just what `Runtime::needs` says:
// whatever is called in whatever order, results are right, or a block is named.

namespace kvtier::testing {
namespace {

template <typename T, std::size_t N>
const T& pick(const T (&choices)[N], std::mt19937& random) {
  return choices[random() % N];
}

struct Setting {
  const char* faults = nullptr;
  std::uint32_t sequences_max = 1;
};

HarnessOptions random_options(std::uint32_t seed, std::mt19937& random, const Setting& setting) {
  HarnessOptions options;
  options.seed = seed;
  options.block.tokens_per_block = pick({1u, 2u, 3u, 4u, 5u, 8u, 16u}, random);
  options.block.kv_heads = 1u << (random() % 3);
  options.block.kv_heads_per_block = random() % 3 == 0 ? options.block.kv_heads : 1;
  options.block.extent_bytes = 4096 * (3 + random() % 4) + 16384 * (random() % 2);
  options.layers = 1 + random() % 3;
  options.queries_per_kv_head = 1 + random() % 4;
  options.selector =
      pick({"random", "oracle", "recency", "mean(tokens=4)", "mean(tokens=8,outliers=0.5)",
            "mean(tokens=3,outliers=0)", "scan", "two-stage(tokens=4)", "scan(fetch=values)",
            "two-stage(tokens=8,fetch=values)", "cluster(tokens=4,segment=32,estimate=on)",
            "oracle(granularity=token)"},
           random);
  options.tokens_max = 200 + random() % 500;
  options.sinks = random() % 3 == 0 ? 0 : random() % 20;
  options.window = 1 + random() % 40;
  options.softmax.logit_cap = random() % 3 == 0 ? 5.0f : 0.0f;
  options.look_ahead_bytes = random() % 2 == 0 ? 0 : 3 * options.block.extent_bytes;
  options.eviction = pick({"lru", "lrfu"}, random);
  options.deterministic = random() % 2 == 0;
  options.transfer_threads = random() % 2 == 0;
  options.verify = pick({VerifyMode::kAll, VerifyMode::kArrivals}, random);
  options.sequences_max = setting.sequences_max;
  if (setting.faults != nullptr) {
    options.faults = FaultPlan::parse(setting.faults + (",seed=" + std::to_string(seed))).value();
    // Only every hop's verification notices what the link does.
    if (options.verify != VerifyMode::kAll) options.faults.link_bitflip_rate = 0;
  }
  return options;
}

class Walk {
 public:
  Walk(std::uint32_t seed, const Setting& setting)
      : random_(seed),
        may_fail_(setting.faults != nullptr),
        harness_(random_options(seed, random_, setting)) {}

  void run(int calls) {
    while (calls-- > 0 && !stopped_) {
      if (forks()) part_ways();
      const std::uint32_t kind = harness_.tokens() == 0 ? 0 : random_() % 8;
      if (kind <= 1) append(kind == 0 ? (forks() ? 500 : 200) : 4);
      if (kind == 2) truncate(cut());
      if (kind > 3) step();
      if (kind == 3) other_attention();
      for (const TierStats& tier : harness_.runtime().stats().tiers) {
        EXPECT_LE(tier.peak_bytes, tier.capacity_bytes);
      }
    }
    EXPECT_EQ(harness_.device().wrong_blocks(), 0u);
    const Status closed = harness_.close();
    EXPECT_TRUE(closed.ok() || may_fail_) << closed.to_string();
  }
  std::uint64_t steps_failed() const { return steps_failed_; }

 private:
  bool forks() const { return harness_.options().sequences_max > 1; }

  /// Forks keep most of what they have, so that there is something to share.
  std::uint32_t cut() {
    const std::uint32_t tokens = harness_.tokens();
    if (forks() && random_() % 4 > 0) return tokens - random_() % std::min(tokens + 1, 30u);
    return random_() % (tokens + 1);
  }

  /// Forks, ends, or goes on with any sequence.
  void part_ways() {
    const std::uint32_t kind = random_() % 8;
    if (kind == 0 && harness_.sequences() < harness_.options().sequences_max) {
      const Status status = harness_.fork(cut());
      EXPECT_TRUE(status.ok() || may_fail_) << status.to_string();
    }
    if (kind == 1 && harness_.sequences() > 1) {
      const Status status = harness_.end();
      EXPECT_TRUE(status.ok() || may_fail_) << status.to_string();
    }
    if (kind > 2) harness_.use(random_() % harness_.sequences());
  }

  void append(std::uint32_t most) {
    const std::uint32_t room = harness_.options().tokens_max - harness_.tokens();
    if (room == 0) return;
    const std::uint32_t before = harness_.tokens();
    const Status status = harness_.append(1 + random_() % std::min(room, most));
    if (status.ok() || status.code() == StatusCode::kCorrupt) {
      EXPECT_TRUE(status.ok() || may_fail_) << status.to_string();
      return;
    }
    EXPECT_TRUE(may_fail_) << status.to_string();
    truncate(before);
    stopped_ = harness_.tokens() != before;
  }

  void truncate(std::uint32_t tokens) {
    const Status status = harness_.truncate(tokens);
    EXPECT_TRUE(status.ok() || may_fail_) << status.to_string();
  }

  void step() {
    const std::uint32_t queries = 1 + random_() % std::min(8u, harness_.tokens());
    const std::uint32_t least = std::min(
        harness_.tokens(), harness_.options().sinks + harness_.options().window + queries - 1);
    const std::uint32_t budget = least + random_() % (harness_.tokens() - least + 1);
    const Status status = harness_.step(random_() % harness_.options().layers, budget, queries);
    if (status.ok()) {
      // Before estimates of the rest, which have tests of their own.
      const float* attended = harness_.report().attended_out;
      EXPECT_LE(
          max_difference({attended, attended + harness_.out().size()}, harness_.reference_out()),
          2e-5);
      EXPECT_LE(harness_.report().attended_tokens_max, budget);
      return;
    }
    ++steps_failed_;
    EXPECT_TRUE(may_fail_) << status.to_string();
    EXPECT_FALSE(harness_.report().failures.empty()) << status.to_string();
    for (float value : harness_.out()) EXPECT_TRUE(value != value);
  }

  /// Exact, or an engine's own.
  void other_attention() {
    const std::uint32_t layer = random_() % harness_.options().layers;
    const std::uint32_t tokens = harness_.tokens();
    if (random_() % 2 == 0) {
      const Status status = harness_.attend(layer, 1 + random_() % std::min(tokens, 12u));
      if (status.ok()) {
        EXPECT_LE(max_difference(harness_.out(), harness_.exact_reference()), 2e-5);
      } else {
        EXPECT_TRUE(may_fail_) << status.to_string();
        EXPECT_FALSE(harness_.report().failures.empty()) << status.to_string();
      }
      return;
    }
    ResolvedBlocks resolved;
    const std::uint32_t least =
        std::min(tokens, harness_.options().sinks + harness_.options().window);
    const Status status = harness_.resolve(layer, least + random_() % 20, &resolved);
    // There need not be room for all of a selection at once.
    if (status.ok() || status.code() == StatusCode::kNoSpace) return;
    EXPECT_TRUE(may_fail_) << status.to_string();
    EXPECT_FALSE(resolved.failures.empty()) << status.to_string();
  }

  std::mt19937 random_;
  bool may_fail_;
  Harness harness_;
  bool stopped_ = false;
  std::uint64_t steps_failed_ = 0;
};

TEST(RandomWalk, TheStatedNeedsAreEnoughForAnyOrderOfCalls) {
  for (std::uint32_t seed = 0; seed < 100; ++seed) {
    SCOPED_TRACE(::testing::Message() << "seed " << seed);
    Walk(seed, {}).run(60);
    if (HasFatalFailure() || HasNonfatalFailure()) return;
  }
}

TEST(RandomWalk, UnderFaultsNoBlockIsWrongAndEveryFailureIsNamed) {
  std::uint64_t failed = 0;
  for (const char* faults : {"misplaced:0.5", "lostwrite:0.1", "writeeio:0.05",
                             "bitflip:disk:0.05,shortread:0.05,eio:0.05,misplaced:0.05,rot:0.02,"
                             "lostwrite:0.02,delay:0.1,bitflip:link:0.02"}) {
    for (std::uint32_t seed = 1000; seed < 1012; ++seed) {
      SCOPED_TRACE(::testing::Message() << faults << ", seed " << seed);
      Walk walk(seed, {.faults = faults});
      walk.run(60);
      failed += walk.steps_failed();
      if (HasFatalFailure() || HasNonfatalFailure()) return;
    }
  }
  EXPECT_GT(failed, 0u) << "faults that cannot be recovered from were to be among them";
}

TEST(RandomWalk, ForksAnswerForThemselves) {
  for (std::uint32_t seed = 2000; seed < 2050; ++seed) {
    SCOPED_TRACE(::testing::Message() << "seed " << seed);
    Walk(seed, {.sequences_max = 2 + seed % 3}).run(90);
    if (HasFatalFailure() || HasNonfatalFailure()) return;
  }
}

TEST(RandomWalk, ForksUnderFaults) {
  std::uint64_t failed = 0;
  for (const char* faults : {"misplaced:0.5", "lostwrite:0.1", "writeeio:0.05",
                             "bitflip:disk:0.05,shortread:0.05,eio:0.05,misplaced:0.05,rot:0.02,"
                             "lostwrite:0.02,delay:0.1,bitflip:link:0.02"}) {
    for (std::uint32_t seed = 3000; seed < 3010; ++seed) {
      SCOPED_TRACE(::testing::Message() << faults << ", seed " << seed);
      Walk walk(seed, {.faults = faults, .sequences_max = 2});
      walk.run(150);
      failed += walk.steps_failed();
      if (HasFatalFailure() || HasNonfatalFailure()) return;
    }
  }
  EXPECT_GT(failed, 0u);
}

// An intact header of another extent must not be taken for an extent's own: what is sealed into it
// later would be of the wrong layer.
TEST(RandomWalk, AForeignExtentIsNotCutInto) {
  HarnessOptions options;
  options.faults = FaultPlan::parse("misplaced:1,seed=1").value();
  Harness harness(options);
  ASSERT_TRUE(harness.append(1000).ok());
  (void)harness.truncate(200);
  (void)harness.append(20);
  (void)harness.step(0, std::min(220u, harness.tokens()));
  EXPECT_EQ(harness.device().wrong_blocks(), 0u);
}

// Tokens behind a damaged block still belong to the context: positions must not shift.
TEST(RandomWalk, ADamagedBlockDoesNotEndAnAppend) {
  HarnessOptions options;
  options.faults = FaultPlan::parse("bitflip:link:0.3,seed=4").value();
  options.verify = VerifyMode::kAll;
  Harness harness(options);
  const Status status = harness.append(1000);
  ASSERT_EQ(status.code(), StatusCode::kCorrupt) << status.to_string();
  EXPECT_GT(harness.link_faults().fired[static_cast<std::size_t>(FaultKind::kBitFlip)].load(), 0u);
  // Sinks and window are where they belong, whatever else can be had.
  (void)harness.step(0, 1000);
  EXPECT_EQ(harness.device().wrong_blocks(), 0u);
  ASSERT_TRUE(harness.step(0, options.sinks + options.window).ok());
  EXPECT_LE(max_difference(harness.out(), harness.reference_out()), 1e-5);
}

}  // namespace
}  // namespace kvtier::testing
