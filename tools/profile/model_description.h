#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace kvtier {

/// What a layer keeps of the tokens it has seen.
enum class LayerKind : unsigned char {
  kFull,        ///< Keys and values of every token.
  kSliding,     ///< Keys and values of the last `window_tokens` (or of the present chunk).
  kLinear,      ///< A state of fixed size, whatever the context.
  kMla,         ///< One compressed vector per token, shared by all heads and by keys and values.
  kMlaIndexed,  ///< The same, and an indexer that selects tokens by a key of its own.
};
const char* to_string(LayerKind kind);

/// What one layer of a model keeps and attends. Sizes are in elements; bytes follow from the types
/// that `KvTypes` names.
struct LayerDescription {
  LayerKind kind = LayerKind::kFull;

  /// Heads that have keys and values of their own; 1 for MLA, 0 for a linear layer.
  std::uint32_t kv_heads = 0;
  std::uint32_t query_heads = 0;
  /// Elements of a key and of a value. MLA keeps `key_dim` alone: its value is a part of the key.
  std::uint32_t key_dim = 0;
  std::uint32_t value_dim = 0;
  std::uint64_t window_tokens = 0;  ///< Sliding layers.
  /// Multiplications per pair of tokens and query head when a prompt is attended: of a query with a
  /// key, and of a weight with a value. MLA expands its vector for prompts, so these are not the
  /// dims that it keeps.
  std::uint32_t pair_products = 0;

  /// Elements of the indexer's key per token, 0 where this layer keeps none (an indexed layer may
  /// use the choice of the one before it), and the tokens that it selects.
  std::uint32_t index_dim = 0;
  std::uint64_t index_top_k = 0;

  /// Linear layers: elements of the recurrent state and of the inputs that the convolution keeps.
  std::uint64_t recurrent_elements = 0;
  std::uint64_t convolution_elements = 0;
  /// Heads that the state is divided by among GPUs.
  std::uint32_t state_heads = 0;

  /// False where the layer attends what an earlier layer keeps, and keeps nothing itself.
  bool stores_kv = true;

  /// Whether what it keeps grows with the context.
  bool grows() const {
    return stores_kv && kind != LayerKind::kSliding && kind != LayerKind::kLinear;
  }
  bool is_mla() const { return kind == LayerKind::kMla || kind == LayerKind::kMlaIndexed; }
  /// Elements kept per token, without the indexer's.
  std::uint64_t kv_elements() const {
    if (kind == LayerKind::kLinear || !stores_kv) return 0;
    return std::uint64_t{kv_heads} * (is_mla() ? key_dim : key_dim + value_dim);
  }

  friend bool operator==(const LayerDescription&, const LayerDescription&) = default;
};

/// How numbers are kept.
struct KvTypes {
  double kv_bytes = 2;     ///< Per element of keys, values and compressed vectors.
  double index_bytes = 2;  ///< Per element of an indexer's keys.
  double recurrent_bytes = 4;
  double convolution_bytes = 2;
};

/// Parameters, estimated from the shapes: matrices and embeddings, without biases and norms.
struct ParameterCount {
  double total = 0;
  double embedding = 0;  ///< Of the total: the input table, of which a step reads one row.
  double expert = 0;     ///< Of the total: routed experts.
  double experts = 0;    ///< Experts per expert layer, and how many a token takes.
  double experts_used = 0;

  /// Parameters that one step reads for `tokens` tokens, routed evenly and independently.
  double read(double tokens) const;
  /// Parameters that one token is multiplied with.
  double active() const;
};

/// What a config says of positions, in either spelling.
struct RopeDescription {
  double theta = 0;        ///< 0: not said.
  double local_theta = 0;  ///< Of sliding layers, where it differs.
  std::string scaling;     ///< "llama3", "yarn"; empty for none.
  double factor = 1;
};

/// A model as memory sees it: one description per layer. Value type.
struct ModelDescription {
  std::string file;
  std::string model_type;
  std::string digest;  ///< "sha256:..." of the file.
  std::uint64_t hidden_size = 0;
  std::vector<LayerDescription> layers;
  std::optional<std::uint64_t> max_positions;
  RopeDescription rope;
  /// As the weights lie in the checkpoint; and why.
  double weight_bytes_per_parameter = 2;
  std::string weight_type;
  /// None where the config lacks what the estimate needs.
  std::optional<ParameterCount> parameters;
  /// Everything that was taken for granted while reading, one line each.
  std::vector<std::string> assumptions;
};

/// Bytes that one layer of one GPU keeps, of `gpus` that share the model by heads. Heads that do
/// not divide are rounded up; fewer heads than GPUs, and MLA, are kept whole by each.
struct LayerBytes {
  double per_token = 0;        ///< Of context, indexer excluded; grows without bound.
  double index_per_token = 0;  ///< The indexer's.
  double fixed = 0;            ///< Of a full window, or the state. Per sequence.
};
LayerBytes layer_bytes(const LayerDescription& layer, const KvTypes& types, std::uint32_t gpus);

/// What a sequence of `context` tokens keeps in a layer: windows are not full before they are.
double layer_bytes_at(const LayerDescription& layer, const KvTypes& types, std::uint32_t gpus,
                      std::uint64_t context);

}  // namespace kvtier
