#include "tools/cli/inspect_report.h"

#include "tools/cli/parse.h"
#include "tools/trace/json_document.h"

#include <fmt/ranges.h>

namespace kvtier {
namespace {

using nlohmann::ordered_json;

constexpr std::size_t kLineCharacters = 100;

void add_line(std::string& table, std::string_view label, const std::string& text) {
  if (!text.empty()) table += fmt::format("  {:<14} {}\n", label, text);
}

std::string model_line(const TraceModel& model) {
  std::string origin = printable(model.name);
  for (const std::string& detail : {model.architecture, model.license}) {
    if (!detail.empty()) origin += ", " + printable(detail);
  }
  return fmt::format("{}\n{:17}{} layers, {} query heads, {} KV heads, head dim {}, value dim {}",
                     origin, "", model.layers, model.query_heads, model.kv_heads, model.head_dim,
                     model.value_dim);
}

std::string attention_line(const TraceManifest& manifest) {
  std::string line = fmt::format("softmax scale {}", manifest.softmax_scale);
  if (manifest.logit_cap > 0) line += fmt::format(", logits capped at {}", manifest.logit_cap);
  if (manifest.rope_theta > 0) line += fmt::format(", rope theta {}", manifest.rope_theta);
  line += manifest.rope_applied_to_keys ? ", keys after rope" : ", keys BEFORE rope (no replay)";
  return line;
}

std::string turns_table(const AttentionTrace& trace) {
  std::string table = "\nturns\n";
  if (trace.manifest().turns.empty()) return "\nturns: none recorded\n";
  std::size_t number = 0;
  for (const TraceTurn& turn : trace.manifest().turns) {
    std::string evidence;
    for (const TokenSpan& span : turn.evidence) {
      evidence += fmt::format("{}[{}, {})", evidence.empty() ? "" : " ", span.begin, span.end);
    }
    table += fmt::format("  {:>2}  {}\n", ++number, printable(turn.question, kLineCharacters));
    table += fmt::format("      expected {}; {} by full attention; tokens {} to {}; evidence {}\n",
                         turn.expected.empty()
                             ? "nothing in particular"
                             : printable(fmt::format("{}", fmt::join(turn.expected, ", "))),
                         turn.solved_by_full_attention ? "solved" : "not solved",
                         turn.question_start, turn.end, evidence.empty() ? "none" : evidence);
  }
  return table;
}

std::string layers_table(const AttentionTrace& trace) {
  std::string table = fmt::format("\n  {:<7} {:<24} {:<5} {:<18} {:>12}\n", "layer", "tensor",
                                  "type", "shape", "bytes");
  const auto add_file = [&table](const std::string& label, const SafetensorsFile& file) {
    for (const TensorView& tensor : file.tensors()) {
      table +=
          fmt::format("  {:<7} {:<24} {:<5} {:<18} {:>12}\n", label, printable(tensor.name, 24),
                      tensor.dtype, to_string(tensor.shape), tensor.bytes.size());
    }
    if (file.copied_bytes() > 0) {
      table += fmt::format("  {:<7} misaligned: {} were copied on reading\n", label,
                           format_bytes(file.copied_bytes()));
    }
  };
  for (std::size_t i = 0; i < trace.layers().size(); ++i) {
    add_file(fmt::format("{}", trace.layers()[i].number), trace.layer_file(i));
  }
  add_file("tokens", trace.tokens_file());
  return table;
}

ordered_json spans_json(const std::vector<TokenSpan>& spans) {
  ordered_json json = ordered_json::array();
  for (const TokenSpan& span : spans) json.push_back({span.begin, span.end});
  return json;
}

ordered_json tensors_json(const SafetensorsFile& file) {
  ordered_json json = ordered_json::array();
  for (const TensorView& tensor : file.tensors()) {
    json.push_back({{"name", tensor.name},
                    {"dtype", tensor.dtype},
                    {"shape", tensor.shape},
                    {"bytes", tensor.bytes.size()}});
  }
  return json;
}

ordered_json turns_json(const TraceManifest& manifest) {
  ordered_json json = ordered_json::array();
  for (const TraceTurn& turn : manifest.turns) {
    json.push_back({{"question", turn.question},
                    {"expected", turn.expected},
                    {"solved_by_full_attention", turn.solved_by_full_attention},
                    {"question_start", turn.question_start},
                    {"answer_start", turn.answer_start},
                    {"end", turn.end},
                    {"evidence", spans_json(turn.evidence)}});
  }
  return json;
}

std::string percent(const std::optional<double>& share) {
  return share ? fmt::format("{:.1f}%", *share * 100) : "-";
}

}  // namespace

std::string trace_table(const AttentionTrace& trace) {
  const TraceManifest& manifest = trace.manifest();
  const std::vector<std::uint32_t>& positions = trace.query_positions();
  std::string table = fmt::format("attention trace {}\n", printable(manifest.name));
  add_line(table, "description", printable(manifest.description));
  add_line(table, "model", model_line(manifest.model));
  add_line(table, "weights", printable(manifest.model.weights));
  add_line(table, "text", printable(manifest.text));
  add_line(table, "recorded with", printable(manifest.recorded_with));
  add_line(table, "attention", attention_line(manifest));
  add_line(table, "tokens",
           fmt::format("{}, of which {} are context; {} sentences", manifest.tokens,
                       manifest.context_tokens, trace.sentence_ends().size()));
  add_line(table, "steps",
           fmt::format("{}, at positions {} to {}", manifest.steps, positions.front(),
                       positions.back()));
  add_line(table, "layers", fmt::format("{}", fmt::join(manifest.kept_layers, ", ")));
  add_line(table, "KV",
           fmt::format("{} ({} bytes) of {} in these layers", format_bytes(trace.kv_bytes()),
                       trace.kv_bytes(), to_string(manifest.dtype)));
  add_line(table, "digest", trace.digest());
  table += turns_table(trace);
  table += layers_table(trace);
  table += "\nsound: lengths, SHA-256, types, shapes, positions and every number were checked\n";
  return table;
}

ordered_json trace_json(const AttentionTrace& trace) {
  const TraceManifest& manifest = trace.manifest();
  const TraceModel& model = manifest.model;
  ordered_json layers = ordered_json::array();
  for (std::size_t i = 0; i < trace.layers().size(); ++i) {
    layers.push_back({{"layer", trace.layers()[i].number},
                      {"copied_bytes", trace.layer_file(i).copied_bytes()},
                      {"tensors", tensors_json(trace.layer_file(i))}});
  }
  return {{"name", manifest.name},
          {"description", manifest.description},
          {"model",
           {{"name", model.name},
            {"license", model.license},
            {"architecture", model.architecture},
            {"weights", model.weights},
            {"layers", model.layers},
            {"query_heads", model.query_heads},
            {"kv_heads", model.kv_heads},
            {"head_dim", model.head_dim},
            {"value_dim", model.value_dim}}},
          {"text", manifest.text},
          {"recorded_with", manifest.recorded_with},
          {"softmax_scale", manifest.softmax_scale},
          {"logit_cap", manifest.logit_cap},
          {"rope_theta", manifest.rope_theta},
          {"rope_applied_to_keys", manifest.rope_applied_to_keys},
          {"dtype", to_string(manifest.dtype)},
          {"tokens", manifest.tokens},
          {"context_tokens", manifest.context_tokens},
          {"steps", manifest.steps},
          {"first_position", trace.query_positions().front()},
          {"last_position", trace.query_positions().back()},
          {"sentences", trace.sentence_ends().size()},
          {"kv_bytes", trace.kv_bytes()},
          {"kept_layers", manifest.kept_layers},
          {"turns", turns_json(manifest)},
          {"layers", std::move(layers)},
          {"token_tensors", tensors_json(trace.tokens_file())}};
}

std::string replay_result_table(const ReplayResultSummary& result) {
  std::string table = fmt::format("replay result with {} run{}\n\n", result.runs.size(),
                                  result.runs.size() == 1 ? "" : "s");
  table += fmt::format("  {:<28} {:>8} {:>8} {:>10} {:>12} {:>9} {:>10} {:>7} {:>6}\n", "selector",
                       "budget", "recall", "of oracle", "error max", "verified", "mismatched",
                       "failed", "layers");
  for (const ReplayRunSummary& run : result.runs) {
    table += fmt::format("  {:<28} {:>8} {:>8} {:>10} {:>12} {:>9} {:>10} {:>7} {:>6}\n",
                         printable(run.selector, 28), printable(run.budget, 8),
                         percent(run.recall_mean), percent(run.recall_ratio),
                         run.output_error_max ? fmt::format("{:.3g}", *run.output_error_max) : "-",
                         run.blocks_verified, run.blocks_mismatched, run.blocks_failed, run.layers);
  }
  table += "\nsound: every field of every run is there and in range, no tier over its capacity\n";
  return table;
}

ordered_json replay_result_json(const ReplayResultSummary& result) {
  const auto number = [](const std::optional<double>& value) {
    return value ? ordered_json(*value) : ordered_json();
  };
  ordered_json runs = ordered_json::array();
  for (const ReplayRunSummary& run : result.runs) {
    runs.push_back({{"selector", run.selector},
                    {"budget", run.budget},
                    {"recall_mean", number(run.recall_mean)},
                    {"recall_ratio", number(run.recall_ratio)},
                    {"output_error_max", number(run.output_error_max)},
                    {"blocks_verified", run.blocks_verified},
                    {"blocks_mismatched", run.blocks_mismatched},
                    {"blocks_failed", run.blocks_failed},
                    {"layers", run.layers}});
  }
  ordered_json json;
  json["runs"] = std::move(runs);
  return json;
}

}  // namespace kvtier
