#pragma once

#include "memory/status.h"
#include "tools/profile/config_fields.h"
#include "tools/profile/model_description.h"

#include <string_view>
#include <vector>

namespace kvtier {

/// How a family's layers are described; the figures are what its model class takes for an absent
/// key.
struct ModelFamily {
  enum class Shape : unsigned char {
    kPlain,       ///< Keys and values per head; windows by `Window`.
    kGemma4,      ///< Global layers of other heads and dims; last layers share what earlier keep.
    kLlama4,      ///< Chunks, but for layers without rope.
    kGatedDelta,  ///< Linear layers beside full ones.
    kKda,         ///< Linear layers beside MLA.
    kMla,
    kMlaIndexed,
  };
  enum class Window : unsigned char {
    kNone,
    kAll,       ///< `sliding_window` holds for every layer.
    kTail,      ///< From layer `max_window_layers` on, where `use_sliding_window` says so.
    kRefused,   ///< Known only with `layer_types`.
    kInterval,  ///< Every layer but each `interval`-th.
  };
  /// How many KV heads there are where the config does not say.
  static constexpr std::uint32_t kAsQueryHeads = 0;
  static constexpr std::uint32_t kMustSay = ~0u;

  const char* model_type;
  Shape shape = Shape::kPlain;
  std::uint32_t heads = kMustSay;
  std::uint32_t kv_heads = kMustSay;
  std::uint32_t head_dim = 0;  ///< 0: hidden_size / heads.
  Window window = Window::kNone;
  std::uint64_t window_tokens = 0;
  std::uint32_t interval = 0;
  bool tied_embeddings = false;
};

/// Null for a type that is not known.
const ModelFamily* find_model_family(std::string_view model_type);
std::vector<std::string> known_model_types();

/// The layers, in order. Errors name the key.
Result<std::vector<LayerDescription>> describe_layers(const ModelFamily& family,
                                                      const ConfigFields& fields);

/// None, with the keys that are missing in `assumptions`, where the config lacks the shape of the
/// weights.
Result<std::optional<ParameterCount>> count_parameters(const ModelFamily& family,
                                                       const ConfigFields& fields,
                                                       const std::vector<LayerDescription>& layers);

}  // namespace kvtier
