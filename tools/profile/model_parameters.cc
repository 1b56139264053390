// Parameters of a model from the shapes in its config: products of matrices' sides, without biases
// and norms, which are less than a thousandth of any model here.

#include "tools/profile/model_families.h"

#include <algorithm>
#include <cmath>
#include <string>

namespace kvtier {
namespace {

/// Reads counts that the estimate needs and remembers which are missing. A wrong value is an error
/// of the config and ends the reading.
class ParameterFields {
 public:
  explicit ParameterFields(const ConfigFields& fields) : fields_(fields) {}

  double need(std::string_view key) {
    const double value = get(key);
    if (value == 0) missing_ += (missing_.empty() ? "" : ", ") + std::string(key);
    return value;
  }
  /// 0 where it is absent.
  double get(std::string_view key) {
    const auto value = fields_.count_or_zero(key);
    if (value.ok()) return static_cast<double>(*value);
    if (status_.ok()) status_ = value.status();
    return 0;
  }
  /// The first of two spellings that is there.
  double first(std::string_view key, std::string_view other) {
    return fields_.has(key) ? get(key) : get(other);
  }
  bool has(std::string_view key) const { return fields_.has(key); }

  const std::string& missing() const { return missing_; }
  const Status& status() const { return status_; }

 private:
  const ConfigFields& fields_;
  std::string missing_;
  Status status_;
};

double mla_parameters(ParameterFields& fields, double hidden, double heads) {
  const double rank = fields.need("kv_lora_rank");
  const double rope = fields.need("qk_rope_head_dim");
  const double nope = fields.need("qk_nope_head_dim");
  const double value = fields.need("v_head_dim");
  const double q_rank = fields.get("q_lora_rank");
  const double q_out = heads * (nope + rope);
  const double query = q_rank > 0 ? hidden * q_rank + q_rank * q_out : hidden * q_out;
  return query + hidden * (rank + rope) + rank * heads * (nope + value) + heads * value * hidden;
}

double indexer_parameters(ParameterFields& fields, double hidden, double dim) {
  const double heads = fields.need("index_n_heads");
  return fields.get("q_lora_rank") * heads * dim + hidden * dim + hidden * heads;
}

double linear_parameters(const ModelFamily& family, ParameterFields& fields, double hidden,
                         const LayerDescription& layer) {
  const double heads = layer.state_heads;
  if (family.shape == ModelFamily::Shape::kKda) {
    // q, k, v and out; two gates of low rank; one write strength per head.
    const double dim = std::sqrt(static_cast<double>(layer.recurrent_elements) / heads);
    const double wide = heads * dim;
    return 4 * hidden * wide + 2 * (hidden * dim + dim * wide) + hidden * heads;
  }
  const double key_heads = fields.first("linear_num_key_heads", "num_attention_heads");
  // recurrent = value_heads * key_dim * value_dim; the dims are as given or as the class has them.
  double key_dim = fields.get("linear_key_head_dim");
  double value_dim = fields.get("linear_value_head_dim");
  const bool is_olmo = std::string_view(family.model_type) == "olmo_hybrid";
  if (key_dim == 0) key_dim = is_olmo ? 0.75 * hidden / key_heads : 128;
  if (value_dim == 0) value_dim = is_olmo ? 2 * key_dim : 128;
  const double key = key_heads * key_dim;
  const double value = heads * value_dim;
  return hidden * (2 * key + 2 * value) + hidden * 2 * heads + value * hidden;
}

double attention_parameters(const ModelFamily& family, ParameterFields& fields, double hidden,
                            const LayerDescription& layer) {
  if (layer.kind == LayerKind::kLinear) return linear_parameters(family, fields, hidden, layer);
  if (layer.is_mla()) {
    return mla_parameters(fields, hidden, layer.query_heads) +
           (layer.index_dim > 0 ? indexer_parameters(fields, hidden, layer.index_dim) : 0);
  }
  const double query = static_cast<double>(layer.query_heads) * layer.key_dim;
  const double kept = layer.stores_kv ? static_cast<double>(layer.kv_elements()) : 0;
  // Qwen's hybrids gate the output of full attention by a second projection as wide as the query's.
  const bool gated = family.shape == ModelFamily::Shape::kGatedDelta &&
                     std::string_view(family.model_type) != "olmo_hybrid";
  return hidden * (query * (gated ? 2 : 1) + kept) + query * hidden;
}

struct ExpertShape {
  double experts = 0;
  double used = 0;
  double expert = 0;  ///< Parameters of one.
  double beside = 0;  ///< Of what every token goes through in an expert layer.
};

ExpertShape expert_shape(const ModelFamily& family, ParameterFields& fields, double hidden) {
  ExpertShape shape;
  shape.experts = fields.first("num_experts", "num_local_experts");
  if (shape.experts == 0) shape.experts = fields.get("n_routed_experts");
  if (shape.experts == 0) return shape;
  shape.used = fields.first("num_experts_per_tok", "num_experts_per_token");
  if (shape.used == 0) shape.used = fields.get("top_k_experts");
  if (shape.used == 0) shape.used = fields.need("num_experts_per_tok");
  double inner = fields.get("moe_intermediate_size");
  if (inner == 0) inner = fields.need("intermediate_size");
  shape.expert = 3 * hidden * inner;
  double shared = fields.get("shared_expert_intermediate_size");
  if (shared == 0) shared = inner * fields.first("n_shared_experts", "num_shared_experts");
  if (family.shape == ModelFamily::Shape::kLlama4) shared = inner;
  shape.beside = 3 * hidden * shared + hidden * shape.experts;
  // Gemma 4 keeps its dense feed-forward beside the experts.
  if (family.shape == ModelFamily::Shape::kGemma4) {
    shape.beside += 3 * hidden * fields.need("intermediate_size");
  }
  return shape;
}

/// Which layers have experts, where the model has any.
Result<std::vector<bool>> expert_layers(const ModelFamily& family, const ConfigFields& config,
                                        ParameterFields& fields, std::size_t layers) {
  std::vector<bool> expert(layers, true);
  KVTIER_ASSIGN_OR_RETURN(const auto words, config.words("mlp_layer_types", layers));
  if (words) {
    for (std::size_t i = 0; i < layers; ++i) expert[i] = (*words)[i] == "sparse";
    return expert;
  }
  KVTIER_ASSIGN_OR_RETURN(const auto listed, config.numbers("moe_layers"));
  if (listed) {
    expert.assign(layers, false);
    for (const std::uint64_t layer : *listed) {
      if (layer < layers) expert[layer] = true;
    }
    return expert;
  }
  const auto dense = static_cast<std::size_t>(fields.get("first_k_dense_replace"));
  double step = fields.first("decoder_sparse_step", "moe_layer_freq");
  if (family.shape == ModelFamily::Shape::kLlama4) step = fields.get("interleave_moe_layer_step");
  KVTIER_ASSIGN_OR_RETURN(const auto dense_list, config.numbers("mlp_only_layers"));
  for (std::size_t i = 0; i < layers; ++i) {
    if (i < dense) expert[i] = false;
    if (step > 1 && (i + 1) % static_cast<std::size_t>(step) != 0) expert[i] = false;
    if (dense_list && std::ranges::find(*dense_list, i) != dense_list->end()) expert[i] = false;
  }
  return expert;
}

}  // namespace

Result<std::optional<ParameterCount>> count_parameters(
    const ModelFamily& family, const ConfigFields& config,
    const std::vector<LayerDescription>& layers) {
  ParameterFields fields(config);
  const double hidden = fields.need("hidden_size");
  const double vocabulary = fields.need("vocab_size");
  KVTIER_ASSIGN_OR_RETURN(const bool tied,
                          config.flag_or("tie_word_embeddings", family.tied_embeddings));
  const ExpertShape experts = expert_shape(family, fields, hidden);
  KVTIER_ASSIGN_OR_RETURN(const auto has_experts,
                          expert_layers(family, config, fields, layers.size()));
  if (experts.used > experts.experts) {
    return config.error("num_experts_per_tok", fmt::format("{}", experts.used),
                        fmt::format("at most the {} experts", experts.experts));
  }
  ParameterCount count;
  count.experts = experts.experts;
  count.experts_used = experts.used;
  count.embedding = tied ? 0 : vocabulary * hidden;
  count.total = vocabulary * hidden * (tied ? 1 : 2);
  // Phi's feed-forward has two matrices, all others three.
  const double matrices = std::string_view(family.model_type) == "phi" ? 2 : 3;
  const double per_layer = fields.get("hidden_size_per_layer_input");
  KVTIER_ASSIGN_OR_RETURN(const bool wide_where_shared,
                          config.flag_or("use_double_wide_mlp", false));
  for (std::size_t i = 0; i < layers.size(); ++i) {
    count.total += attention_parameters(family, fields, hidden, layers[i]);
    count.total += per_layer * hidden * 3;  // Gate, projection, and the share of the common one.
    if (experts.experts > 0 && has_experts[i]) {
      count.expert += experts.experts * experts.expert;
      count.total += experts.experts * experts.expert + experts.beside;
      continue;
    }
    const bool llama4 = family.shape == ModelFamily::Shape::kLlama4;
    const double inner = fields.need(llama4 ? "intermediate_size_mlp" : "intermediate_size");
    count.total += matrices * hidden * inner * (wide_where_shared && !layers[i].stores_kv ? 2 : 1);
  }
  // Gemma 4's table of inputs per layer: a row per token is read, so it counts as embedding.
  const double table =
      fields.get("vocab_size_per_layer_input") * per_layer * static_cast<double>(layers.size());
  count.embedding += table;
  count.total += table;
  KVTIER_RETURN_IF_ERROR(fields.status());
  if (fields.missing().empty()) return std::optional(count);
  config.assume(fmt::format("parameters are not estimated: the config lacks {}", fields.missing()));
  return std::optional<ParameterCount>();
}

}  // namespace kvtier
