#include "tools/replay/trace_feed.h"

#include "tools/replay/exact_attention.h"

#include <algorithm>

namespace kvtier {

SelectorNeeds needs_met_by(const AttentionTrace& trace) {
  const auto in_all_layers = [&trace](auto has) {
    return !trace.layers().empty() && std::ranges::all_of(trace.layers(), has);
  };
  return {.values = true,
          .prompt_queries = in_all_layers(
              [](const TraceLayer& layer) { return !layer.prompt_query_positions.empty(); }),
          .sentence_ends = !trace.sentence_ends().empty(),
          // No format of ours records trained landmarks or an indexer's scores.
          .landmark_tokens = false,
          .rope = trace.manifest().rope_theta > 0,
          .external_scores = false};
}

TraceFeed::TraceFeed(const AttentionTrace& trace) : trace_(trace) {
  if (trace.sentence_ends().empty()) return;
  marks_.resize(trace.manifest().tokens);
  for (std::uint32_t end : trace.sentence_ends()) {
    if (end > 0) marks_[end - 1] = kEndsSentence;
  }
}

TokenRows TraceFeed::rows(std::size_t layer, std::uint32_t first, std::uint32_t count) const {
  const TraceModel& model = trace_.manifest().model;
  const std::size_t element = size_of(trace_.manifest().dtype);
  TokenRows rows;
  rows.key_head_stride = model.head_dim * element;
  rows.key_token_stride = model.kv_heads * rows.key_head_stride;
  rows.value_head_stride = model.value_dim * element;
  rows.value_token_stride = model.kv_heads * rows.value_head_stride;
  rows.keys = trace_.layers()[layer].keys.data() + first * rows.key_token_stride;
  rows.values = trace_.layers()[layer].values.data() + first * rows.value_token_stride;
  rows.tokens = count;
  if (!marks_.empty()) rows.marks = marks_.data() + first;
  return rows;
}

Status TraceFeed::observe(Sequence& sequence, std::uint32_t layer, std::uint32_t first,
                          std::uint32_t count) {
  const TraceLayer& source = trace_.layers()[layer];
  const auto& positions = source.prompt_query_positions;
  const auto begin = std::ranges::lower_bound(positions, first);
  const auto end = std::ranges::lower_bound(positions, first + count);
  if (begin == end) return {};
  const TraceManifest& manifest = trace_.manifest();
  const std::size_t elements = std::size_t{manifest.model.query_heads} * manifest.model.head_dim;
  const std::size_t bytes = elements * size_of(manifest.dtype);
  const auto from = static_cast<std::size_t>(begin - positions.begin());
  const auto queries = static_cast<std::size_t>(end - begin);
  queries_.resize(queries * elements);
  load_floats(source.prompt_queries.subspan(from * bytes, queries * bytes), manifest.dtype,
              queries_);
  return sequence.observe_prompt(LayerIndex{layer},
                                 {.queries = queries_.data(),
                                  .query_stride = elements,
                                  .positions = std::span(positions).subspan(from, queries)});
}

}  // namespace kvtier
