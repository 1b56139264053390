#include "tools/replay/kept_keys.h"

#include <algorithm>
#include <cmath>

namespace kvtier {

KeptKeys::KeptKeys(const AttentionTrace& trace, const SelectorShape& shape,
                   std::span<const RunRecord> runs)
    : trace_(trace), shape_(shape), runs_(runs), feed_(trace), selectors_(runs.size()) {}

Status KeptKeys::move_to_layer(std::uint32_t layer) {
  layer_ = layer;
  shown_ = 0;
  for (std::size_t run = 0; run < runs_.size(); ++run) {
    if (!runs_[run].attended.has_kept()) continue;
    KVTIER_ASSIGN_OR_RETURN(selectors_[run], runs_[run].factory(shape_, LayerIndex{layer}));
  }
  return {};
}

void KeptKeys::move_to_step(std::uint32_t visible) {
  if (visible <= shown_) return;
  const TokenRows rows = feed_.rows(layer_, shown_, visible - shown_);
  for (const auto& selector : selectors_) {
    if (selector == nullptr) continue;
    selector->append({.first_position = shown_,
                      .tokens = rows.tokens,
                      .keys = rows.keys,
                      .key_token_stride = rows.key_token_stride,
                      .key_head_stride = rows.key_head_stride,
                      .values = rows.values,
                      .value_token_stride = rows.value_token_stride,
                      .value_head_stride = rows.value_head_stride,
                      .marks = rows.marks});
  }
  shown_ = visible;
}

std::vector<float> KeptKeys::weights(const ExactAttention& exact, std::size_t run,
                                     std::uint32_t head, std::span<const TokenSpan> attended,
                                     std::span<const TokenSpan> kept) const {
  std::vector<float> weights(exact.visible());
  const std::span<const float> own = exact.weights(head);
  for (const TokenSpan& span : attended) {
    std::copy(own.begin() + span.begin, own.begin() + span.end, weights.begin() + span.begin);
  }
  const std::uint32_t per_block = shape_.tokens_per_block;
  const std::uint32_t kv_head = head / shape_.queries_per_kv_head;
  const std::uint32_t in_group = kv_head % shape_.heads_per_group;
  const std::size_t row_bytes = shape_.head_dim * size_of(shape_.dtype);
  std::vector<std::byte> keys(shape_.heads_per_group * per_block * row_bytes);
  for (const TokenSpan& span : kept) {
    for (std::uint32_t t = span.begin; t < span.end;) {
      const std::uint32_t block = t / per_block;
      const std::uint32_t end = std::min(span.end, (block + 1) * per_block);
      selectors_[run]->read_keys({.head_group = kv_head / shape_.heads_per_group,
                                  .block = BlockIndex{block},
                                  .first_token = t - block * per_block,
                                  .tokens = end - t,
                                  .target = keys.data()});
      for (; t < end; ++t) {
        const std::size_t row = std::size_t{in_group} * per_block + t % per_block;
        weights[t] = weight(exact, head, keys.data() + row * row_bytes);
      }
    }
  }
  return weights;
}

float KeptKeys::weight(const ExactAttention& exact, std::uint32_t head,
                       const std::byte* key) const {
  const std::span<const float> query = exact.query(head);
  double dot = 0;
  for (std::size_t i = 0; i < query.size(); ++i) {
    dot += double{query[i]} * double{load_element(key, shape_.dtype, i)};
  }
  const TraceManifest& manifest = trace_.manifest();
  double logit = dot * manifest.softmax_scale;
  if (manifest.logit_cap > 0) {
    logit = manifest.logit_cap * std::tanh(logit / manifest.logit_cap);
  }
  return static_cast<float>(std::exp(logit - double{exact.lse(head)}));
}

}  // namespace kvtier
