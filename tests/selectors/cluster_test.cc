#include "kernels/merge_states.h"
#include "selectors/cluster_index.h"
#include "selectors/rank_blocks.h"
#include "selectors/registry.h"
#include "tests/selectors/context.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <set>
#include <string>
#include <vector>

namespace kvtier {
namespace {

using testing::Context;
using testing::make;
using testing::select;

constexpr std::uint32_t kClusterTokens = 300;
constexpr std::uint32_t kSegment = 64;
constexpr std::uint32_t kPerCluster = 8;

SelectorShape cluster_shape(std::uint32_t heads_per_group, GroupReduction reduction) {
  SelectorShape shape;
  shape.dtype = DType::kF32;
  shape.kv_heads = 2;
  shape.heads_per_group = heads_per_group;
  shape.queries_per_kv_head = 2;
  shape.tokens_per_block = 8;
  shape.head_dim = 64;
  shape.value_dim = 32;
  shape.sinks = 4;
  shape.window = 16;
  shape.softmax.scale = 0.2f;
  shape.reduction = reduction;
  shape.tokens_max = kClusterTokens;
  return shape;
}

ClusterIndex filled_index(const SelectorShape& shape, const Context& context,
                          std::uint32_t iterations = 10) {
  ClusterIndex index(shape, {.cluster_tokens = kPerCluster,
                             .segment_tokens = kSegment,
                             .iterations = iterations,
                             .values = true});
  index.append(context.keys(0, kClusterTokens));
  return index;
}

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

/// What `cluster` promises, in obvious float64 loops over the final clusters.
struct PlainClusters {
  const SelectorShape& shape;
  const Context& context;
  const ClusterIndex& index;
  FarRegion region;

  /// Entries of a head group: far members of each cluster, and the tokens of the open segment.
  std::vector<std::vector<std::uint32_t>> entries(std::uint32_t group) const {
    std::vector<std::vector<std::uint32_t>> result;
    for (std::uint32_t c = 0; c < index.closed_segments() * index.clusters_per_segment(); ++c) {
      result.emplace_back();
      for (const std::uint16_t m : index.members(group, c)) {
        if (index.segment_begin(c) + m < region.end) {
          result.back().push_back(index.segment_begin(c) + m);
        }
      }
    }
    for (std::uint32_t t = index.open_begin(); t < region.end; ++t) result.push_back({t});
    return result;
  }

  double logit(std::uint32_t query, std::uint32_t query_head, std::uint32_t cluster,
               const std::vector<std::uint32_t>& tokens) const {
    const std::uint32_t head = query_head / shape.queries_per_kv_head;
    const bool closed = cluster < index.closed_segments() * index.clusters_per_segment();
    double dot = 0;
    for (std::uint32_t e = 0; e < shape.head_dim; ++e) {
      const float key =
          closed ? load_element(index.centroids(head, cluster + 1).row(cluster), DType::kF32, e)
                 : context.key(tokens[0], head, e);
      dot += double{key} * double{context.query(query, query_head, e)};
    }
    return dot * double{shape.softmax.scale};
  }

  /// Score per token of each entry.
  std::vector<double> scores(std::uint32_t group, std::uint32_t queries) const {
    const auto list = entries(group);
    std::vector<double> result(list.size());
    const std::uint32_t heads = shape.heads_per_group * shape.queries_per_kv_head;
    for (std::uint32_t h = group * heads; h < (group + 1) * heads; ++h) {
      std::vector<double> of_head(list.size());
      for (std::uint32_t q = 0; q < queries; ++q) {
        double total = 0;
        std::vector<double> logits(list.size());
        for (std::uint32_t i = 0; i < list.size(); ++i) {
          if (list[i].empty()) continue;
          logits[i] = logit(q, h, i, list[i]);
          total += static_cast<double>(list[i].size()) * std::exp(logits[i]);
        }
        for (std::uint32_t i = 0; i < list.size(); ++i) {
          if (list[i].empty()) continue;
          of_head[i] += shape.reduction == GroupReduction::kMean ? logits[i] / (queries * heads)
                                                                 : std::exp(logits[i]) / total;
        }
      }
      for (std::size_t i = 0; i < list.size(); ++i) {
        result[i] = shape.reduction == GroupReduction::kMax ? std::max(result[i], of_head[i])
                                                            : result[i] + of_head[i];
      }
    }
    return result;
  }
};

const std::string kName = "cluster(segment=64,tokens=8,estimate=on)";

TEST(Cluster, RanksTokensByTheirClustersWeight) {
  for (const std::uint32_t heads_per_group : {1u, 2u}) {
    for (const GroupReduction reduction :
         {GroupReduction::kSum, GroupReduction::kMax, GroupReduction::kMean}) {
      const SelectorShape shape = cluster_shape(heads_per_group, reduction);
      const Context context(shape, kClusterTokens, 7);
      const ClusterIndex index = filled_index(shape, context);
      auto selector = make(kName, shape);
      selector->append(context.keys(0, kClusterTokens));
      // At 299 all clusters are far; at 262 and 215 the far region ends inside a closed segment.
      for (const std::uint32_t position : {299u, 262u, 215u}) {
        const FarRegion region = FarRegion::of(shape, position);
        const PlainClusters plain{shape, context, index, region};
        const auto answer = select(*selector, shape, context.request(position, position + 2, 2));
        for (std::uint32_t group = 0; group < shape.head_groups(); ++group) {
          std::vector<double> of_token(kClusterTokens);
          const auto entries = plain.entries(group);
          const auto scores = plain.scores(group, 2);
          double mass = 0;
          for (std::size_t i = 0; i < entries.size(); ++i) {
            for (const std::uint32_t t : entries[i]) {
              of_token[t] = scores[i];
              mass += scores[i];
            }
          }
          ASSERT_EQ(answer[group].ranked.size(), region.tokens());
          for (const SelectedUnit& unit : answer[group].ranked) {
            const std::uint32_t t = unit.block.value * 8 + unit.first_token;
            EXPECT_NEAR(double{unit.score}, of_token[t], 1e-4 * std::abs(of_token[t]) + 1e-6) << t;
          }
          const bool mean = reduction == GroupReduction::kMean;
          EXPECT_NEAR(double{answer[group].mass}, mean ? 0.0 : mass, 1e-4 * std::abs(mass));
        }
      }
    }
  }
}

/// The rest by brute force: every far token that is not chosen, at its centroid's weight and its
/// cluster's mean value.
void expect_estimate(const SelectorShape& shape, const Context& context, double zone,
                     const std::string& name) {
  const ClusterIndex index = filled_index(shape, context);
  auto selector = make(name, shape);
  selector->append(context.keys(0, kClusterTokens));
  constexpr std::uint32_t kQueries = 2;
  const SelectRequest request = context.request(298, 21 + 50, kQueries);
  auto selection = select(*selector, shape, request);
  // A decorator may have shortened the answer.
  selection[0].chosen = 13;
  WorkerPool pool(2);
  const std::size_t rows = kQueries * shape.query_heads();
  std::vector<float> out(rows * shape.value_dim);
  std::vector<float> lse(rows);
  ASSERT_TRUE(selector->estimate_rest(request, selection, {out.data(), lse.data()}, pool).ok());
  const PlainClusters plain{shape, context, index, FarRegion::of(shape, 298)};
  for (std::uint32_t head = 0; head < shape.kv_heads; ++head) {
    const std::uint32_t group = head / shape.heads_per_group;
    std::set<std::uint32_t> chosen;
    for (std::uint32_t i = 0; i < selection[group].chosen; ++i) {
      const SelectedUnit& unit = selection[group].ranked[i];
      chosen.insert(unit.block.value * 8 + unit.first_token);
    }
    const auto entries = plain.entries(group);
    const auto scores = plain.scores(group, kQueries);
    const std::size_t closed = index.closed_segments() * index.clusters_per_segment();
    std::vector<std::size_t> zone_order;
    std::size_t present = 0;
    for (std::size_t i = 0; i < closed; ++i) {
      present += entries[i].empty() ? 0u : 1u;
      const bool left =
          std::ranges::any_of(entries[i], [&](auto t) { return !chosen.contains(t); });
      if (left) zone_order.push_back(i);
    }
    std::ranges::sort(zone_order, [&](std::size_t a, std::size_t b) {
      return scores[a] != scores[b] ? scores[a] > scores[b] : a < b;
    });
    zone_order.resize(std::min(zone_order.size(), static_cast<std::size_t>(std::ceil(
                                                      zone * static_cast<double>(present)))));
    const std::set<std::size_t> in_zone(zone_order.begin(), zone_order.end());
    for (std::uint32_t q = 0; q < kQueries; ++q) {
      for (std::uint32_t h = 0; h < shape.queries_per_kv_head; ++h) {
        const std::uint32_t query_head = head * shape.queries_per_kv_head + h;
        double total = 0;
        std::vector<double> sum(shape.value_dim);
        for (std::uint32_t i = 0; i < entries.size(); ++i) {
          if (i < closed && !in_zone.contains(i)) continue;
          for (const std::uint32_t t : entries[i]) {
            if (chosen.contains(t)) continue;
            const double weight = std::exp(plain.logit(q, query_head, i, entries[i]));
            total += weight;
            for (std::uint32_t e = 0; e < shape.value_dim; ++e) {
              const float value =
                  i < closed ? load_element(index.value_means(head, i + 1).row(i), DType::kF32, e)
                             : context.value(t, head, e);
              sum[e] += weight * double{value};
            }
          }
        }
        const std::size_t row = q * shape.query_heads() + query_head;
        ASSERT_GT(total, 0.0);
        // Logits below 20 and float32 sums of 300 weights.
        EXPECT_NEAR(double{lse[row]}, std::log(total), 1e-4);
        for (std::uint32_t e = 0; e < shape.value_dim; ++e) {
          EXPECT_NEAR(double{out[row * shape.value_dim + e]}, sum[e] / total, 1e-4);
        }
      }
    }
  }
}

TEST(Cluster, TheEstimateIsWhatTheFinalClustersSay) {
  for (const std::uint32_t heads_per_group : {1u, 2u}) {
    for (const GroupReduction reduction :
         {GroupReduction::kSum, GroupReduction::kMax, GroupReduction::kMean}) {
      const SelectorShape shape = cluster_shape(heads_per_group, reduction);
      const Context context(shape, kClusterTokens, 8);
      expect_estimate(shape, context, 1.0, kName);
      expect_estimate(shape, context, 0.25, "cluster(segment=64,tokens=8,estimate=on,zone=0.25)");
    }
  }
}

TEST(Cluster, ClustersOfOneTokenAreExactAttention) {
  SelectorShape shape = cluster_shape(1, GroupReduction::kSum);
  shape.sinks = 0;
  shape.window = 0;
  const Context context(shape, kClusterTokens, 9);
  auto selector = make("cluster(segment=64,tokens=1,estimate=on)", shape);
  selector->append(context.keys(0, kClusterTokens));
  // Nothing is chosen of a budget of nothing: the estimate is attention itself, up to clusters that
  // two tokens fell into.
  const SelectRequest request = context.request(299, 0);
  const auto selection = select(*selector, shape, request);
  WorkerPool pool(1);
  std::vector<float> out(shape.query_heads() * shape.value_dim);
  std::vector<float> lse(shape.query_heads());
  ASSERT_TRUE(selector->estimate_rest(request, selection, {out.data(), lse.data()}, pool).ok());
  for (std::uint32_t h = 0; h < shape.query_heads(); ++h) {
    double total = 0;
    for (std::uint32_t t = 0; t < kClusterTokens; ++t) {
      double dot = 0;
      for (std::uint32_t e = 0; e < shape.head_dim; ++e) {
        dot += double{context.key(t, h / 2, e)} * double{context.query(0, h, e)};
      }
      total += std::exp(0.2 * dot);
    }
    EXPECT_NEAR(double{lse[h]}, std::log(total), 1e-3);
  }
}

TEST(Cluster, NeedsValuesOnlyToEstimate) {
  EXPECT_FALSE(make_selector_factory("cluster")->needs.values);
  EXPECT_TRUE(make_selector_factory("cluster(estimate=on)")->needs.values);
  for (const char* bad :
       {"cluster(segment=8)", "cluster(tokens=0)", "cluster(segment=64,tokens=65)",
        "cluster(estimate=yes)", "cluster(zone=2)", "cluster(iterations=0)"}) {
    EXPECT_EQ(make_selector_factory(bad).status().code(), StatusCode::kInvalidArgument) << bad;
  }
}

TEST(Cluster, MetadataIsWhatIsStated) {
  SelectorShape shape = cluster_shape(1, GroupReduction::kSum);
  shape.dtype = DType::kF16;
  const Context context(shape, kClusterTokens, 9);
  auto selector = make("cluster(segment=64,tokens=16)", shape);
  selector->append(context.keys(0, kClusterTokens));
  // Per head: 4 segments of 4 clusters of 2 * 64 + 2 B, 2 B per member, 128 keys of 128 B.
  EXPECT_EQ(selector->metadata_bytes(), 2 * (16 * 130 + 256 * 2 + 128 * 128));
}

TEST(Cluster, DamagedClustersAreRefused) {
  const SelectorShape shape = cluster_shape(1, GroupReduction::kSum);
  const Context context(shape, kClusterTokens, 9);
  const ClusterIndex index = filled_index(shape, context);
  StateWriter writer;
  index.save(writer);
  const auto restored = [&](std::size_t at, std::byte change) {
    std::vector<std::byte> bytes(writer.bytes().begin(), writer.bytes().end());
    bytes[at] ^= change;
    StateReader reader(bytes);
    ClusterIndex other(shape,
                       {.cluster_tokens = kPerCluster, .segment_tokens = kSegment, .values = true});
    return other.restore(reader).code();
  };
  EXPECT_EQ(restored(0, std::byte{0}), StatusCode::kOk);
  // Three counts, the length of the ends, 32 ends of 2 B, the length of the members, members.
  constexpr std::size_t kEnds = 3 * 4 + 8;
  constexpr std::size_t kMembers = kEnds + 32 * 2 + 8;
  for (std::size_t at : {std::size_t{0}, std::size_t{4}, std::size_t{8}, kEnds, kEnds + 15,
                         kMembers + 10, kMembers + 131}) {
    EXPECT_EQ(restored(at, std::byte{0x41}), StatusCode::kCorrupt) << at;
  }
}

}  // namespace
}  // namespace kvtier
