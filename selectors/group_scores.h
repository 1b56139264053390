#pragma once

#include "selectors/selector.h"

#include <cstddef>
#include <cstdint>
#include <span>

namespace kvtier {

/// Logits of one head group's queries against candidates (landmarks, boxes, chunks). View.
struct GroupLogits {
  /// Row r of KV head i of the group starts at `logits + i * head_stride + r * row_stride`, with
  /// r = query * queries_per_kv_head + query head.
  float* logits = nullptr;
  std::size_t head_stride = 0;
  std::size_t row_stride = 0;
  std::uint32_t query_count = 1;
  /// Candidates that take no part in the softmax, numbered from `first`, which is the first
  /// column's number. Their scores come out as zero, or as they are under `kMean`.
  std::span<const std::uint32_t> left_out;
  std::uint32_t first = 0;
};

/// One score per candidate: the softmax over the candidates, per query and query head, added over
/// the queries, then the largest of the heads or their sum; under `kMean` the mean raw logit.
/// Works in place, `scratch` is as long as `scores`. False when a logit is not finite.
bool reduce_logits(const SelectorShape& shape, const GroupLogits& group, std::span<float> scratch,
                   std::span<float> scores);

}  // namespace kvtier
