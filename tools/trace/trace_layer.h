#pragma once

#include "memory/status.h"
#include "tools/trace/safetensors.h"
#include "tools/trace/trace_manifest.h"

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

namespace kvtier {

/// One recorded layer. Row-major; T tokens, S steps, N prompt queries. Everything is finite.
/// View: valid while the `AttentionTrace` it came from lives.
struct TraceLayer {
  /// The model's number of this layer.
  std::uint32_t number = 0;
  std::span<const std::byte> keys;     ///< [T, kv_heads, head_dim] of the manifest's dtype.
  std::span<const std::byte> values;   ///< [T, kv_heads, value_dim]
  std::span<const std::byte> queries;  ///< [S, query_heads, head_dim]
  /// Queries of prompt tokens, for selectors that observe the prompt: [N, query_heads, head_dim].
  std::span<const std::byte> prompt_queries;          ///< Empty when not recorded.
  std::vector<std::uint32_t> prompt_query_positions;  ///< [N], ascending.
  /// Exact attention as an oracle; each empty when not recorded.
  std::span<const float> out;  ///< [S, query_heads, value_dim]
  std::span<const float>
      lse;  ///< [S, query_heads], natural log, scale applied, without sink logits.
  /// A logit per query head that takes part in the softmax without a value; empty when the model
  /// has none.
  std::span<const float> sink_logits;  ///< [query_heads]
};

/// A layer and the positions of its queries, which the trace requires to be equal in every layer.
struct TraceLayerReading {
  TraceLayer layer;
  std::vector<std::uint32_t> query_positions;  ///< [S], ascending.
};

/// Reads and checks one layer file: tensors, types, shapes, positions, and every number for being
/// finite. Fails with `corrupt`.
Result<TraceLayerReading> read_trace_layer(const SafetensorsFile& file,
                                           const TraceManifest& manifest, std::uint32_t number);

/// What an integer tensor must hold.
struct IntegerRange {
  std::int64_t least = 0;
  std::int64_t most = 0;
  /// Each number is greater than the one before it.
  bool ascending = false;
};

/// Reads a vector of integers (I32 or I64). `length` is checked when given.
Result<std::vector<std::uint32_t>> read_integers(const SafetensorsFile& file, std::string_view name,
                                                 std::optional<std::uint64_t> length,
                                                 const IntegerRange& range);

}  // namespace kvtier
