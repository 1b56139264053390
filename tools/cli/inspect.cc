// kvtier inspect: what a file holds, and whether it is sound.

#include "tools/cli/inspect_report.h"
#include "tools/cli/replay_result.h"
#include "tools/cli/verbs.h"
#include "tools/trace/attention_trace.h"
#include "tools/trace/json_document.h"
#include "tools/trace/mapped_file.h"
#include "transfer/sha256.h"

#include <CLI/CLI.hpp>

#include <filesystem>
#include <memory>

namespace kvtier {
namespace {

using nlohmann::ordered_json;

constexpr std::string_view kKnownKinds =
    "an attention trace (a folder with manifest.json, or that file) or a replay result (JSON with "
    "schema kvtier.replay-result)";

struct InspectOptions {
  std::string path;
  std::string format = "table";
};

struct Inspection {
  std::string kind;
  std::string digest;
  std::string table;
  ordered_json json;
};

Result<Inspection> inspect_trace(const std::string& path) {
  KVTIER_ASSIGN_OR_RETURN(const AttentionTrace trace,
                          AttentionTrace::open(path, {.accept_unrotated_keys = true}));
  return Inspection{"attention_trace", trace.digest(), trace_table(trace), trace_json(trace)};
}

Result<Inspection> inspect_path(const std::string& path) {
  namespace fs = std::filesystem;
  std::error_code ignored;  // What cannot be looked at fails when it is opened.
  if (fs::is_directory(path, ignored)) {
    if (fs::exists(fs::path(path) / "manifest.json", ignored)) return inspect_trace(path);
    return input_error(path, "manifest.json", "a folder without it", kKnownKinds);
  }
  KVTIER_ASSIGN_OR_RETURN(const MappedFile file, MappedFile::open(path));
  // Looking at the first character spares a scan of a large binary file, and its message says more.
  const std::span<const std::byte> bytes = file.bytes();
  if (bytes.empty() || std::string_view(" \t\r\n{").find(static_cast<char>(bytes.front())) ==
                           std::string_view::npos) {
    const bool is_layer = fs::path(path).extension() == ".safetensors";
    return input_error(path, "content", bytes.empty() ? "an empty file" : "no JSON object",
                       kKnownKinds, is_layer ? "for a trace's layer, name its folder" : "");
  }
  KVTIER_ASSIGN_OR_RETURN(const nlohmann::json document, parse_json(bytes, path, "content"));
  const JsonField root(document, path);
  KVTIER_ASSIGN_OR_RETURN(const std::optional<JsonField> schema, root.optional_member("schema"));
  if (schema && schema->value() == nlohmann::json(TraceManifest::kSchema))
    return inspect_trace(path);
  if (schema && schema->value() == nlohmann::json(ReplayResultSummary::kSchema)) {
    KVTIER_ASSIGN_OR_RETURN(const ReplayResultSummary result,
                            ReplayResultSummary::check(document, path));
    return Inspection{"replay_result", "sha256:" + sha256_hex(bytes), replay_result_table(result),
                      replay_result_json(result)};
  }
  return schema ? schema->mismatch(kKnownKinds)
                : input_error(path, "schema", "nothing", kKnownKinds);
}

ExitCode run_inspect(const InspectOptions& options) {
  const Result<Inspection> inspection = inspect_path(options.path);
  // What this machine cannot do (memory) says nothing about the input.
  const bool machine_failed =
      !inspection.ok() && inspection.status().code() == StatusCode::kNoSpace;
  const ExitCode code = inspection.ok()  ? ExitCode::kDone
                        : machine_failed ? ExitCode::kFailed
                                         : ExitCode::kBadInput;
  if (!inspection.ok()) fail(code, inspection.status());
  if (options.format == "table") {
    return inspection.ok() ? print_result(inspection->table, code) : code;
  }
  ordered_json json = {{"schema", "kvtier.inspect-result"},
                       {"version", 1},
                       {"options", {{"path", options.path}, {"format", options.format}}},
                       {"digest", nullptr},
                       {"kind", nullptr},
                       {"sound", inspection.ok()},
                       {"error", nullptr}};
  if (inspection.ok()) {
    json["digest"] = inspection->digest;
    json["kind"] = inspection->kind;
    json[inspection->kind] = inspection->json;
  } else {
    json["error"] = inspection.status().message();
  }
  return print_result(json.dump(2, ' ', false, ordered_json::error_handler_t::replace) + "\n",
                      code);
}

}  // namespace

void add_inspect(CLI::App& app, ExitCode& exit_code) {
  auto options = std::make_shared<InspectOptions>();
  CLI::App* verb = app.add_subcommand("inspect", "Say what a file holds and whether it is sound");
  verb->add_option("PATH", options->path,
                   "Attention trace (folder or manifest.json) or replay result")
      ->required()
      ->type_name("");
  verb->add_option("--format", options->format, "table or json (default: table)")
      ->check(CLI::IsMember({"table", "json"}))
      ->type_name("");
  verb->footer(
      "Every byte is read: lengths, SHA-256, types, shapes, positions and numbers.\n"
      "Exit codes: 0 sound, 3 not sound (one line says which file, field, found, expected).\n\n"
      "Examples:\n"
      "  kvtier inspect tests/traces/smollm2-8k-demo\n"
      "  kvtier inspect result.json --format json");
  verb->callback([options, &exit_code] { exit_code = run_inspect(*options); });
}

}  // namespace kvtier
