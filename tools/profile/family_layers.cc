#include "tools/profile/family_layers.h"

#include <algorithm>
#include <utility>

namespace kvtier {

Result<HeadShape> read_heads(const ModelFamily& family, const ConfigFields& fields) {
  HeadShape shape;
  KVTIER_ASSIGN_OR_RETURN(const auto layers, fields.count("num_hidden_layers"));
  KVTIER_ASSIGN_OR_RETURN(shape.hidden, fields.count("hidden_size"));
  KVTIER_ASSIGN_OR_RETURN(const auto heads,
                          family.heads == ModelFamily::kMustSay
                              ? fields.count("num_attention_heads")
                              : fields.count_or("num_attention_heads", family.heads));
  shape.layers = static_cast<std::uint32_t>(layers);
  shape.heads = static_cast<std::uint32_t>(heads);
  if (shape.heads == 0) return fields.error("num_attention_heads", "0", "a count from 1");
  std::uint64_t kv_heads = shape.heads;
  const bool is_mla = family.shape == ModelFamily::Shape::kMla ||
                      family.shape == ModelFamily::Shape::kMlaIndexed ||
                      family.shape == ModelFamily::Shape::kKda;
  if (!is_mla && family.kv_heads == ModelFamily::kMustSay) {
    KVTIER_ASSIGN_OR_RETURN(kv_heads, fields.count("num_key_value_heads"));
  } else if (!is_mla) {
    const std::uint32_t fallback =
        family.kv_heads == ModelFamily::kAsQueryHeads ? shape.heads : family.kv_heads;
    KVTIER_ASSIGN_OR_RETURN(kv_heads, fields.count_or("num_key_value_heads", fallback));
  }
  if (kv_heads == 0 || shape.heads % kv_heads != 0) {
    return fields.error("num_key_value_heads", fmt::format("{}", kv_heads),
                        fmt::format("a divisor of the {} query heads", shape.heads));
  }
  shape.kv_heads = static_cast<std::uint32_t>(kv_heads);
  if (is_mla) return shape;
  KVTIER_ASSIGN_OR_RETURN(std::uint64_t head_dim, fields.count_or_zero("head_dim"));
  if (head_dim == 0 && family.head_dim > 0) {
    KVTIER_ASSIGN_OR_RETURN(head_dim, fields.count_or("head_dim", family.head_dim));
  }
  if (head_dim == 0 && shape.hidden % shape.heads != 0) {
    return fields.error("head_dim", "nothing",
                        fmt::format("the field, because {} heads do not divide hidden_size {}",
                                    shape.heads, shape.hidden));
  }
  shape.head_dim = static_cast<std::uint32_t>(head_dim > 0 ? head_dim : shape.hidden / shape.heads);
  return shape;
}

LayerDescription plain_layer(const HeadShape& shape) {
  LayerDescription layer;
  layer.kv_heads = shape.kv_heads;
  layer.query_heads = shape.heads;
  layer.key_dim = layer.value_dim = shape.head_dim;
  layer.pair_products = 2 * shape.head_dim;
  return layer;
}

Result<std::optional<std::vector<std::string>>> ConfigFields::words(std::string_view key,
                                                                    std::size_t layers) const {
  KVTIER_ASSIGN_OR_RETURN(const auto field, text_.optional_member(key));
  if (!field) return std::optional<std::vector<std::string>>();
  KVTIER_ASSIGN_OR_RETURN(const auto elements, field->elements());
  if (elements.size() != layers) {
    return error(key, fmt::format("{} elements", elements.size()),
                 fmt::format("one per layer, {}", layers));
  }
  std::vector<std::string> words;
  for (const JsonField& element : elements) {
    KVTIER_ASSIGN_OR_RETURN(std::string word, element.as_string());
    words.push_back(std::move(word));
  }
  return std::optional(std::move(words));
}

Result<std::optional<std::vector<std::uint64_t>>> ConfigFields::numbers(
    std::string_view key) const {
  KVTIER_ASSIGN_OR_RETURN(const auto field, text_.optional_member(key));
  if (!field) return std::optional<std::vector<std::uint64_t>>();
  KVTIER_ASSIGN_OR_RETURN(const auto elements, field->elements());
  std::vector<std::uint64_t> numbers;
  for (const JsonField& element : elements) {
    KVTIER_ASSIGN_OR_RETURN(const std::uint64_t number, element.as_count(0, kCountMax));
    numbers.push_back(number);
  }
  return std::optional(std::move(numbers));
}

}  // namespace kvtier
