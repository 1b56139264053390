#include "kernels/top_k.h"
#include "tests/kernels/gpu_fixture.h"

#include <algorithm>
#include <limits>

namespace kvtier {
namespace {

class TopKGpu : public GpuTest {
 protected:
  /// Lists of random or repeated scores against a full sort.
  void expect_same(const std::vector<std::vector<float>>& lists, std::uint32_t k) {
    std::size_t stride = 1;
    for (const auto& list : lists) stride = std::max(stride, list.size());
    const auto longest = static_cast<std::uint32_t>(stride);
    stride += 3;
    std::vector<float> scores(lists.size() * stride, 1e30f);  // Behind a list: larger than all.
    std::vector<std::uint32_t> counts;
    for (std::size_t l = 0; l < lists.size(); ++l) {
      std::copy(lists[l].begin(), lists[l].end(), scores.begin() + std::ptrdiff_t(l * stride));
      counts.push_back(static_cast<std::uint32_t>(lists[l].size()));
    }
    const DeviceBuffer device_scores = to_device(scores);
    const DeviceBuffer device_counts = to_device(counts);
    const DeviceBuffer indices = device_bytes(lists.size() * k * 4);
    TopKParams params{.scores = device_scores.as<float>(),
                      .stride = stride,
                      .lists = static_cast<std::uint32_t>(lists.size()),
                      .counts = device_counts.as<std::uint32_t>(),
                      .count_max = longest,
                      .k = k,
                      .indices = indices.as<std::uint32_t>()};
    const DeviceBuffer workspace = device_bytes(top_k_workspace_bytes(gpu(), params));
    ASSERT_TRUE(workspace.fill(0xAB).ok());
    params.workspace = workspace.data();
    for (int round = 0; round < 2; ++round) {
      ASSERT_TRUE(indices.fill(0x11).ok());
      const Status status = top_k(gpu(), params, stream());
      ASSERT_TRUE(status.ok()) << status.to_string();
      const auto actual = to_host<std::uint32_t>(indices);
      for (std::size_t l = 0; l < lists.size(); ++l) {
        std::vector<std::uint32_t> order(lists[l].size());
        const auto best = top_k_reference(lists[l], k, order);
        std::vector<std::uint32_t> expected(best.begin(), best.end());
        expected.resize(k, kNoIndex);
        const auto first = actual.begin() + std::ptrdiff_t(l * k);
        ASSERT_TRUE(std::equal(expected.begin(), expected.end(), first))
            << "list " << l << " of " << lists[l].size() << " k " << k;
      }
    }
  }

  static std::vector<float> normal_scores(std::size_t count, std::uint32_t seed) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal(0.0f, 5.0f);
    std::vector<float> scores(count);
    for (float& score : scores) score = normal(random);
    return scores;
  }
};

TEST_F(TopKGpu, AgreesWithAFullSort) {
  for (const std::size_t count : {1u, 2u, 17u, 1000u, 20000u, 300000u}) {
    for (const std::uint32_t k : {1u, 2u, 33u, 1000u, kMaxTopK}) {
      expect_same({normal_scores(count, k), normal_scores(count / 2, k + 1)}, k);
      if (HasFatalFailure()) return;
    }
  }
}

TEST_F(TopKGpu, AMillionCandidatesPerHead) {
  std::vector<std::vector<float>> lists;
  for (std::uint32_t l = 0; l < 8; ++l) lists.push_back(normal_scores(1 << 20, l));
  expect_same(lists, 2048);
}

TEST_F(TopKGpu, ManyShortListsAndEmptyOnes) {
  std::vector<std::vector<float>> lists;
  for (std::uint32_t l = 0; l < 600; ++l) lists.push_back(normal_scores(l % 97, l));
  expect_same(lists, 16);
}

TEST_F(TopKGpu, EqualScoresComeInIndexOrder) {
  std::mt19937 random(2);
  for (const unsigned distinct : {1u, 2u, 5u, 40u}) {
    std::vector<std::vector<float>> lists;
    for (const std::size_t count : {777u, 50000u, 200000u}) {
      lists.emplace_back(count);
      for (float& score : lists.back()) score = float(random() % distinct) - 2.0f;
    }
    for (const std::uint32_t k : {1u, 37u, 778u, 4000u}) expect_same(lists, k);
  }
}

TEST_F(TopKGpu, InfinitiesZerosAndTinyDifferences) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const std::vector<float> scores = {0.0f,       -0.0f,      kInfinity, -kInfinity, 1.0f,
                                     1.0000001f, -kInfinity, 0.0f,      -1e-45f,    1e-45f,
                                     -3e38f,     3e38f,      -0.0f,     kInfinity,  0.99999994f};
  for (std::uint32_t k = 1; k <= scores.size() + 1; ++k) expect_same({scores}, k);
}

TEST_F(TopKGpu, NothingFromNothingAndTooManyAreRefused) {
  TopKParams params;
  params.lists = 3;
  EXPECT_TRUE(top_k(gpu(), params, stream()).ok());
  params.lists = 0;
  params.k = 5;
  EXPECT_TRUE(top_k(gpu(), params, stream()).ok());
  params.k = kMaxTopK + 1;
  EXPECT_EQ(top_k(gpu(), params, stream()).code(), StatusCode::kUnsupported);
}

}  // namespace
}  // namespace kvtier
