#include "tools/profile/family_layers.h"

#include <algorithm>
#include <array>
#include <utility>

namespace kvtier {

namespace {

using Shape = ModelFamily::Shape;
using Window = ModelFamily::Window;
constexpr std::uint32_t kAsHeads = ModelFamily::kAsQueryHeads;
constexpr std::uint32_t kAsk = ModelFamily::kMustSay;

// Sorted by name. A default stands here only where the family's published class has it.
constexpr ModelFamily kFamilies[] = {
    {"cohere", Shape::kPlain, kAsk, kAsHeads, 0, Window::kNone, 0, 0, true},
    {"cohere2", Shape::kPlain, kAsk, kAsHeads, 0, Window::kInterval, 4096, 4, true},
    {"deepseek_v2", Shape::kMla},
    {"deepseek_v3", Shape::kMla},
    {"deepseek_v32", Shape::kMlaIndexed},
    {"gemma2", Shape::kPlain, 8, 4, 256, Window::kInterval, 4096, 2, true},
    {"gemma3_text", Shape::kPlain, 8, 4, 256, Window::kInterval, 4096, 6, true},
    {"gemma4_text", Shape::kGemma4, 8, 4, 256, Window::kInterval, 512, 6, true},
    {"glm", Shape::kPlain, kAsk, 2, 128},
    {"glm4", Shape::kPlain, kAsk, 2, 128},
    {"glm4_moe", Shape::kPlain, kAsk, 8, 0},
    {"glm_moe_dsa", Shape::kMlaIndexed},
    {"gpt_oss", Shape::kPlain, 64, 8, 64, Window::kInterval, 128, 2},
    {"kimi_k2", Shape::kMla},
    {"kimi_linear", Shape::kKda},
    {"llama", Shape::kPlain, kAsk, kAsHeads, 0},
    {"llama4_text", Shape::kLlama4, 40, 8, 128},
    {"ministral", Shape::kPlain, kAsk, 8, 0, Window::kAll, 4096},
    {"ministral3", Shape::kPlain, kAsk, 8, 128, Window::kAll, 0},
    {"mistral", Shape::kPlain, kAsk, 8, 0, Window::kAll, 4096},
    {"mixtral", Shape::kPlain, kAsk, 8, 0, Window::kAll, 0},
    {"olmo_hybrid", Shape::kGatedDelta, kAsk, kAsHeads, 0},
    {"phi", Shape::kPlain, kAsk, kAsHeads, 0},
    {"phi3", Shape::kPlain, kAsk, kAsHeads, 0, Window::kAll, 0},
    {"phimoe", Shape::kPlain, kAsk, 8, 0, Window::kAll, 0},
    {"qwen2", Shape::kPlain, kAsk, kAsk, 0, Window::kTail, 4096},
    {"qwen2_moe", Shape::kPlain, kAsk, kAsk, 0, Window::kRefused, 4096},
    {"qwen3", Shape::kPlain, kAsk, kAsk, 128, Window::kTail, 4096},
    {"qwen3_5_moe_text", Shape::kGatedDelta, kAsk, 2, 256},
    {"qwen3_5_text", Shape::kGatedDelta, kAsk, 4, 256},
    {"qwen3_moe", Shape::kPlain, kAsk, kAsk, 0, Window::kRefused, 4096},
    {"qwen3_next", Shape::kGatedDelta, kAsk, 2, 256},
};

void make_sliding(LayerDescription& layer, std::uint64_t window) {
  layer.kind = LayerKind::kSliding;
  layer.window_tokens = window;
}

/// One word per layer where the config has a list, or by the family's rule where it has none.
Result<std::vector<std::string>> layer_words(const ModelFamily& family, const ConfigFields& fields,
                                             std::uint32_t layers) {
  KVTIER_ASSIGN_OR_RETURN(auto words, fields.words("layer_types", layers));
  if (words) return std::move(*words);
  std::vector<std::string> made(layers, "full_attention");
  if (family.window == Window::kInterval) {
    const char* key = fields.has("_sliding_window_pattern") ? "_sliding_window_pattern"
                                                            : "sliding_window_pattern";
    KVTIER_ASSIGN_OR_RETURN(const auto interval, fields.count_or(key, family.interval));
    if (interval == 0) return fields.error(key, "0", "a count from 1");
    for (std::uint32_t i = 0; i < layers; ++i) {
      if ((i + 1) % interval != 0) made[i] = "sliding_attention";
    }
    return made;
  }
  KVTIER_ASSIGN_OR_RETURN(const bool slides, fields.flag_or("use_sliding_window", false));
  if (family.window == Window::kRefused && slides) {
    return fields.error("layer_types", "nothing",
                        "the field, because use_sliding_window does not say which layers slide");
  }
  if (family.window == Window::kTail && slides) {
    KVTIER_ASSIGN_OR_RETURN(const auto first, fields.count_or("max_window_layers", 28));
    for (std::uint64_t i = first; i < layers; ++i) made[i] = "sliding_attention";
  }
  if (family.window == Window::kAll) {
    std::fill(made.begin(), made.end(), "sliding_attention");
  }
  return made;
}

Result<std::uint64_t> window_of(const ModelFamily& family, const ConfigFields& fields) {
  const auto said = fields.text().value().find("sliding_window");
  // Null means that nothing slides; only where the key is absent the class decides.
  if (said != fields.text().value().end()) return fields.count_or_zero("sliding_window");
  if (family.window_tokens == 0) return std::uint64_t{0};
  return fields.count_or("sliding_window", family.window_tokens);
}

Result<std::vector<LayerDescription>> plain_layers(const ModelFamily& family,
                                                   const ConfigFields& fields) {
  KVTIER_ASSIGN_OR_RETURN(const HeadShape shape, read_heads(family, fields));
  KVTIER_ASSIGN_OR_RETURN(const auto words, layer_words(family, fields, shape.layers));
  KVTIER_ASSIGN_OR_RETURN(const auto longest,
                          fields.count_or_zero("max_position_embeddings", std::uint64_t{1} << 32));
  std::uint64_t window = 0;
  if (std::ranges::find(words, "sliding_attention") != words.end()) {
    KVTIER_ASSIGN_OR_RETURN(window, window_of(family, fields));
    if (window > 0 && longest > 0 && window >= longest) {
      fields.assume(fmt::format(
          "sliding_window {} is no shorter than max_position_embeddings {}: those layers are full",
          window, longest));
      window = 0;
    }
  }
  std::vector<LayerDescription> layers(shape.layers, plain_layer(shape));
  for (std::uint32_t i = 0; i < shape.layers; ++i) {
    if (words[i] == "sliding_attention" && window > 0) {
      make_sliding(layers[i], window);
    } else if (words[i] != "full_attention" && words[i] != "sliding_attention") {
      return fields.error(fmt::format("layer_types[{}]", i), words[i],
                          "full_attention or sliding_attention");
    }
  }
  return layers;
}

Result<std::vector<LayerDescription>> gemma4_layers(const ModelFamily& family,
                                                    const ConfigFields& fields) {
  KVTIER_ASSIGN_OR_RETURN(const HeadShape shape, read_heads(family, fields));
  KVTIER_ASSIGN_OR_RETURN(auto words, layer_words(family, fields, shape.layers));
  if (words.back() != "full_attention") {
    fields.assume("the last layer attends everything, as the family's class insists");
    words.back() = "full_attention";
  }
  KVTIER_ASSIGN_OR_RETURN(const auto window, window_of(family, fields));
  KVTIER_ASSIGN_OR_RETURN(const auto global_dim, fields.count_or("global_head_dim", 512));
  KVTIER_ASSIGN_OR_RETURN(auto global_heads, fields.count_or_zero("num_global_key_value_heads"));
  KVTIER_ASSIGN_OR_RETURN(const bool k_eq_v, fields.flag_or("attention_k_eq_v", false));
  if (global_heads == 0 || !k_eq_v) global_heads = shape.kv_heads;
  KVTIER_ASSIGN_OR_RETURN(const auto shared, fields.count_or_zero("num_kv_shared_layers"));
  if (shared >= shape.layers) {
    return fields.error("num_kv_shared_layers", fmt::format("{}", shared),
                        fmt::format("fewer than the {} layers", shape.layers));
  }
  std::vector<LayerDescription> layers(shape.layers, plain_layer(shape));
  for (std::uint32_t i = 0; i < shape.layers; ++i) {
    if (words[i] == "sliding_attention") {
      make_sliding(layers[i], window);
    } else if (words[i] == "full_attention") {
      layers[i].kv_heads = static_cast<std::uint32_t>(global_heads);
      layers[i].key_dim = layers[i].value_dim = static_cast<std::uint32_t>(global_dim);
      layers[i].pair_products = 2 * layers[i].key_dim;
    } else {
      return fields.error(fmt::format("layer_types[{}]", i), words[i],
                          "full_attention or sliding_attention");
    }
    layers[i].stores_kv = i < shape.layers - shared;
  }
  return layers;
}

Result<std::vector<LayerDescription>> llama4_layers(const ModelFamily& family,
                                                    const ConfigFields& fields) {
  KVTIER_ASSIGN_OR_RETURN(const HeadShape shape, read_heads(family, fields));
  KVTIER_ASSIGN_OR_RETURN(const auto said, fields.words("layer_types", shape.layers));
  KVTIER_ASSIGN_OR_RETURN(const auto rotated, fields.numbers("no_rope_layers"));
  const auto& text = fields.text().value();
  std::uint64_t chunk = 0;
  if (text.contains("attention_chunk_size")) {
    KVTIER_ASSIGN_OR_RETURN(chunk, fields.count_or_zero("attention_chunk_size"));
  } else {
    KVTIER_ASSIGN_OR_RETURN(chunk, fields.count_or("attention_chunk_size", 8192));
  }
  const bool listed = rotated && !rotated->empty();
  if (!said && listed && rotated->size() != shape.layers) {
    return fields.error("no_rope_layers", fmt::format("{} elements", rotated->size()),
                        fmt::format("one per layer, {}", shape.layers));
  }
  std::uint64_t interval = 4;
  if (!said && !listed) {
    KVTIER_ASSIGN_OR_RETURN(interval, fields.count_or("no_rope_layer_interval", 4));
    if (interval == 0) return fields.error("no_rope_layer_interval", "0", "a count from 1");
  }
  std::vector<LayerDescription> layers(shape.layers, plain_layer(shape));
  for (std::uint32_t i = 0; i < shape.layers; ++i) {
    if (said && (*said)[i] != "chunked_attention" && (*said)[i] != "full_attention") {
      return fields.error(fmt::format("layer_types[{}]", i), (*said)[i],
                          "full_attention or chunked_attention");
    }
    // The list marks layers *with* rope by 1, whatever its name says.
    const bool chunked = said     ? (*said)[i] == "chunked_attention"
                         : listed ? (*rotated)[i] != 0
                                  : (i + 1) % interval != 0;
    if (chunked && chunk > 0) make_sliding(layers[i], chunk);
  }
  return layers;
}

}  // namespace

const ModelFamily* find_model_family(std::string_view model_type) {
  const auto* found = std::ranges::find_if(
      kFamilies, [&](const ModelFamily& family) { return family.model_type == model_type; });
  return found == std::end(kFamilies) ? nullptr : found;
}

std::vector<std::string> known_model_types() {
  std::vector<std::string> names;
  for (const ModelFamily& family : kFamilies) names.emplace_back(family.model_type);
  return names;
}

Result<std::vector<LayerDescription>> describe_layers(const ModelFamily& family,
                                                      const ConfigFields& fields) {
  switch (family.shape) {
    case Shape::kPlain: return plain_layers(family, fields);
    case Shape::kGemma4: return gemma4_layers(family, fields);
    case Shape::kLlama4: return llama4_layers(family, fields);
    case Shape::kGatedDelta: return gated_delta_layers(family, fields);
    case Shape::kKda: return kda_layers(family, fields);
    case Shape::kMla:
    case Shape::kMlaIndexed: return mla_layers(family, fields);
  }
  return fields.error("model_type", family.model_type, "a known family");
}

}  // namespace kvtier
