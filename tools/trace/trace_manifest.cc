#include "tools/trace/trace_manifest.h"

#include "tools/trace/json_document.h"

#include <algorithm>
#include <cctype>

namespace kvtier {
namespace {

// Far above every model; they keep products of figures within 64 bits.
constexpr std::uint64_t kMaxLayers = 4096;
constexpr std::uint64_t kMaxHeads = 4096;
constexpr std::uint64_t kMaxDim = 65536;
constexpr std::uint64_t kMaxTokens = std::uint64_t{1} << 31;

Status read_count(const JsonField& parent, std::string_view key, std::uint64_t least,
                  std::uint64_t most, std::uint32_t& target) {
  KVTIER_ASSIGN_OR_RETURN(const JsonField field, parent.member(key));
  KVTIER_ASSIGN_OR_RETURN(const std::uint64_t count, field.as_count(least, most));
  target = static_cast<std::uint32_t>(count);
  return {};
}

Status read_string(const JsonField& parent, std::string_view key, std::string& target) {
  KVTIER_ASSIGN_OR_RETURN(const JsonField field, parent.member(key));
  KVTIER_ASSIGN_OR_RETURN(target, field.as_string());
  if (target.empty()) return field.mismatch("text");
  return {};
}

Status read_optional_string(const JsonField& parent, std::string_view key, std::string& target) {
  KVTIER_ASSIGN_OR_RETURN(const std::optional<JsonField> field, parent.optional_member(key));
  if (!field) return {};
  KVTIER_ASSIGN_OR_RETURN(target, field->as_string());
  return {};
}

Status read_positive(const JsonField& field, double& target) {
  KVTIER_ASSIGN_OR_RETURN(target, field.as_number());
  // Kernels take these as float32, where smaller ones would become zero.
  if (target < 1e-30 || target > 1e30) return field.mismatch("a number from 1e-30 to 1e30");
  return {};
}

Status read_optional_positive(const JsonField& parent, std::string_view key, double& target) {
  KVTIER_ASSIGN_OR_RETURN(const std::optional<JsonField> field, parent.optional_member(key));
  return field ? read_positive(*field, target) : Status();
}

// An unknown version may mean anything by the other fields, so this comes before all of them.
Status check_schema(const JsonField& root) {
  KVTIER_ASSIGN_OR_RETURN(const JsonField schema, root.member("schema"));
  if (schema.value() != nlohmann::json(TraceManifest::kSchema)) {
    return schema.mismatch(fmt::format("\"{}\"", TraceManifest::kSchema));
  }
  KVTIER_ASSIGN_OR_RETURN(const JsonField version, root.member("version"));
  if (!version.value().is_number_unsigned() || version.value() != TraceManifest::kVersion) {
    return version.mismatch(fmt::format("{}", TraceManifest::kVersion),
                            "recorded by another release: record it again or use that release");
  }
  return {};
}

Status read_model(const JsonField& root, TraceModel& model) {
  KVTIER_ASSIGN_OR_RETURN(const JsonField field, root.member("model"));
  KVTIER_RETURN_IF_ERROR(read_string(field, "name", model.name));
  KVTIER_RETURN_IF_ERROR(read_optional_string(field, "license", model.license));
  KVTIER_RETURN_IF_ERROR(read_optional_string(field, "architecture", model.architecture));
  KVTIER_RETURN_IF_ERROR(read_optional_string(field, "weights", model.weights));
  KVTIER_RETURN_IF_ERROR(read_count(field, "layers", 1, kMaxLayers, model.layers));
  KVTIER_RETURN_IF_ERROR(read_count(field, "query_heads", 1, kMaxHeads, model.query_heads));
  KVTIER_RETURN_IF_ERROR(read_count(field, "kv_heads", 1, kMaxHeads, model.kv_heads));
  KVTIER_RETURN_IF_ERROR(read_count(field, "head_dim", 1, kMaxDim, model.head_dim));
  KVTIER_RETURN_IF_ERROR(read_count(field, "value_dim", 1, kMaxDim, model.value_dim));
  KVTIER_ASSIGN_OR_RETURN(const auto vocab, field.optional_member("vocab_size"));
  if (vocab) {
    KVTIER_RETURN_IF_ERROR(read_count(field, "vocab_size", 1, kMaxTokens, model.vocab_size));
  }
  if (model.query_heads % model.kv_heads != 0) {
    KVTIER_ASSIGN_OR_RETURN(const JsonField heads, field.member("query_heads"));
    return heads.mismatch(fmt::format("a multiple of kv_heads, {}", model.kv_heads));
  }
  return {};
}

Status read_attention(const JsonField& root, TraceManifest& manifest) {
  KVTIER_ASSIGN_OR_RETURN(const JsonField scale, root.member("softmax_scale"));
  KVTIER_RETURN_IF_ERROR(read_positive(scale, manifest.softmax_scale));
  KVTIER_RETURN_IF_ERROR(read_optional_positive(root, "logit_cap", manifest.logit_cap));
  KVTIER_ASSIGN_OR_RETURN(const JsonField dtype, root.member("dtype"));
  KVTIER_ASSIGN_OR_RETURN(const std::string dtype_name, dtype.as_string());
  const Result<DType> parsed = parse_dtype(dtype_name);
  if (!parsed.ok()) return dtype.mismatch("one of float16, bfloat16, float32");
  manifest.dtype = *parsed;

  KVTIER_ASSIGN_OR_RETURN(const std::optional<JsonField> rope, root.optional_member("rope"));
  if (!rope) return {};
  KVTIER_RETURN_IF_ERROR(read_optional_positive(*rope, "theta", manifest.rope_theta));
  KVTIER_ASSIGN_OR_RETURN(const auto applied, rope->optional_member("applied_to_keys"));
  if (applied) {
    KVTIER_ASSIGN_OR_RETURN(manifest.rope_applied_to_keys, applied->as_bool());
  }
  return {};
}

Status read_lengths(const JsonField& root, TraceManifest& manifest) {
  KVTIER_RETURN_IF_ERROR(read_count(root, "tokens", 1, kMaxTokens, manifest.tokens));
  KVTIER_RETURN_IF_ERROR(
      read_count(root, "context_tokens", 0, manifest.tokens - 1, manifest.context_tokens));
  // Each step has a position of its own behind the context.
  KVTIER_RETURN_IF_ERROR(
      read_count(root, "steps", 1, manifest.tokens - manifest.context_tokens, manifest.steps));

  KVTIER_ASSIGN_OR_RETURN(const JsonField kept, root.member("kept_layers"));
  KVTIER_ASSIGN_OR_RETURN(const std::vector<JsonField> layers, kept.elements());
  if (layers.empty()) return kept.mismatch("at least one layer");
  for (const JsonField& layer : layers) {
    KVTIER_ASSIGN_OR_RETURN(const std::uint64_t number,
                            layer.as_count(0, manifest.model.layers - 1));
    if (!manifest.kept_layers.empty() && number <= manifest.kept_layers.back()) {
      return layer.mismatch(fmt::format("more than {}, the layer before it: ascending layers",
                                        manifest.kept_layers.back()));
    }
    manifest.kept_layers.push_back(static_cast<std::uint32_t>(number));
  }
  return {};
}

Status read_evidence(const JsonField& turn_field, std::uint32_t tokens, TraceTurn& turn) {
  KVTIER_ASSIGN_OR_RETURN(const auto evidence, turn_field.optional_member("evidence"));
  if (!evidence) return {};
  KVTIER_ASSIGN_OR_RETURN(const std::vector<JsonField> spans, evidence->elements());
  for (const JsonField& span : spans) {
    KVTIER_ASSIGN_OR_RETURN(const std::vector<JsonField> bounds, span.elements());
    if (bounds.size() != 2) return span.mismatch("[begin, end]");
    KVTIER_ASSIGN_OR_RETURN(const std::uint64_t begin, bounds[0].as_count(0, tokens - 1));
    KVTIER_ASSIGN_OR_RETURN(const std::uint64_t end, bounds[1].as_count(begin + 1, tokens));
    turn.evidence.push_back({static_cast<std::uint32_t>(begin), static_cast<std::uint32_t>(end)});
  }
  return {};
}

Result<TraceTurn> read_turn(const JsonField& field, std::uint32_t earliest, std::uint32_t tokens) {
  TraceTurn turn;
  KVTIER_RETURN_IF_ERROR(read_string(field, "question", turn.question));
  KVTIER_RETURN_IF_ERROR(read_optional_string(field, "answer", turn.answer));
  KVTIER_ASSIGN_OR_RETURN(const auto expected, field.optional_member("expected"));
  if (expected) {
    KVTIER_ASSIGN_OR_RETURN(const std::vector<JsonField> answers, expected->elements());
    for (const JsonField& answer : answers) {
      KVTIER_ASSIGN_OR_RETURN(std::string text, answer.as_string());
      turn.expected.push_back(std::move(text));
    }
  }
  KVTIER_ASSIGN_OR_RETURN(const JsonField solved, field.member("solved_by_full_attention"));
  KVTIER_ASSIGN_OR_RETURN(turn.solved_by_full_attention, solved.as_bool());
  KVTIER_RETURN_IF_ERROR(
      read_count(field, "question_start", earliest, tokens, turn.question_start));
  KVTIER_RETURN_IF_ERROR(
      read_count(field, "answer_start", turn.question_start, tokens, turn.answer_start));
  KVTIER_RETURN_IF_ERROR(read_count(field, "end", turn.answer_start, tokens, turn.end));
  KVTIER_RETURN_IF_ERROR(read_evidence(field, tokens, turn));
  return turn;
}

Status read_turns(const JsonField& root, TraceManifest& manifest) {
  KVTIER_ASSIGN_OR_RETURN(const std::optional<JsonField> turns, root.optional_member("turns"));
  if (!turns) return {};
  KVTIER_ASSIGN_OR_RETURN(const std::vector<JsonField> fields, turns->elements());
  for (const JsonField& field : fields) {
    const std::uint32_t earliest = manifest.turns.empty() ? 0 : manifest.turns.back().end;
    KVTIER_ASSIGN_OR_RETURN(TraceTurn turn, read_turn(field, earliest, manifest.tokens));
    manifest.turns.push_back(std::move(turn));
  }
  return {};
}

bool is_sha256(const std::string& text) {
  return text.size() == 64 && std::all_of(text.begin(), text.end(), [](unsigned char digit) {
           return std::isdigit(digit) || (digit >= 'a' && digit <= 'f');
         });
}

Status read_file_entry(const JsonField& files, const std::string& name, TraceManifest& manifest) {
  KVTIER_ASSIGN_OR_RETURN(const JsonField field, files.member(name));
  // Only files beside the manifest are ever opened, so a name cannot lead elsewhere.
  if (name.empty() || name.find('/') != std::string::npos || name.front() == '.') {
    return input_error(field.file(), "files", name, "plain file names beside the manifest");
  }
  TraceFileEntry entry;
  KVTIER_ASSIGN_OR_RETURN(const JsonField sha256, field.member("sha256"));
  KVTIER_ASSIGN_OR_RETURN(entry.sha256, sha256.as_string());
  if (!is_sha256(entry.sha256)) return sha256.mismatch("64 lower-case hexadecimal digits");
  KVTIER_ASSIGN_OR_RETURN(const JsonField bytes, field.member("bytes"));
  KVTIER_ASSIGN_OR_RETURN(entry.size_bytes, bytes.as_count(1, std::uint64_t{1} << 62));
  manifest.files.emplace(name, std::move(entry));
  return {};
}

Status read_files(const JsonField& root, TraceManifest& manifest) {
  KVTIER_ASSIGN_OR_RETURN(const JsonField files, root.member("files"));
  if (!files.value().is_object()) return files.mismatch("an object");
  for (const auto& item : files.value().items()) {
    KVTIER_RETURN_IF_ERROR(read_file_entry(files, item.key(), manifest));
  }
  // Asking for the fields makes a missing one fail with its name.
  KVTIER_RETURN_IF_ERROR(files.member(TraceManifest::kTokensFile).status());
  for (const std::uint32_t layer : manifest.kept_layers) {
    KVTIER_RETURN_IF_ERROR(files.member(TraceManifest::layer_file_name(layer)).status());
  }
  return {};
}

}  // namespace

std::string TraceManifest::layer_file_name(std::uint32_t layer) {
  return fmt::format("layer-{:03}.safetensors", layer);
}

Result<TraceManifest> TraceManifest::parse(std::span<const std::byte> text,
                                           const std::string& file) {
  KVTIER_ASSIGN_OR_RETURN(const nlohmann::json document, parse_json(text, file, "document"));
  const JsonField root(document, file);
  TraceManifest manifest;
  KVTIER_RETURN_IF_ERROR(check_schema(root));
  KVTIER_RETURN_IF_ERROR(read_string(root, "name", manifest.name));
  KVTIER_RETURN_IF_ERROR(read_optional_string(root, "description", manifest.description));
  KVTIER_RETURN_IF_ERROR(read_optional_string(root, "text", manifest.text));
  KVTIER_RETURN_IF_ERROR(read_optional_string(root, "recorded_with", manifest.recorded_with));
  KVTIER_RETURN_IF_ERROR(read_model(root, manifest.model));
  KVTIER_RETURN_IF_ERROR(read_attention(root, manifest));
  KVTIER_RETURN_IF_ERROR(read_lengths(root, manifest));
  KVTIER_RETURN_IF_ERROR(read_turns(root, manifest));
  KVTIER_RETURN_IF_ERROR(read_files(root, manifest));
  return manifest;
}

}  // namespace kvtier
