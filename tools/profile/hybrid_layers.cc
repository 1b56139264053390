#include "tools/profile/family_layers.h"

#include <string_view>
#include <utility>

namespace kvtier {

namespace {

LayerDescription linear_layer(std::uint64_t key_heads, std::uint64_t key_dim,
                              std::uint64_t value_heads, std::uint64_t value_dim,
                              std::uint64_t kernel) {
  LayerDescription layer;
  layer.kind = LayerKind::kLinear;
  layer.state_heads = static_cast<std::uint32_t>(value_heads);
  layer.recurrent_elements = value_heads * key_dim * value_dim;
  // Queries and keys of the key heads, values of the value heads; the inputs before the present.
  layer.convolution_elements = (kernel - 1) * (2 * key_heads * key_dim + value_heads * value_dim);
  return layer;
}

Result<std::vector<std::string>> hybrid_words(const ConfigFields& fields, std::uint32_t layers) {
  KVTIER_ASSIGN_OR_RETURN(auto words, fields.words("layer_types", layers));
  if (words) return std::move(*words);
  KVTIER_ASSIGN_OR_RETURN(const auto interval, fields.count_or("full_attention_interval", 4));
  if (interval == 0) return fields.error("full_attention_interval", "0", "a count from 1");
  std::vector<std::string> made(layers, "linear_attention");
  for (std::uint32_t i = 0; i < layers; ++i) {
    if ((i + 1) % interval == 0) made[i] = "full_attention";
  }
  return made;
}

Result<LayerDescription> mla_layer(const ConfigFields& fields, std::uint32_t heads) {
  KVTIER_ASSIGN_OR_RETURN(const auto rank, fields.count("kv_lora_rank"));
  KVTIER_ASSIGN_OR_RETURN(const auto rope, fields.count("qk_rope_head_dim"));
  LayerDescription layer;
  layer.kind = LayerKind::kMla;
  layer.kv_heads = 1;
  layer.query_heads = heads;
  layer.key_dim = static_cast<std::uint32_t>(rank + rope);
  layer.value_dim = static_cast<std::uint32_t>(rank);
  KVTIER_ASSIGN_OR_RETURN(const auto nope, fields.count_or_zero("qk_nope_head_dim"));
  KVTIER_ASSIGN_OR_RETURN(const auto value, fields.count_or_zero("v_head_dim"));
  layer.pair_products = static_cast<std::uint32_t>(nope + rope + value);
  return layer;
}

/// Which layers run an indexer of their own; the others take the choice of the one before.
Result<std::vector<bool>> own_indexers(const ConfigFields& fields, std::uint32_t layers) {
  std::vector<bool> own(layers, true);
  KVTIER_ASSIGN_OR_RETURN(const auto words, fields.words("indexer_types", layers));
  if (words) {
    for (std::uint32_t i = 0; i < layers; ++i) own[i] = (*words)[i] == "full";
    return own;
  }
  KVTIER_ASSIGN_OR_RETURN(const auto every, fields.count_or_zero("index_topk_freq"));
  if (every <= 1) return own;
  KVTIER_ASSIGN_OR_RETURN(const auto offset, fields.count_or("index_skip_topk_offset", 2));
  for (std::uint64_t i = 0; i < layers; ++i) {
    own[i] = (i + 1 > offset ? i + 1 - offset : 0) % every == 0;
  }
  return own;
}

}  // namespace

Result<std::vector<LayerDescription>> gated_delta_layers(const ModelFamily& family,
                                                         const ConfigFields& fields) {
  KVTIER_ASSIGN_OR_RETURN(const HeadShape shape, read_heads(family, fields));
  KVTIER_ASSIGN_OR_RETURN(const auto words, hybrid_words(fields, shape.layers));
  const bool is_olmo = std::string_view(family.model_type) == "olmo_hybrid";
  // The Qwen classes have fixed defaults, OLMo's follow from the attention heads.
  KVTIER_ASSIGN_OR_RETURN(const auto key_heads,
                          fields.count_or("linear_num_key_heads", is_olmo ? shape.heads : 16));
  if (key_heads == 0) return fields.error("linear_num_key_heads", "0", "a count from 1");
  KVTIER_ASSIGN_OR_RETURN(const auto value_heads,
                          fields.count_or("linear_num_value_heads", is_olmo ? shape.heads : 32));
  const std::uint64_t olmo_dim = 3 * shape.hidden / (4 * key_heads);
  KVTIER_ASSIGN_OR_RETURN(const auto key_dim,
                          fields.count_or("linear_key_head_dim", is_olmo ? olmo_dim : 128));
  KVTIER_ASSIGN_OR_RETURN(const auto value_dim,
                          fields.count_or("linear_value_head_dim", is_olmo ? 2 * key_dim : 128));
  KVTIER_ASSIGN_OR_RETURN(const auto kernel, fields.count_or("linear_conv_kernel_dim", 4));
  if (kernel == 0) return fields.error("linear_conv_kernel_dim", "0", "a count from 1");
  std::vector<LayerDescription> layers(shape.layers, plain_layer(shape));
  for (std::uint32_t i = 0; i < shape.layers; ++i) {
    if (words[i] == "linear_attention") {
      layers[i] = linear_layer(key_heads, key_dim, value_heads, value_dim, kernel);
    } else if (words[i] != "full_attention") {
      return fields.error(fmt::format("layer_types[{}]", i), words[i],
                          "full_attention or linear_attention");
    }
  }
  return layers;
}

Result<std::vector<LayerDescription>> kda_layers(const ModelFamily& family,
                                                 const ConfigFields& fields) {
  KVTIER_ASSIGN_OR_RETURN(const HeadShape shape, read_heads(family, fields));
  KVTIER_ASSIGN_OR_RETURN(const LayerDescription full, mla_layer(fields, shape.heads));
  KVTIER_ASSIGN_OR_RETURN(const auto words, fields.words("layer_types", shape.layers));
  KVTIER_ASSIGN_OR_RETURN(const auto nested, fields.text().optional_member("linear_attn_config"));
  if (!nested && !words) return fields.text().member("linear_attn_config").status();
  std::vector<std::string> unused;
  const ConfigFields linear(nested ? *nested : fields.text(), unused);
  KVTIER_ASSIGN_OR_RETURN(const auto heads,
                          linear.count(nested ? "num_heads" : "linear_num_heads"));
  KVTIER_ASSIGN_OR_RETURN(const auto dim, linear.count(nested ? "head_dim" : "linear_head_dim"));
  KVTIER_ASSIGN_OR_RETURN(const auto kernel, linear.count(nested ? "short_conv_kernel_size"
                                                                 : "linear_conv_kernel_dim"));
  std::vector<LayerDescription> layers(shape.layers, linear_layer(heads, dim, heads, dim, kernel));
  if (words) {
    for (std::uint32_t i = 0; i < shape.layers; ++i) {
      if ((*words)[i] != "linear_attention") layers[i] = full;
    }
    return layers;
  }
  KVTIER_ASSIGN_OR_RETURN(const auto listed, linear.numbers("full_attn_layers"));
  if (!listed) return nested->member("full_attn_layers").status();
  for (const std::uint64_t number : *listed) {
    // Checkpoints count these layers from one.
    if (number < 1 || number > shape.layers) {
      return fields.error("linear_attn_config.full_attn_layers", fmt::format("{}", number),
                          fmt::format("layers from 1 to {}", shape.layers));
    }
    layers[number - 1] = full;
  }
  return layers;
}

Result<std::vector<LayerDescription>> mla_layers(const ModelFamily& family,
                                                 const ConfigFields& fields) {
  KVTIER_ASSIGN_OR_RETURN(const HeadShape shape, read_heads(family, fields));
  KVTIER_ASSIGN_OR_RETURN(const LayerDescription layer, mla_layer(fields, shape.heads));
  std::vector<LayerDescription> layers(shape.layers, layer);
  if (family.shape != ModelFamily::Shape::kMlaIndexed) return layers;
  KVTIER_ASSIGN_OR_RETURN(const auto dim, fields.count("index_head_dim"));
  KVTIER_ASSIGN_OR_RETURN(const auto top_k, fields.count("index_topk"));
  KVTIER_ASSIGN_OR_RETURN(const auto own, own_indexers(fields, shape.layers));
  for (std::uint32_t i = 0; i < shape.layers; ++i) {
    layers[i].kind = LayerKind::kMlaIndexed;
    layers[i].index_dim = own[i] ? static_cast<std::uint32_t>(dim) : 0;
    layers[i].index_top_k = top_k;
  }
  return layers;
}

}  // namespace kvtier
