#include "transfer/link.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

// One contract (transfer/link.h), run over everything that claims to keep it.

namespace kvtier {
namespace link_contract {

constexpr std::uint32_t kDepth = 4;
constexpr std::size_t kBlock = 2048;
constexpr std::size_t kBlocks = 64;

struct Memory {
  static constexpr const char* kName = "memory";
  static std::unique_ptr<Link> open() { return make_memory_link(kDepth); }
};
struct FaultyMemory {
  static constexpr const char* kName = "faulty(memory)";
  static std::unique_ptr<Link> open() {
    return make_faulty_link(make_memory_link(kDepth), FaultPlan{}, nullptr);
  }
};

template <typename Kind>
class LinkContractTest : public ::testing::Test {
 protected:
  LinkContractTest() : link_(Kind::open()), host_(kBlocks * kBlock), device_(kBlocks * kBlock) {
    for (std::size_t i = 0; i < host_.size(); ++i)
      host_[i] = static_cast<std::byte>(i * 31 + i / 7);
  }

  /// Block `from` of the host goes to place `to` of the device.
  CopySpan span(std::size_t from, std::size_t to) {
    return {host_.data() + from * kBlock, device_.data() + to * kBlock, kBlock};
  }
  bool is_at(std::size_t from, std::size_t to) const {
    return std::memcmp(host_.data() + from * kBlock, device_.data() + to * kBlock, kBlock) == 0;
  }
  /// Reaps until `count` operations have come back.
  std::vector<LinkOperation*> reap(std::size_t count) {
    std::vector<LinkOperation*> all;
    std::array<LinkOperation*, 3> some{};
    while (all.size() < count) {
      const std::size_t came = link_->reap(some, std::chrono::seconds(60));
      if (came == 0) break;
      all.insert(all.end(), some.begin(), some.begin() + static_cast<std::ptrdiff_t>(came));
    }
    return all;
  }

  std::unique_ptr<Link> link_;
  std::vector<std::byte> host_;
  std::vector<std::byte> device_;
};

struct KindName {
  template <typename Kind>
  static std::string GetName(int index) {
    return index == 0 ? "memory" : "faulty_memory";
  }
};

using Kinds = ::testing::Types<Memory, FaultyMemory>;
TYPED_TEST_SUITE(LinkContractTest, Kinds, KindName);

TYPED_TEST(LinkContractTest, SaysWhatItIs) { EXPECT_EQ(this->link_->name(), TypeParam::kName); }

TYPED_TEST(LinkContractTest, ScatteredBlocksArriveByteForByte) {
  std::vector<CopySpan> spans;
  for (std::size_t i = 0; i < kBlocks; ++i) spans.push_back(this->span(i, (i * 37 + 5) % kBlocks));
  LinkOperation copy{.spans = spans};
  LinkOperation* const pointer = &copy;
  ASSERT_EQ(this->link_->submit({&pointer, 1}), 1u);
  ASSERT_EQ(this->reap(1), std::vector<LinkOperation*>{&copy});
  EXPECT_TRUE(copy.status.ok()) << copy.status.to_string();
  EXPECT_EQ(copy.transferred, kBlocks * kBlock);
  for (std::size_t i = 0; i < kBlocks; ++i) EXPECT_TRUE(this->is_at(i, (i * 37 + 5) % kBlocks));
}

TYPED_TEST(LinkContractTest, GoesBothWays) {
  const std::vector<std::byte> before = this->host_;
  const CopySpan down{this->host_.data(), this->device_.data(), kBlock};
  const CopySpan up{this->device_.data(), this->host_.data() + kBlock, kBlock};
  LinkOperation first{.direction = LinkDirection::kHostToDevice, .spans = {&down, 1}};
  LinkOperation second{.direction = LinkDirection::kDeviceToHost, .spans = {&up, 1}};
  for (LinkOperation* operation : {&first, &second}) {
    ASSERT_EQ(this->link_->submit({&operation, 1}), 1u);
    ASSERT_EQ(this->reap(1).size(), 1u);
    ASSERT_TRUE(operation->status.ok());
  }
  EXPECT_EQ(std::memcmp(this->host_.data() + kBlock, before.data(), kBlock), 0);
}

TYPED_TEST(LinkContractTest, TakesNoMoreThanItsDepthAndGivesEachBackOnce) {
  std::vector<CopySpan> spans;
  for (std::size_t i = 0; i < 3 * kDepth; ++i) spans.push_back(this->span(i, i));
  std::vector<LinkOperation> operations(spans.size());
  std::vector<LinkOperation*> waiting;
  for (std::size_t i = 0; i < spans.size(); ++i) {
    operations[i].spans = {&spans[i], 1};
    operations[i].owner = &spans[i];
    waiting.push_back(&operations[i]);
  }
  std::vector<LinkOperation*> back;
  while (!waiting.empty()) {
    const std::size_t accepted = this->link_->submit(waiting);
    ASSERT_GT(accepted, 0u);
    ASSERT_LE(accepted, kDepth);
    waiting.erase(waiting.begin(), waiting.begin() + static_cast<std::ptrdiff_t>(accepted));
    const std::vector<LinkOperation*> came = this->reap(accepted);
    ASSERT_EQ(came.size(), accepted);
    back.insert(back.end(), came.begin(), came.end());
  }
  std::ranges::sort(back);
  for (std::size_t i = 0; i < operations.size(); ++i) {
    EXPECT_EQ(back[i], &operations[i]);
    EXPECT_EQ(operations[i].owner, &spans[i]);
    EXPECT_TRUE(this->is_at(i, i));
  }
  std::array<LinkOperation*, 1> none{};
  EXPECT_EQ(this->link_->reap(none, Duration(0)), 0u);
}

TYPED_TEST(LinkContractTest, AnEmptyGatherEndsWell) {
  LinkOperation empty;
  LinkOperation* const pointer = &empty;
  ASSERT_EQ(this->link_->submit({&pointer, 1}), 1u);
  ASSERT_EQ(this->reap(1).size(), 1u);
  EXPECT_TRUE(empty.status.ok());
  EXPECT_EQ(empty.transferred, 0u);
}

}  // namespace link_contract
}  // namespace kvtier
