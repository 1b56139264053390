#include "tools/profile/model_description.h"

#include <algorithm>
#include <cmath>

namespace kvtier {

const char* to_string(LayerKind kind) {
  switch (kind) {
    case LayerKind::kFull: return "full";
    case LayerKind::kSliding: return "sliding";
    case LayerKind::kLinear: return "linear";
    case LayerKind::kMla: return "mla";
    case LayerKind::kMlaIndexed: return "mla+indexer";
  }
  return "unknown";
}

double ParameterCount::read(double tokens) const {
  const double dense = total - embedding - expert;
  if (expert == 0 || experts == 0) return dense;
  const double missed = std::pow(1.0 - experts_used / experts, tokens);
  return dense + expert * (1.0 - missed);
}

double ParameterCount::active() const { return read(1.0); }

namespace {

/// The share of `heads` that one of `gpus` keeps: whole heads, at least one.
double share_of_heads(std::uint32_t heads, std::uint32_t gpus) {
  if (heads == 0) return 1.0 / gpus;
  return static_cast<double>((heads + gpus - 1) / gpus) / heads;
}

}  // namespace

LayerBytes layer_bytes(const LayerDescription& layer, const KvTypes& types, std::uint32_t gpus) {
  LayerBytes bytes;
  if (layer.kind == LayerKind::kLinear) {
    const double whole = static_cast<double>(layer.recurrent_elements) * types.recurrent_bytes +
                         static_cast<double>(layer.convolution_elements) * types.convolution_bytes;
    bytes.fixed = whole * share_of_heads(layer.state_heads, gpus);
    return bytes;
  }
  const double share = layer.is_mla() ? 1.0 : share_of_heads(layer.kv_heads, gpus);
  const double per_token = static_cast<double>(layer.kv_elements()) * types.kv_bytes * share;
  if (layer.kind == LayerKind::kSliding) {
    bytes.fixed = per_token * static_cast<double>(layer.window_tokens);
    return bytes;
  }
  bytes.per_token = per_token;
  bytes.index_per_token = layer.index_dim * types.index_bytes;
  return bytes;
}

double layer_bytes_at(const LayerDescription& layer, const KvTypes& types, std::uint32_t gpus,
                      std::uint64_t context) {
  const LayerBytes bytes = layer_bytes(layer, types, gpus);
  if (layer.kind == LayerKind::kSliding && layer.window_tokens > context) {
    return bytes.fixed / static_cast<double>(layer.window_tokens) * static_cast<double>(context);
  }
  return bytes.fixed + (bytes.per_token + bytes.index_per_token) * static_cast<double>(context);
}

}  // namespace kvtier
