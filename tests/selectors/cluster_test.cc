#include "kernels/merge_states.h"
#include "selectors/cluster_index.h"
#include "selectors/rank_blocks.h"
#include "selectors/registry.h"
#include "tests/selectors/cluster_context.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <set>
#include <string>
#include <vector>

namespace kvtier {
namespace {

using testing::cluster_shape;
using testing::Context;
using testing::filled_index;
using testing::kClusterTokens;
using testing::kPerCluster;
using testing::kSegment;
using testing::make;
using testing::select;

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
