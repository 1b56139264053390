#include "runtime/prefix_store.h"

#include "tests/transfer/store_world.h"

#include <gtest/gtest.h>

#include <algorithm>

namespace kvtier {
namespace prefix_store {

using test::AlignedBuffer;
using test::SimulatedDrive;

constexpr std::uint32_t kExtentsPerRun = 2;  // One layer, two head groups.

class PrefixStoreTest : public ::testing::Test {
 protected:
  void SetUp() override { open(); }
  void TearDown() override {
    if (store_ != nullptr) {
      EXPECT_TRUE(store_->close().ok());
    }
  }

  void open() {
    auto store = Store::open(drive_.open(), test::store_options(4 << 20));
    ASSERT_TRUE(store.ok()) << store.status().to_string();
    store_ = std::move(*store);
    prefixes_ = std::make_unique<PrefixStore>(store_.get(), layout_, scope_);
  }
  void reopen() {
    ASSERT_TRUE(store_->close().ok());
    open();
  }

  std::vector<std::uint32_t> tokens(std::uint32_t runs, std::uint32_t rest = 0,
                                    std::uint32_t seed = 1) const {
    std::vector<std::uint32_t> tokens(runs * prefixes_->tokens_per_run() + rest);
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      tokens[i] = static_cast<std::uint32_t>(i * 7919 + seed) % 50'000;
    }
    return tokens;
  }

  static StoreExtentKey key(std::uint32_t group) { return {LayerIndex{0}, HeadGroup{group}, 0}; }

  // What run r of the prefix holds depends on its key, so that a shared run has shared content.
  static std::uint64_t content_of(const StoreKey& key) { return std::hash<StoreKey>()(key); }

  Status save(std::span<const std::uint32_t> tokens, std::uint32_t* written = nullptr) {
    const std::vector<StoreKey> keys = prefixes_->chain(tokens);
    KVTIER_ASSIGN_OR_RETURN(PrefixStore::Saving saving, prefixes_->save(tokens, kExtentsPerRun));
    std::vector<std::vector<std::byte>> blobs;
    blobs.reserve(keys.size());
    if (written != nullptr) *written = static_cast<std::uint32_t>(saving.missing().size());
    for (const std::uint32_t run : saving.missing()) {
      for (std::uint32_t group = 0; group < kExtentsPerRun; ++group) {
        AlignedBuffer memory(layout_.extent_bytes());
        test::fill_extent(memory.bytes(), layout_, content_of(keys[run]), key(group));
        const StoreExtentWrite write{key(group), memory.bytes()};
        KVTIER_RETURN_IF_ERROR(saving.write({.run = run, .extents = {&write, 1}}));
      }
      blobs.push_back(test::blob_of(content_of(keys[run]), 1000));
      KVTIER_RETURN_IF_ERROR(
          saving.add_metadata({.run = run, .blob = {.tag = 5, .bytes = blobs.back()}}));
    }
    return saving.commit(0.0);
  }

  // Reads every extent and all metadata of a hit and compares them with what was saved.
  bool is_right(const PrefixHit& hit, std::span<const std::uint32_t> tokens) {
    const std::vector<StoreKey> keys = prefixes_->chain(tokens);
    AlignedBuffer found(layout_.extent_bytes());
    AlignedBuffer expected(layout_.extent_bytes());
    for (std::uint32_t run = 0; run < hit.runs.size(); ++run) {
      for (std::uint32_t group = 0; group < kExtentsPerRun; ++group) {
        StoreExtentRead read{.item = &hit.runs[run], .key = key(group), .target = found.bytes()};
        prefixes_->read({&read, 1});
        test::fill_extent(expected.bytes(), layout_, content_of(keys[run]), key(group));
        if (!read.status.ok() || !std::ranges::equal(found.bytes(), expected.bytes())) return false;
      }
      const auto metadata = prefixes_->read_metadata(hit, run, 5);
      if (!metadata.ok() || *metadata != test::blob_of(content_of(keys[run]), 1000)) return false;
    }
    return true;
  }

  SimulatedDrive drive_;
  BlockLayout layout_ = test::small_layout();
  PrefixScope scope_{.model = "a model", .tenant_salt = "a secret"};
  std::unique_ptr<Store> store_;
  std::unique_ptr<PrefixStore> prefixes_;
};

TEST_F(PrefixStoreTest, TheLongestPrefixIsFoundInALaterProcess) {
  const auto saved = tokens(3, 5);
  ASSERT_TRUE(save(saved).ok());
  reopen();
  const std::uint32_t run = prefixes_->tokens_per_run();
  for (const std::uint32_t length : {0u, 1u, run - 1, run, 2 * run + 1, 3 * run, 3 * run + 5}) {
    const auto asked = std::span(saved).first(length);
    const PrefixHit hit = prefixes_->lookup(asked);
    EXPECT_EQ(hit.tokens, length / run * run) << length;
    EXPECT_EQ(hit.runs.size(), length / run);
    EXPECT_TRUE(is_right(hit, asked));
  }
  auto longer = tokens(6);
  std::copy(saved.begin(), saved.begin() + 3 * run, longer.begin());
  EXPECT_EQ(prefixes_->lookup(longer).tokens, 3 * run);
}

TEST_F(PrefixStoreTest, AChangedTokenMissesFromItsRunOnAndHitsBefore) {
  const auto saved = tokens(4);
  ASSERT_TRUE(save(saved).ok());
  const std::uint32_t run = prefixes_->tokens_per_run();
  for (std::uint32_t position = 0; position < saved.size(); position += 17) {
    auto changed = saved;
    changed[position] ^= 1;
    const PrefixHit hit = prefixes_->lookup(changed);
    EXPECT_EQ(hit.tokens, position / run * run) << position;
    EXPECT_TRUE(is_right(hit, changed));
  }
}

TEST_F(PrefixStoreTest, AnotherModelSaltOrLayoutMissesAltogether) {
  const auto saved = tokens(2);
  ASSERT_TRUE(save(saved).ok());
  BlockShape shape = layout_.shape();
  shape.dtype = DType::kBF16;
  const BlockLayout other_dtype = *BlockLayout::make(shape);
  PrefixStore others[] = {
      PrefixStore(store_.get(), layout_, {.model = "b model", .tenant_salt = "a secret"}),
      PrefixStore(store_.get(), layout_, {.model = "a model", .tenant_salt = "b secret"}),
      PrefixStore(store_.get(), layout_, {.model = "a modela", .tenant_salt = " secret"}),
      PrefixStore(store_.get(), other_dtype, scope_)};
  for (PrefixStore& other : others) EXPECT_EQ(other.lookup(saved).tokens, 0U);
  PrefixStore same(store_.get(), layout_, scope_);
  EXPECT_EQ(same.lookup(saved).tokens, saved.size());
}

TEST_F(PrefixStoreTest, PrefixesShareRunsAndDropThemWithTheLastReference) {
  const auto first = tokens(3);
  auto second = first;
  second.back() ^= 1;  // The third run differs.
  std::uint32_t written = 0;
  ASSERT_TRUE(save(first, &written).ok());
  EXPECT_EQ(written, 3U);
  ASSERT_TRUE(save(second, &written).ok());
  EXPECT_EQ(written, 1U);
  ASSERT_TRUE(save(first, &written).ok());
  EXPECT_EQ(written, 0U);
  EXPECT_EQ(store_->stats().items, 4U);
  reopen();
  ASSERT_TRUE(prefixes_->forget(first).ok());
  EXPECT_EQ(prefixes_->lookup(first).tokens, first.size());  // Saved twice.
  ASSERT_TRUE(prefixes_->forget(first).ok());
  const std::uint32_t run = prefixes_->tokens_per_run();
  EXPECT_EQ(prefixes_->lookup(first).tokens, 2 * run);
  EXPECT_EQ(prefixes_->lookup(second).tokens, 3 * run);
  ASSERT_TRUE(prefixes_->forget(second).ok());
  EXPECT_EQ(store_->stats().items, 0U);
  EXPECT_EQ(prefixes_->forget(second).code(), StatusCode::kNotFound);
}

TEST_F(PrefixStoreTest, WhatIsBeingSavedIsNotFoundAndCanBeGivenUp) {
  const auto saved = tokens(2);
  {
    auto saving = prefixes_->save(saved, kExtentsPerRun);
    ASSERT_TRUE(saving.ok());
    EXPECT_EQ(prefixes_->lookup(saved).tokens, 0U);
    EXPECT_EQ(saving->commit(0.0).code(), StatusCode::kInvalidArgument);
    EXPECT_EQ(saving->write({.run = 7, .extents = {}}).code(), StatusCode::kInvalidArgument);
  }
  EXPECT_EQ(store_->stats().items, 0U);
  EXPECT_EQ(prefixes_->save(tokens(0, 3), kExtentsPerRun).status().code(),
            StatusCode::kInvalidArgument);
  EXPECT_TRUE(save(saved).ok());
}

TEST_F(PrefixStoreTest, DamagedTokenIdsEndThePrefixAndAreDropped) {
  const auto saved = tokens(3);
  ASSERT_TRUE(save(saved).ok());
  // The second run's ids, wherever they lie in its manifest.
  const std::uint32_t run = prefixes_->tokens_per_run();
  auto& bytes = drive_.files()["segment-0000"].written;
  const auto needle = std::as_bytes(std::span(saved).subspan(run, run));
  const auto place = std::search(bytes.begin(), bytes.end(), needle.begin(), needle.end());
  ASSERT_NE(place, bytes.end());
  *place ^= std::byte{1};
  EXPECT_EQ(prefixes_->lookup(saved).tokens, run);
  EXPECT_EQ(store_->stats().items, 2U);
  // Saving again writes what is missing, and the run behind it is found again.
  std::uint32_t written = 0;
  ASSERT_TRUE(save(saved, &written).ok());
  EXPECT_EQ(written, 1U);
  const PrefixHit hit = prefixes_->lookup(saved);
  EXPECT_EQ(hit.tokens, saved.size());
  EXPECT_TRUE(is_right(hit, saved));
}

TEST_F(PrefixStoreTest, AFullStoreDropsEndsOfChainsFirst) {
  const auto kept = tokens(2);
  ASSERT_TRUE(save(kept).ok());
  for (std::uint32_t seed = 2; seed < 40; ++seed) {
    const PrefixHit held = prefixes_->lookup(kept);
    ASSERT_EQ(held.tokens, kept.size());
    ASSERT_TRUE(save(tokens(3, 0, seed)).ok()) << seed;
    const PrefixHit hit = prefixes_->lookup(tokens(3, 0, seed));
    ASSERT_EQ(hit.runs.size(), 3U);
  }
  EXPECT_GT(store_->stats().evicted_items, 0U);
  // Whatever is left of the others is a prefix of what was saved, and right.
  for (std::uint32_t seed = 2; seed < 40; ++seed) {
    const auto asked = tokens(3, 0, seed);
    EXPECT_TRUE(is_right(prefixes_->lookup(asked), asked));
  }
}

}  // namespace prefix_store
}  // namespace kvtier
