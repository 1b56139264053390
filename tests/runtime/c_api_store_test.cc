// Prefixes that outlive a runtime, through the C ABI: what is saved comes back, what goes wrong is
// told, and nothing that a caller may pass ends the process or spoils the store.

#include "tests/runtime/c_api_engine.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <limits>

namespace kvtier::testing {
namespace {

using ::testing::HasSubstr;

constexpr std::uint32_t kTokens = 200;

class CApiStore : public ::testing::Test {
 protected:
  CApiStore() {
    std::string pattern = ::testing::TempDir() + "/kvtier-c-api-XXXXXX";
    folder_ = ::mkdtemp(pattern.data());
    path_ = folder_ + "/store";
    EXPECT_EQ(KVTIER_STORE_OPTIONS_INIT(&options_), KVTIER_OK);
    options_.path = path_.c_str();
    options_.model = "a model";
    options_.capacity_bytes = 16 << 20;
    options_.free_bytes_min = 0;
  }
  ~CApiStore() override { std::filesystem::remove_all(folder_); }

  /// Token ids of text number `text`.
  static std::vector<std::uint32_t> ids(std::uint32_t text = 0) {
    std::vector<std::uint32_t> ids(kTokens);
    for (std::uint32_t i = 0; i < kTokens; ++i) ids[i] = i * 7 + text * 100000;
    return ids;
  }
  static kvtier_status save(Engine& engine, kvtier_sequence sequence, std::uint32_t* saved,
                            std::uint32_t text = 0, double value = 0.0) {
    return kvtier_sequence_save(engine.runtime, sequence, ids(text).data(), kTokens, value, saved);
  }
  /// Tokens that a restore finds; what it gives is freed again.
  static std::uint32_t restorable(Engine& engine, std::uint32_t text = 0) {
    kvtier_sequence sequence = 0;
    std::uint32_t tokens = 0;
    EXPECT_EQ(
        kvtier_sequence_restore(engine.runtime, ids(text).data(), kTokens, &sequence, &tokens),
        KVTIER_OK)
        << kvtier_last_error();
    EXPECT_EQ(kvtier_sequence_free(engine.runtime, sequence), KVTIER_OK);
    return tokens;
  }
  void open(Engine& engine) const {
    ASSERT_EQ(kvtier_store_open(engine.runtime, &options_), KVTIER_OK) << kvtier_last_error();
  }
  /// One bit of the first extent in the store's first segment.
  void damage_an_extent() const {
    const std::string segment = path_ + "/segment-0000";
    std::fstream file(segment, std::ios::in | std::ios::out | std::ios::binary);
    const std::string bytes{std::istreambuf_iterator<char>(file), {}};
    const std::size_t extent = bytes.find("KVTXTNT\n");
    ASSERT_NE(extent, std::string::npos);
    const std::size_t at = extent + options_extent_bytes() / 2;
    file.clear();
    file.seekp(static_cast<std::streamoff>(at));
    file.put(static_cast<char>(bytes[at] ^ 1));
  }
  static std::size_t options_extent_bytes() { return small_options().extent_bytes; }

  std::string folder_;
  std::string path_;
  kvtier_store_options options_{};
};

TEST_F(CApiStore, PrefixesAreThereForALaterRuntime) {
  std::uint32_t saved = 0;
  {
    Engine engine(small_options());
    const kvtier_sequence sequence = engine.create();
    engine.append(sequence, 0, kTokens);
    EXPECT_EQ(save(engine, sequence, &saved), KVTIER_INVALID_ARGUMENT);
    EXPECT_THAT(kvtier_last_error(), HasSubstr("no store"));
    open(engine);
    EXPECT_EQ(kvtier_store_open(engine.runtime, &options_), KVTIER_BUSY);
    ASSERT_EQ(save(engine, sequence, &saved), KVTIER_OK) << kvtier_last_error();
    EXPECT_GT(saved, 0u);
    // One process, or runtime, per path.
    Engine other(small_options());
    EXPECT_EQ(kvtier_store_open(other.runtime, &options_), KVTIER_BUSY);
  }
  Engine engine(small_options());
  open(engine);
  kvtier_sequence sequence = 0;
  std::uint32_t tokens = 0;
  ASSERT_EQ(kvtier_sequence_restore(engine.runtime, ids().data(), kTokens, &sequence, &tokens),
            KVTIER_OK)
      << kvtier_last_error();
  EXPECT_EQ(tokens, saved);
  const kvtier_query query = engine.ask(1, 1, 0);
  ASSERT_EQ(kvtier_attend_exact(engine.runtime, sequence, &query, nullptr), KVTIER_OK);
  EXPECT_LE(distance(engine.out(), engine.exact_reference(1, tokens)), kTolerance);
  kvtier_store_stats stats{};
  stats.struct_size = sizeof(stats);
  ASSERT_EQ(kvtier_get_store_stats(engine.runtime, &stats), KVTIER_OK);
  EXPECT_GT(stats.blocks_verified, 0u);
  EXPECT_EQ(saved % stats.tokens_per_run, 0u);
  EXPECT_EQ(kvtier_store_forget(engine.runtime, ids().data(), saved), KVTIER_OK);
  EXPECT_EQ(kvtier_store_forget(engine.runtime, ids().data(), saved), KVTIER_NOT_FOUND);
  EXPECT_EQ(kvtier_store_close(engine.runtime), KVTIER_OK);
  EXPECT_EQ(kvtier_store_close(engine.runtime), KVTIER_OK);
}

// What a save calls stored has to be restorable: a run that was found damaged is written anew.
TEST_F(CApiStore, WhatWasDamagedIsSavedAgain) {
  Engine engine(small_options());
  const kvtier_sequence sequence = engine.create();
  engine.append(sequence, 0, kTokens);
  open(engine);
  std::uint32_t saved = 0;
  ASSERT_EQ(save(engine, sequence, &saved), KVTIER_OK) << kvtier_last_error();
  ASSERT_EQ(kvtier_store_close(engine.runtime), KVTIER_OK);
  damage_an_extent();
  open(engine);
  EXPECT_LT(restorable(engine), saved);
  std::uint32_t again = 0;
  ASSERT_EQ(save(engine, sequence, &again), KVTIER_OK) << kvtier_last_error();
  EXPECT_EQ(again, saved);
  EXPECT_EQ(restorable(engine), saved);
}

// Values are the order in which a full store evicts: one that is no number has no place in it.
TEST_F(CApiStore, AValueIsANumber) {
  Engine engine(small_options());
  const kvtier_sequence sequence = engine.create();
  engine.append(sequence, 0, kTokens);
  options_.capacity_bytes = 6 << 20;
  open(engine);
  for (const double value :
       {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
    EXPECT_EQ(save(engine, sequence, nullptr, 0, value), KVTIER_INVALID_ARGUMENT);
    EXPECT_THAT(kvtier_last_error(), HasSubstr("value"));
  }
  // The store goes on evicting what is worth least.
  for (std::uint32_t text = 0; text < 12; ++text) {
    ASSERT_EQ(save(engine, sequence, nullptr, text, 1.0), KVTIER_OK) << kvtier_last_error();
  }
  kvtier_store_stats stats{};
  stats.struct_size = sizeof(stats);
  ASSERT_EQ(kvtier_get_store_stats(engine.runtime, &stats), KVTIER_OK);
  EXPECT_GT(stats.evicted_items, 0u);
}

// Slots that were resolved hold until the next call, and this is one.
TEST_F(CApiStore, ARestoreLetsGoOfWhatWasResolved) {
  kvtier_options options = small_options();
  kvtier_needs needs{};
  needs.struct_size = sizeof(needs);
  ASSERT_EQ(kvtier_runtime_needs(&options, &needs), KVTIER_OK);
  options.device_capacity_bytes = needs.device_bytes;
  Engine engine(options);
  const kvtier_sequence sequence = engine.create();
  engine.append(sequence, 0, kTokens);
  open(engine);
  std::uint32_t saved = 0;
  ASSERT_EQ(save(engine, sequence, &saved), KVTIER_OK) << kvtier_last_error();
  kvtier_slots slots{};
  slots.struct_size = sizeof(slots);
  kvtier_status resolved = KVTIER_NO_SPACE;
  for (std::uint32_t budget = kTokens; resolved == KVTIER_NO_SPACE && budget > 30; budget -= 2) {
    const kvtier_query query = engine.ask(0, 1, budget);
    resolved = kvtier_resolve(engine.runtime, sequence, &query, &slots);
  }
  ASSERT_EQ(resolved, KVTIER_OK) << kvtier_last_error();
  kvtier_sequence restored = 0;
  std::uint32_t tokens = 0;
  EXPECT_EQ(kvtier_sequence_restore(engine.runtime, ids().data(), kTokens, &restored, &tokens),
            KVTIER_OK)
      << kvtier_last_error();
  EXPECT_EQ(tokens, saved);
}

// A selector that does not go with the model shows when a sequence is made; the runtime is whole.
TEST_F(CApiStore, ARefusedRestoreLeavesNothingOpen) {
  kvtier_options options = small_options();
  options.selector = "int4";
  options.head_dim = 12;  // Not a multiple of 8.
  options.sequences_max = 1;
  Engine engine(options);
  open(engine);
  kvtier_sequence sequence = 0;
  std::uint32_t tokens = 0;
  for (int i = 0; i < 2; ++i) {
    EXPECT_EQ(kvtier_sequence_restore(engine.runtime, ids().data(), kTokens, &sequence, &tokens),
              KVTIER_INVALID_ARGUMENT);
    EXPECT_THAT(kvtier_last_error(), HasSubstr("head dim"));
  }
}

TEST_F(CApiStore, EveryLevelMakesItsFolder) {
  for (int level = KVTIER_DURABLE_NONE; level <= KVTIER_DURABLE_POWER; ++level) {
    std::filesystem::remove_all(path_);
    options_.durability = static_cast<kvtier_durability>(level);
    Engine engine(small_options());
    const kvtier_sequence sequence = engine.create();
    engine.append(sequence, 0, kTokens);
    open(engine);
    std::uint32_t saved = 0;
    ASSERT_EQ(save(engine, sequence, &saved), KVTIER_OK) << kvtier_last_error();
    EXPECT_EQ(restorable(engine), saved);
    EXPECT_EQ(std::filesystem::status(path_).permissions(), std::filesystem::perms::owner_all);
  }
}

}  // namespace
}  // namespace kvtier::testing
