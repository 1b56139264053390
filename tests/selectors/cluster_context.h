#pragma once

#include "selectors/cluster_index.h"
#include "tests/selectors/context.h"

#include <cstdint>

namespace kvtier::testing {

// What the tests of clusters have in common.

inline constexpr std::uint32_t kClusterTokens = 300;
inline constexpr std::uint32_t kSegment = 64;
inline constexpr std::uint32_t kPerCluster = 8;

inline SelectorShape cluster_shape(std::uint32_t heads_per_group, GroupReduction reduction) {
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

inline ClusterIndex filled_index(const SelectorShape& shape, const Context& context,
                                 std::uint32_t iterations = 10) {
  ClusterIndex index(shape, {.cluster_tokens = kPerCluster,
                             .segment_tokens = kSegment,
                             .iterations = iterations,
                             .values = true});
  index.append(context.keys(0, kClusterTokens));
  return index;
}

}  // namespace kvtier::testing
