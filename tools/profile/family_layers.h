#pragma once

#include "tools/profile/model_families.h"

#include <cstdint>
#include <vector>

namespace kvtier {

/// What all layers of a family share, before they differ.
struct HeadShape {
  std::uint32_t layers = 0;
  std::uint64_t hidden = 0;
  std::uint32_t heads = 0;
  std::uint32_t kv_heads = 0;  ///< As many as query heads for MLA, which has no use for it.
  std::uint32_t head_dim = 0;  ///< 0 for MLA.
};
Result<HeadShape> read_heads(const ModelFamily& family, const ConfigFields& fields);

/// A layer that keeps keys and values of every token.
LayerDescription plain_layer(const HeadShape& shape);

// Families that mix linear layers with others, or compress: hybrid_layers.cc.
Result<std::vector<LayerDescription>> gated_delta_layers(const ModelFamily& family,
                                                         const ConfigFields& fields);
Result<std::vector<LayerDescription>> kda_layers(const ModelFamily& family,
                                                 const ConfigFields& fields);
Result<std::vector<LayerDescription>> mla_layers(const ModelFamily& family,
                                                 const ConfigFields& fields);

}  // namespace kvtier
