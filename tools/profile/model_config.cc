#include "tools/profile/model_config.h"

#include "tools/profile/model_families.h"
#include "tools/trace/json_document.h"
#include "tools/trace/mapped_file.h"
#include "transfer/sha256.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <optional>
#include <utility>

namespace kvtier {
namespace {

/// The part that describes the decoder, and its type. Composite configs nest it.
struct TextPart {
  JsonField field;
  std::string model_type;
};

Result<TextPart> find_text(const JsonField& document, const std::string& read_as) {
  KVTIER_ASSIGN_OR_RETURN(const auto type, document.optional_member("model_type"));
  KVTIER_ASSIGN_OR_RETURN(const auto nested, document.optional_member("text_config"));
  std::string outer;
  if (type) {
    KVTIER_ASSIGN_OR_RETURN(outer, type->as_string());
  }
  TextPart part{nested ? *nested : document, outer};
  if (nested) {
    KVTIER_ASSIGN_OR_RETURN(const auto inner, nested->optional_member("model_type"));
    part.model_type = outer + "_text";
    if (inner) {
      KVTIER_ASSIGN_OR_RETURN(part.model_type, inner->as_string());
    }
  }
  if (!read_as.empty()) part.model_type = read_as;
  if (part.model_type.empty()) return document.member("model_type").status();
  // Text parts that stand alone go by the composite's name in some checkpoints.
  if (find_model_family(part.model_type) == nullptr &&
      find_model_family(part.model_type + "_text") != nullptr) {
    part.model_type += "_text";
  }
  return part;
}

/// What an unknown model lacks of what describes one with keys and values per head.
Status unknown_family(const JsonField& text, const std::string& model_type) {
  std::vector<std::string> missing;
  for (const char* key :
       {"num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads"}) {
    const auto field = text.optional_member(key);
    if (!field.ok()) return field.status();
    if (!*field) missing.emplace_back(key);
  }
  const std::string lacks =
      missing.empty() ? std::string("it has every key of plain attention")
                      : fmt::format("of plain attention it lacks {}", fmt::join(missing, ", "));
  return input_error(
      text.file(), "model_type", model_type,
      fmt::format("one of {}", fmt::join(known_model_types(), ", ")),
      fmt::format("{}; --read-as TYPE reads it as another family, if its layers are like those",
                  lacks));
}

Status read_rope(const ConfigFields& fields, RopeDescription& rope) {
  KVTIER_ASSIGN_OR_RETURN(rope.theta, fields.number_or("rope_theta", 0));
  KVTIER_ASSIGN_OR_RETURN(rope.local_theta, fields.number_or("rope_local_base_freq", 0));
  for (const char* key : {"rope_scaling", "rope_parameters"}) {
    KVTIER_ASSIGN_OR_RETURN(const auto found, fields.text().optional_member(key));
    if (!found) continue;
    KVTIER_ASSIGN_OR_RETURN(const auto global, found->optional_member("full_attention"));
    KVTIER_ASSIGN_OR_RETURN(const auto local, found->optional_member("sliding_attention"));
    std::vector<std::string> unused;
    const ConfigFields part(global ? *global : *found, unused);
    KVTIER_ASSIGN_OR_RETURN(rope.theta, part.number_or("rope_theta", rope.theta));
    KVTIER_ASSIGN_OR_RETURN(rope.factor, part.number_or("factor", rope.factor));
    KVTIER_ASSIGN_OR_RETURN(std::string kind, part.string_or("type", ""));
    KVTIER_ASSIGN_OR_RETURN(kind, part.string_or("rope_type", kind));
    rope.scaling = kind == "default" ? "" : kind;
    if (local) {
      const ConfigFields local_part(*local, unused);
      KVTIER_ASSIGN_OR_RETURN(rope.local_theta,
                              local_part.number_or("rope_theta", rope.local_theta));
    }
  }
  return {};
}

Result<std::string> written_type(const JsonField& text, const JsonField& document) {
  for (const JsonField* field : {&text, &document}) {
    for (const char* key : {"dtype", "torch_dtype"}) {
      KVTIER_ASSIGN_OR_RETURN(const auto type, field->optional_member(key));
      if (type) return type->as_string();
    }
  }
  return std::string();
}

/// Bytes per parameter, and the name of the type: of the quantisation where there is one.
Status read_weight_type(const JsonField& text, const JsonField& document, ModelDescription& model) {
  KVTIER_ASSIGN_OR_RETURN(model.weight_type, written_type(text, document));
  if (model.weight_type.empty()) {
    model.weight_type = "bfloat16";
    model.assumptions.push_back("neither dtype nor torch_dtype is given: weights in bfloat16");
  }
  model.weight_bytes_per_parameter = model.weight_type == "float32" ? 4 : 2;
  for (const JsonField* field : {&text, &document}) {
    KVTIER_ASSIGN_OR_RETURN(const auto quantised, field->optional_member("quantization_config"));
    if (!quantised) continue;
    std::vector<std::string> unused;
    const ConfigFields part(*quantised, unused);
    KVTIER_ASSIGN_OR_RETURN(const std::string method, part.string_or("quant_method", "unknown"));
    KVTIER_ASSIGN_OR_RETURN(const auto bits, part.count_or_zero("bits"));
    double bytes = bits > 0 ? static_cast<double>(bits) / 8 : 0;
    if (method == "fp8") bytes = 1;
    if (method == "mxfp4") bytes = 0.53125;  // 4 bits, and a byte of scale per 32.
    if (bytes == 0) {
      model.assumptions.push_back(fmt::format(
          "quantization_config {} does not say its bits: weights counted as {}; --weight-bytes "
          "takes the true size",
          printable(method, 40), model.weight_type));
      return {};
    }
    model.weight_type = printable(method, 40);
    model.weight_bytes_per_parameter = bytes;
    model.assumptions.push_back(fmt::format(
        "all weights counted at {} bytes, as {} stores its matrices", bytes, model.weight_type));
    return {};
  }
  return {};
}

}  // namespace

Result<ModelDescription> parse_model_config(std::span<const std::byte> text,
                                            const std::string& file, const std::string& read_as) {
  KVTIER_ASSIGN_OR_RETURN(const nlohmann::json json, parse_json(text, file, "config"));
  const JsonField document(json, file);
  if (!json.is_object()) return document.mismatch("an object");
  KVTIER_ASSIGN_OR_RETURN(const TextPart part, find_text(document, read_as));
  const ModelFamily* family = find_model_family(part.model_type);
  if (family == nullptr) return unknown_family(part.field, part.model_type);
  ModelDescription model;
  model.file = file;
  model.model_type = part.model_type;
  model.digest = "sha256:" + sha256_hex(text);
  const ConfigFields fields(part.field, model.assumptions);
  KVTIER_ASSIGN_OR_RETURN(model.hidden_size, fields.count("hidden_size"));
  KVTIER_ASSIGN_OR_RETURN(model.layers, describe_layers(*family, fields));
  KVTIER_ASSIGN_OR_RETURN(const auto longest,
                          part.field.optional_member("max_position_embeddings"));
  if (longest) {
    KVTIER_ASSIGN_OR_RETURN(const auto positions, longest->as_count(1, std::uint64_t{1} << 32));
    model.max_positions = positions;
  }
  KVTIER_RETURN_IF_ERROR(read_rope(fields, model.rope));
  KVTIER_RETURN_IF_ERROR(read_weight_type(part.field, document, model));
  KVTIER_ASSIGN_OR_RETURN(model.parameters, count_parameters(*family, fields, model.layers));
  KVTIER_ASSIGN_OR_RETURN(const auto drafts, fields.count_or_zero("num_nextn_predict_layers"));
  if (drafts > 0) {
    model.assumptions.push_back(
        fmt::format("{} layer(s) for drafting (num_nextn_predict_layers) are not counted", drafts));
  }
  return model;
}

Result<ModelDescription> read_model_config(const std::string& path, const std::string& read_as) {
  KVTIER_ASSIGN_OR_RETURN(const MappedFile file, MappedFile::open(path));
  return parse_model_config(file.bytes(), path, read_as);
}

}  // namespace kvtier
