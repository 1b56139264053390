#include "tools/trace/attention_trace.h"

#include "tools/trace/json_document.h"
#include "tools/trace/mapped_file.h"
#include "transfer/sha256.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <filesystem>
#include <limits>
#include <system_error>
#include <utility>

namespace kvtier {
namespace {

constexpr std::string_view kManifestName = "manifest.json";

std::string locate_manifest(const std::string& path) {
  std::error_code ignored;  // What cannot be looked at fails when it is opened.
  if (!std::filesystem::is_directory(path, ignored)) return path;
  return (std::filesystem::path(path) / kManifestName).string();
}

}  // namespace

Result<AttentionTrace> AttentionTrace::open(const std::string& path,
                                            const AttentionTraceOptions& options) {
  AttentionTrace trace;
  trace.manifest_path_ = locate_manifest(path);
  KVTIER_ASSIGN_OR_RETURN(const MappedFile manifest, MappedFile::open(trace.manifest_path_));
  KVTIER_ASSIGN_OR_RETURN(trace.manifest_,
                          TraceManifest::parse(manifest.bytes(), trace.manifest_path_));
  trace.digest_ = "sha256:" + sha256_hex(manifest.bytes());
  if (!trace.manifest_.rope_applied_to_keys && !options.accept_unrotated_keys) {
    const Status line = input_error(trace.manifest_path_, "rope.applied_to_keys", "false", "true",
                                    "record keys and queries as the model attends them");
    return unsupported(line.message());
  }
  std::vector<std::uint32_t> chosen;
  KVTIER_RETURN_IF_ERROR(trace.choose_layers(options, chosen));
  for (const std::uint32_t layer : chosen) {
    KVTIER_RETURN_IF_ERROR(trace.add_file(TraceManifest::layer_file_name(layer), options));
    KVTIER_RETURN_IF_ERROR(trace.read_layer(layer));
  }
  KVTIER_RETURN_IF_ERROR(trace.add_file(std::string(TraceManifest::kTokensFile), options));
  KVTIER_RETURN_IF_ERROR(trace.read_tokens());
  return trace;
}

const TraceTurn* AttentionTrace::turn_at(std::uint32_t position) const {
  for (const TraceTurn& turn : manifest_.turns) {
    if (position >= turn.question_start && position < turn.end) return &turn;
  }
  return nullptr;
}

std::uint64_t AttentionTrace::kv_bytes() const {
  std::uint64_t bytes = 0;
  for (const TraceLayer& layer : layers_) bytes += layer.keys.size() + layer.values.size();
  return bytes;
}

Status AttentionTrace::choose_layers(const AttentionTraceOptions& options,
                                     std::vector<std::uint32_t>& chosen) {
  const std::vector<std::uint32_t>& kept = manifest_.kept_layers;
  for (const std::uint32_t layer : options.only_layers) {
    if (std::find(kept.begin(), kept.end(), layer) != kept.end()) continue;
    const Status line =
        input_error(manifest_path_, "kept_layers", fmt::format("no layer {}", layer),
                    fmt::format("layers out of {}", fmt::join(kept, ", ")));
    return invalid_argument(line.message());
  }
  for (const std::uint32_t layer : kept) {
    const auto& only = options.only_layers;
    if (only.empty() || std::find(only.begin(), only.end(), layer) != only.end()) {
      chosen.push_back(layer);
    }
  }
  return {};
}

// Length and hash come before structure: there is no use in explaining bytes that are not the ones
// that were recorded.
Status AttentionTrace::add_file(const std::string& name, const AttentionTraceOptions& options) {
  const std::string path = (std::filesystem::path(manifest_path_).parent_path() / name).string();
  const TraceFileEntry& entry = manifest_.files.at(name);
  KVTIER_ASSIGN_OR_RETURN(MappedFile file, MappedFile::open(path));
  if (file.bytes().size() != entry.size_bytes) {
    return input_error(path, "size", fmt::format("{} bytes", file.bytes().size()),
                       fmt::format("{}, as the manifest says", entry.size_bytes),
                       "copy the trace again");
  }
  if (options.verify_sha256) {
    const std::string found = sha256_hex(file.bytes());
    if (found != entry.sha256) {
      return input_error(path, "sha256", found, entry.sha256, "copy the trace again");
    }
  }
  KVTIER_ASSIGN_OR_RETURN(SafetensorsFile tensors, SafetensorsFile::open(std::move(file)));
  files_.push_back(std::move(tensors));
  return {};
}

Status AttentionTrace::read_layer(std::uint32_t number) {
  const SafetensorsFile& file = files_.back();
  KVTIER_ASSIGN_OR_RETURN(TraceLayerReading reading, read_trace_layer(file, manifest_, number));
  if (layers_.empty()) query_positions_ = reading.query_positions;
  const auto differs = std::mismatch(query_positions_.begin(), query_positions_.end(),
                                     reading.query_positions.begin());
  if (differs.first != query_positions_.end()) {
    return input_error(file.path(),
                       fmt::format("query_positions[{}]", differs.first - query_positions_.begin()),
                       fmt::format("{}", *differs.second),
                       fmt::format("{}, as in layer {}", *differs.first, layers_.front().number));
  }
  layers_.push_back(std::move(reading.layer));
  return {};
}

Status AttentionTrace::read_tokens() {
  const SafetensorsFile& file = files_.back();
  const std::int64_t vocab = manifest_.model.vocab_size;
  const std::int64_t largest = vocab > 0 ? vocab - 1 : std::numeric_limits<std::int32_t>::max();
  KVTIER_ASSIGN_OR_RETURN(token_ids_, read_integers(file, "token_ids", manifest_.tokens,
                                                    {.least = 0, .most = largest}));
  if (file.find("sentence_ends") == nullptr) return {};
  KVTIER_ASSIGN_OR_RETURN(sentence_ends_,
                          read_integers(file, "sentence_ends", std::nullopt,
                                        {.least = 1, .most = manifest_.tokens, .ascending = true}));
  return {};
}

}  // namespace kvtier
