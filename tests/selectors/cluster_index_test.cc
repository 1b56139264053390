#include "selectors/cluster_index.h"

#include "tests/selectors/cluster_context.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <vector>

namespace kvtier {
namespace {

using testing::cluster_shape;
using testing::Context;
using testing::filled_index;
using testing::kClusterTokens;
using testing::kSegment;

TEST(ClusterIndex, AssignmentsAreAPartitionOfEveryClosedSegment) {
  for (const std::uint32_t heads_per_group : {1u, 2u}) {
    const SelectorShape shape = cluster_shape(heads_per_group, GroupReduction::kSum);
    const Context context(shape, kClusterTokens, 3);
    const ClusterIndex index = filled_index(shape, context);
    ASSERT_EQ(index.closed_segments(), 4u);
    for (std::uint32_t group = 0; group < shape.head_groups(); ++group) {
      std::multiset<std::uint32_t> seen;
      std::size_t used = 0;
      for (std::uint32_t c = 0; c < 4 * index.clusters_per_segment(); ++c) {
        const auto members = index.members(group, c);
        EXPECT_TRUE(std::ranges::is_sorted(members));
        used += members.empty() ? 0u : 1u;
        for (const std::uint16_t member : members) seen.insert(index.segment_begin(c) + member);
      }
      std::multiset<std::uint32_t> expected;
      for (std::uint32_t t = shape.sinks; t < 4 * kSegment; ++t) expected.insert(t);
      EXPECT_EQ(seen, expected);
      EXPECT_GT(used, 16u) << "of 32 clusters";
    }
  }
}

TEST(ClusterIndex, CentroidsAndValuesAreMeansOfTheMembers) {
  for (const std::uint32_t heads_per_group : {1u, 2u}) {
    const SelectorShape shape = cluster_shape(heads_per_group, GroupReduction::kSum);
    const Context context(shape, kClusterTokens, 4);
    const ClusterIndex index = filled_index(shape, context);
    const std::uint32_t clusters = 4 * index.clusters_per_segment();
    for (std::uint32_t head = 0; head < shape.kv_heads; ++head) {
      const RowsView keys = index.centroids(head, clusters);
      const RowsView values = index.value_means(head, clusters);
      for (std::uint32_t c = 0; c < clusters; ++c) {
        const auto members = index.members(head / heads_per_group, c);
        for (std::uint32_t e = 0; e < shape.head_dim; ++e) {
          double key = 0;
          double value = 0;
          for (const std::uint16_t m : members) {
            key += double{context.key(index.segment_begin(c) + m, head, e)};
            if (e < shape.value_dim) {
              value += double{context.value(index.segment_begin(c) + m, head, e)};
            }
          }
          const double share = members.empty() ? 0.0 : 1.0 / static_cast<double>(members.size());
          // Sums of up to 64 elements below 4.
          EXPECT_NEAR(double{load_element(keys.row(c), DType::kF32, e)}, key * share, 1e-5);
          if (e < shape.value_dim) {
            EXPECT_NEAR(double{load_element(values.row(c), DType::kF32, e)}, value * share, 1e-5);
          }
        }
      }
    }
  }
}

/// Of the keys without the segment's mean: the sum over members of the dot with the cluster's
/// direction, which k-means raises with every iteration.
double cohesion(const ClusterIndex& index, const Context& context, const SelectorShape& shape,
                std::uint32_t segment) {
  const std::uint32_t begin = std::max(segment * kSegment, shape.sinks);
  const std::uint32_t end = (segment + 1) * kSegment;
  std::vector<double> mean(shape.head_dim);
  for (std::uint32_t t = begin; t < end; ++t) {
    for (std::uint32_t e = 0; e < shape.head_dim; ++e) mean[e] += double{context.key(t, 0, e)};
  }
  double total = 0;
  const std::uint32_t per_segment = index.clusters_per_segment();
  for (std::uint32_t c = segment * per_segment; c < (segment + 1) * per_segment; ++c) {
    double square = 0;
    for (std::uint32_t e = 0; e < shape.head_dim; ++e) {
      double sum = 0;
      for (const std::uint16_t m : index.members(0, c)) {
        sum += double{context.key(segment * kSegment + m, 0, e)} - mean[e] / (end - begin);
      }
      square += sum * sum;
    }
    total += std::sqrt(square);  // The sum of dots with the unit vector of the sum is its length.
  }
  return total;
}

TEST(ClusterIndex, IterationsOnlyImproveTheClusters) {
  const SelectorShape shape = cluster_shape(1, GroupReduction::kSum);
  const Context context(shape, kClusterTokens, 5);
  for (std::uint32_t segment = 0; segment < 4; ++segment) {
    double before = 0;
    double first = 0;
    for (const std::uint32_t iterations : {1u, 2u, 3u, 5u, 10u}) {
      const double now =
          cohesion(filled_index(shape, context, iterations), context, shape, segment);
      EXPECT_GE(now, before * (1 - 1e-6));
      if (iterations == 1) first = now;
      before = now;
    }
    EXPECT_GT(before, first);
  }
}

TEST(ClusterIndex, FindsGroupsThatAreThere) {
  SelectorShape shape = cluster_shape(1, GroupReduction::kSum);
  shape.kv_heads = 1;
  shape.sinks = 0;
  Context context(shape, 64, 6);
  // Token t points in direction t / 8, with all keys pushed the same way: the mean must go first.
  for (std::uint32_t t = 0; t < 64; ++t) {
    for (std::uint32_t e = 0; e < 64; ++e) {
      context.set_key(t, 0, e, 5.0f + (e == t / 8 ? 1.0f + 0.01f * static_cast<float>(t) : 0.0f));
    }
  }
  ClusterIndex runs(shape, {.cluster_tokens = 8, .segment_tokens = 64});
  runs.append(context.keys(0, 64));
  for (std::uint32_t c = 0; c < 8; ++c) {
    ASSERT_EQ(runs.members(0, c).size(), 8u);
    for (std::uint32_t m = 0; m < 8; ++m) EXPECT_EQ(runs.members(0, c)[m], 8 * c + m);
  }
}

}  // namespace
}  // namespace kvtier
