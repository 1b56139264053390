#include "tests/runtime/harness.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <numeric>
#include <string>
#include <vector>

// What one process saves another restores: steps answer the same, bit for bit, and nothing that is
// damaged, of another text, model or tenant is ever taken for it.

namespace kvtier::testing {
namespace {

using ::testing::HasSubstr;

/// A store on disk that is opened, closed and opened again.
class PrefixTest : public ::testing::Test {
 protected:
  PrefixTest() {
    std::string pattern = ::testing::TempDir() + "/kvtier-prefix-XXXXXX";
    path_ = ::mkdtemp(pattern.data());
    std::filesystem::remove(path_);
  }
  ~PrefixTest() override { std::filesystem::remove_all(path_); }

  std::unique_ptr<Store> open() const {
    StoreOptions options;
    options.capacity_bytes = 64 << 20;
    options.free_bytes_min = 0;
    auto store = open_store(path_, options);
    EXPECT_TRUE(store.ok()) << store.status().to_string();
    return std::move(store).value();
  }

  std::string path_;
};

HarnessOptions saving_options(const std::string& selector) {
  HarnessOptions options;
  options.selector = selector;
  options.sequences_max = 3;
  options.deterministic = true;
  options.device_bytes = 1 << 20;
  return options;
}

std::vector<std::uint32_t> made_up_ids(std::uint32_t count) {
  std::vector<std::uint32_t> ids(count);
  for (std::uint32_t i = 0; i < count; ++i) ids[i] = (i * 2654435761u) >> 7;
  return ids;
}

std::vector<float> decode(Harness& harness, std::uint32_t steps) {
  std::vector<float> all;
  for (std::uint32_t i = 0; i < steps; ++i) {
    EXPECT_TRUE(harness.append(1).ok());
    for (std::uint32_t layer = 0; layer < harness.options().layers; ++layer) {
      const Status status = harness.step(layer, 60);
      EXPECT_TRUE(status.ok()) << status.to_string();
      all.insert(all.end(), harness.out().begin(), harness.out().end());
      all.insert(all.end(), harness.lse().begin(), harness.lse().end());
    }
  }
  return all;
}

const PrefixScope kScope{.model = "a model", .tenant_salt = "a tenant"};

TEST_F(PrefixTest, ALaterProcessAnswersBitForBit) {
  for (const char* selector :
       {"scan", "scan(fetch=values)", "mean(tokens=4)", "minmax(tokens=8)", "cluster", "recency"}) {
    SCOPED_TRACE(selector);
    std::filesystem::remove_all(path_);
    const auto ids = made_up_ids(700);
    std::vector<float> expected;
    std::uint32_t saved = 0;
    {
      Harness first(saving_options(selector));
      auto store = open();
      PrefixStore prefixes(store.get(), first.runtime().layout(), kScope);
      ASSERT_TRUE(first.append(700).ok());
      const auto done = first.sequence().save(prefixes, ids);
      ASSERT_TRUE(done.ok()) << done.status().to_string();
      saved = *done;
      EXPECT_EQ(saved, 700 / prefixes.tokens_per_run() * prefixes.tokens_per_run());
      // The run that saved it: what is not a whole run is taken back, as the other never had it.
      ASSERT_TRUE(first.truncate(saved).ok());
      expected = decode(first, 12);
      EXPECT_TRUE(first.close().ok());
      EXPECT_TRUE(store->close().ok());
    }
    HarnessOptions later = saving_options(selector);
    later.seed += 1 << 20;  // Other origins, the same questions.
    Harness second(later);
    auto store = open();
    PrefixStore prefixes(store.get(), second.runtime().layout(), kScope);
    const auto restored = second.restore(prefixes, ids);
    ASSERT_TRUE(restored.ok()) << restored.status().to_string();
    EXPECT_EQ(restored->tokens, saved);
    EXPECT_FALSE(restored->damaged);
    EXPECT_EQ(decode(second, 12), expected);
    EXPECT_EQ(second.device().wrong_blocks(), 0u);
    // Exact attention reads every block of it.
    for (std::uint32_t layer = 0; layer < 2; ++layer) {
      ASSERT_TRUE(second.attend(layer, 3).ok());
      EXPECT_LE(max_difference(second.out(), second.exact_reference()), kOutputTolerance);
    }
    EXPECT_TRUE(second.close().ok());
    EXPECT_TRUE(store->close().ok());
  }
}

TEST_F(PrefixTest, TheLongestPrefixThatAgreesIsFound) {
  Harness harness(saving_options("mean(tokens=4)"));
  auto store = open();
  PrefixStore prefixes(store.get(), harness.runtime().layout(), kScope);
  const std::uint32_t run = prefixes.tokens_per_run();
  ASSERT_TRUE(harness.append(3 * run).ok());
  const auto ids = made_up_ids(3 * run);
  ASSERT_TRUE(harness.sequence().save(prefixes, ids).ok());
  const auto found = [&](const std::vector<std::uint32_t>& asked, const PrefixScope& scope) {
    PrefixStore other(store.get(), harness.runtime().layout(), scope);
    const auto restored = harness.restore(other, asked);
    EXPECT_TRUE(restored.ok()) << restored.status().to_string();
    EXPECT_EQ(harness.tokens(), restored->tokens);
    EXPECT_TRUE(harness.end().ok());
    return restored->tokens;
  };
  EXPECT_EQ(found(ids, kScope), 3 * run);
  auto longer = ids;
  longer.push_back(7);
  EXPECT_EQ(found(longer, kScope), 3 * run);
  // A changed token misses from its run on, and hits before it.
  for (std::uint32_t changed : {0u, run - 1, run, 2 * run + 5, 3 * run - 1}) {
    auto other = ids;
    ++other[changed];
    EXPECT_EQ(found(other, kScope), changed / run * run);
  }
  // A partial last run is never a hit.
  EXPECT_EQ(found({ids.begin(), ids.begin() + 2 * run - 1}, kScope), run);
  EXPECT_EQ(found(ids, {.model = "another", .tenant_salt = "a tenant"}), 0u);
  EXPECT_EQ(found(ids, {.model = "a model", .tenant_salt = "another"}), 0u);
  EXPECT_TRUE(harness.close().ok());
  EXPECT_TRUE(store->close().ok());
}

TEST_F(PrefixTest, ARunThatIsDamagedEndsThePrefix) {
  const auto ids = made_up_ids(600);
  std::uint32_t run = 0;
  std::uint32_t saved = 0;
  {
    Harness harness(saving_options("scan"));
    auto store = open();
    PrefixStore prefixes(store.get(), harness.runtime().layout(), kScope);
    run = prefixes.tokens_per_run();
    ASSERT_TRUE(harness.append(600).ok());
    saved = harness.sequence().save(prefixes, ids).value();
    ASSERT_GE(saved, 2 * run);
    EXPECT_TRUE(harness.close().ok());
    EXPECT_TRUE(store->close().ok());
  }
  // One byte of a key of the second run, wherever it lies: flip bytes until its prefix ends early.
  std::uint32_t shorter = saved;
  std::filesystem::path segment;
  for (const auto& file : std::filesystem::directory_iterator(path_)) {
    if (segment.empty() || file.file_size() > std::filesystem::file_size(segment)) {
      segment = file.path();
    }
  }
  std::fstream bytes(segment, std::ios::in | std::ios::out | std::ios::binary);
  const std::uint64_t size = std::filesystem::file_size(segment);
  for (std::uint64_t at = 6000; at < size && shorter == saved; at += 12 * 1024) {
    bytes.seekg(static_cast<std::streamoff>(at));
    const int old = bytes.get();
    if (old == 0 || old == EOF) continue;  // Nothing stands there.
    bytes.seekp(static_cast<std::streamoff>(at));
    bytes.put(static_cast<char>(old ^ 0x10));
    bytes.flush();
    HarnessOptions later = saving_options("scan");
    later.seed += 1 << 20;
    Harness harness(later);
    auto store = open();
    PrefixStore prefixes(store.get(), harness.runtime().layout(), kScope);
    const auto restored = harness.restore(prefixes, ids);
    ASSERT_TRUE(restored.ok()) << restored.status().to_string();
    shorter = restored->tokens;
    EXPECT_EQ(shorter % run, 0u);
    EXPECT_EQ(restored->damaged, shorter < saved);
    // What was given is right, and goes on being right.
    ASSERT_TRUE(harness.append(30).ok());
    for (std::uint32_t layer = 0; layer < 2; ++layer) {
      ASSERT_TRUE(harness.step(layer, 25).ok());
      ASSERT_TRUE(harness.attend(layer, 2).ok());
      EXPECT_LE(max_difference(harness.out(), harness.exact_reference()), kOutputTolerance);
    }
    EXPECT_EQ(harness.device().wrong_blocks(), 0u);
    EXPECT_TRUE(harness.close().ok());
    EXPECT_TRUE(store->close().ok());
  }
  EXPECT_LT(shorter, saved) << "no byte that was flipped mattered";
}

TEST_F(PrefixTest, OtherOptionsOfSelectionReadTheKeysAgain) {
  const auto ids = made_up_ids(500);
  auto store = open();
  Harness first(saving_options("mean(tokens=4)"));
  PrefixStore prefixes(store.get(), first.runtime().layout(), kScope);
  ASSERT_TRUE(first.append(500).ok());
  const std::uint32_t saved = first.sequence().save(prefixes, ids).value();
  HarnessOptions other = saving_options("minmax(tokens=8)");
  other.seed += 1 << 20;
  Harness second(other);
  const auto restored = second.restore(prefixes, ids);
  ASSERT_TRUE(restored.ok()) << restored.status().to_string();
  EXPECT_TRUE(restored->selectors_rebuilt);
  EXPECT_EQ(restored->tokens, saved);
  Harness third(other);
  // What is appended behind a restored prefix counts as another version than what it holds.
  ASSERT_TRUE(third.append(saved + 1).ok());
  ASSERT_TRUE(third.truncate(saved).ok());
  EXPECT_EQ(decode(second, 5), decode(third, 5));
  EXPECT_TRUE(first.close().ok());
  EXPECT_TRUE(second.close().ok());
  EXPECT_TRUE(third.close().ok());
  EXPECT_TRUE(store->close().ok());
}

TEST_F(PrefixTest, ForksAndRestoredSequencesSaveToo) {
  auto store = open();
  HarnessOptions options = saving_options("mean(tokens=4)");
  Harness harness(options);
  PrefixStore prefixes(store.get(), harness.runtime().layout(), kScope);
  const std::uint32_t run = prefixes.tokens_per_run();
  ASSERT_TRUE(harness.append(2 * run + 3).ok());
  auto ids = made_up_ids(2 * run + 3);
  ASSERT_EQ(harness.sequence().save(prefixes, ids).value(), 2 * run);
  const std::uint64_t written = store->stats().written_bytes;
  // Saving the same again writes no extent.
  ASSERT_EQ(harness.sequence().save(prefixes, ids).value(), 2 * run);
  EXPECT_LT(store->stats().written_bytes - written, std::uint64_t{12 * 1024});
  // A fork that cuts into the second run and goes on differently.
  ASSERT_TRUE(harness.fork(run + 9).ok());
  ASSERT_TRUE(harness.append(run).ok());
  auto forked = ids;
  forked.resize(run + 9);
  for (std::uint32_t i = 0; i < run; ++i) forked.push_back(900000 + i);
  ASSERT_EQ(harness.sequence().save(prefixes, forked).value(), 2 * run);
  const auto again = harness.restore(prefixes, ids);
  ASSERT_TRUE(again.ok());
  EXPECT_EQ(again->tokens, 2 * run);
  // A restored sequence is cut like any other.
  ASSERT_TRUE(harness.truncate(run + 5).ok());
  ASSERT_TRUE(harness.append(40).ok());
  for (std::uint32_t layer = 0; layer < 2; ++layer) {
    ASSERT_TRUE(harness.attend(layer, 2).ok());
    EXPECT_LE(max_difference(harness.out(), harness.exact_reference()), kOutputTolerance);
  }
  EXPECT_EQ(harness.device().wrong_blocks(), 0u);
  EXPECT_TRUE(harness.close().ok());
  EXPECT_TRUE(store->close().ok());
}

TEST_F(PrefixTest, WhatCannotBeSavedIsSaid) {
  auto store = open();
  Harness harness(saving_options("recency"));
  PrefixStore prefixes(store.get(), harness.runtime().layout(), kScope);
  ASSERT_TRUE(harness.append(40).ok());
  const auto none = harness.sequence().save(prefixes, made_up_ids(3));
  EXPECT_EQ(none.status().code(), StatusCode::kInvalidArgument);
  const auto longer = harness.sequence().save(prefixes, made_up_ids(41));
  EXPECT_EQ(longer.status().code(), StatusCode::kInvalidArgument);
  EXPECT_THAT(longer.status().message(), HasSubstr("41 token ids, but layer 0 has 40"));
  // Nothing stored: a restored sequence is an empty one.
  const auto restored = harness.restore(prefixes, made_up_ids(600));
  ASSERT_TRUE(restored.ok());
  EXPECT_EQ(restored->tokens, 0u);
  ASSERT_TRUE(harness.append(30).ok());
  EXPECT_TRUE(harness.step(0, 25).ok());
  EXPECT_TRUE(harness.close().ok());
  EXPECT_TRUE(store->close().ok());
}

}  // namespace
}  // namespace kvtier::testing
