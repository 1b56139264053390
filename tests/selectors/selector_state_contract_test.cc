#include "selectors/rank_blocks.h"
#include "tests/selectors/selector_contract.h"

#include <algorithm>
#include <string>
#include <vector>

// A selector's state: a function of the tokens, however they came; cut, copied, saved and restored
// as if nothing had happened.

namespace kvtier {
namespace {

using testing::cut;
using testing::expect_same;
using testing::kContractTokens;
using testing::make;
using testing::select;
using testing::SelectorContract;

TEST_P(SelectorContract, AnyChunkingOfAppendIsTheSame) {
  auto whole = filled();
  for (std::uint32_t chunk : {1u, 7u, 8u, 64u, 129u}) {
    auto selector = make(name(), shape());
    for (std::uint32_t t = 0; t < kContractTokens; t += chunk) {
      selector->append(context_.keys(t, std::min(chunk, kContractTokens - t)));
      // Asking in between changes nothing, except for those who learn from it.
      if (factory().remembers) continue;
      const std::uint32_t seen = std::min(t + chunk, kContractTokens);
      select(*selector, shape(), context_.request(seen - 1, seen + always()));
    }
    context_.observe(*selector, kContractTokens / 2, kContractTokens - kContractTokens / 2);
    EXPECT_EQ(selector->metadata_bytes(), whole->metadata_bytes());
    const SelectRequest request = context_.request(kContractTokens - 1, always() + 60, 1, 40);
    expect_same(select(*whole, shape(), request), select(*selector, shape(), request));
  }
}

TEST_P(SelectorContract, ACutIsAsIfNeverAppended) {
  const Context other(shape(), kContractTokens, 999);
  const SelectRequest request = context_.request(kContractTokens - 1, always() + 60, 1, 40);
  for (std::uint32_t position : {299u, 295u, 280u, 256u, 201u, 64u, 9u, 1u, 0u}) {
    SCOPED_TRACE(::testing::Message() << "cut at " << position);
    // A draft that is rejected: other tokens stand behind `position`, asked about, then cut.
    auto selector = filled(position);
    auto undisturbed = filled(position);
    selector->append(other.keys(position, kContractTokens - position));
    select(*selector, shape(), request);
    cut(*selector, context_, position);
    EXPECT_EQ(selector->metadata_bytes(), undisturbed->metadata_bytes());
    if (position > 0) {
      const SelectRequest at_cut = context_.request(position - 1, always() + 30);
      expect_same(select(*undisturbed, shape(), at_cut), select(*selector, shape(), at_cut));
    }
    selector->append(context_.keys(position, kContractTokens - position));
    undisturbed->append(context_.keys(position, kContractTokens - position));
    expect_same(select(*undisturbed, shape(), request), select(*selector, shape(), request));
    EXPECT_EQ(selector->metadata_bytes(), undisturbed->metadata_bytes());
  }
}

TEST_P(SelectorContract, CutsWithinTheWindowNeedNoKeys) {
  auto selector = filled();
  for (std::uint32_t back = 0; back <= shape().window; ++back) {
    EXPECT_EQ(selector->truncate_floor(kContractTokens - back), kContractTokens - back);
  }
}

TEST_P(SelectorContract, AForkGoesOnAsACopyWould) {
  auto selector = filled(220);
  select(*selector, shape(), context_.request(219, always() + 40));
  auto fork = selector->fork();
  const auto expected = go_on(*selector, shape(), context_, 220);
  const auto found = go_on(*fork, shape(), context_, 220);
  ASSERT_EQ(found.size(), expected.size());
  for (std::size_t i = 0; i < found.size(); ++i) expect_same(expected[i], found[i]);
  EXPECT_EQ(fork->metadata_bytes(), selector->metadata_bytes());
}

TEST_P(SelectorContract, SavedAndRestoredItNeverStopped) {
  auto selector = filled(220);
  select(*selector, shape(), context_.request(219, always() + 40));
  const std::vector<std::byte> bytes = save_selector(*selector, name(), shape());
  auto restored = restore_selector(bytes, factory(), shape(), LayerIndex(0));
  ASSERT_TRUE(restored.ok()) << restored.status().to_string();
  EXPECT_EQ((*restored)->metadata_bytes(), selector->metadata_bytes());
  EXPECT_EQ(save_selector(**restored, name(), shape()), bytes);
  const auto expected = go_on(*selector, shape(), context_, 220);
  const auto found = go_on(**restored, shape(), context_, 220);
  ASSERT_EQ(found.size(), expected.size());
  for (std::size_t i = 0; i < found.size(); ++i) expect_same(expected[i], found[i]);
}

TEST_P(SelectorContract, DamagedStateIsRefused) {
  auto selector = filled(100);
  const std::vector<std::byte> bytes = save_selector(*selector, name(), shape());
  for (std::size_t i = 0; i < bytes.size(); i += 1 + bytes.size() / 37) {
    std::vector<std::byte> damaged = bytes;
    damaged[i] ^= std::byte{4};
    EXPECT_FALSE(restore_selector(damaged, factory(), shape(), LayerIndex(0)).ok()) << i;
    const std::span cut(bytes.data(), i);
    EXPECT_FALSE(restore_selector(cut, factory(), shape(), LayerIndex(0)).ok()) << i;
  }
  SelectorShape other = shape();
  other.window += 1;
  EXPECT_EQ(restore_selector(bytes, factory(), other, LayerIndex(0)).status().code(),
            StatusCode::kInvalidArgument);
}

TEST_P(SelectorContract, AHintLeavesNoTrace) {
  auto selector = filled(250);
  auto undisturbed = filled(250);
  WorkerPool pool(1);
  std::vector<GroupSelection> guess(shape().head_groups());
  for (std::uint32_t t = 250; t < 270; ++t) {
    selector->append(context_.keys(t, 1));
    undisturbed->append(context_.keys(t, 1));
    // Several queries, so that the guess is another question than the step's.
    ASSERT_TRUE(selector->hint(context_.request(t - 3, always() + 20 + 4, 4), guess, pool).ok());
    const SelectRequest request = context_.request(t, always() + 40);
    expect_same(select(*undisturbed, shape(), request), select(*selector, shape(), request));
  }
}

}  // namespace
}  // namespace kvtier
