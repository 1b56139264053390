#pragma once

#include "memory/status.h"
#include "tools/trace/safetensors.h"
#include "tools/trace/trace_layer.h"
#include "tools/trace/trace_manifest.h"

#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace kvtier {

struct AttentionTraceOptions {
  /// Compare every file with its SHA-256 in the manifest.
  bool verify_sha256 = true;
  /// Model layers to read; empty is all that were kept. The files of others are not touched.
  std::vector<std::uint32_t> only_layers = {};
  /// Also open a trace whose keys were recorded before rotation: nothing here can attend to those.
  bool accept_unrotated_keys = false;
};

/// A recorded attention trace: a folder with `manifest.json`, one safetensors file per layer and
/// `tokens.safetensors`.
///
/// Opening validates everything, so that whoever holds a trace indexes it without checks: the
/// manifest against itself, each file against its length and SHA-256 in the manifest, each tensor
/// against type and shape, each number for being finite, each position for order and range. It
/// reads every byte once and keeps the files mapped. Failures are one line, "FILE: FIELD: found X,
/// expected Y".
///
/// Immutable and safe to share between threads. Move-only; views stay valid when it moves.
class AttentionTrace {
 public:
  /// `path` is the folder or its manifest. Fails with `not_found`, `io_error`, `no_space` (memory),
  /// `corrupt` for bad content, `unsupported` for unrotated keys, `invalid_argument` for a layer of
  /// `only_layers` that the trace does not have.
  static Result<AttentionTrace> open(const std::string& path,
                                     const AttentionTraceOptions& options = {});

  const TraceManifest& manifest() const { return manifest_; }
  /// The manifest's path; the other files lie beside it.
  const std::string& manifest_path() const { return manifest_path_; }
  /// "sha256:<64 digits>" of the manifest, which holds the hashes of all other files.
  const std::string& digest() const { return digest_; }

  /// Layers that were read, ascending by number.
  const std::vector<TraceLayer>& layers() const { return layers_; }
  /// The file of `layers()[index]`.
  const SafetensorsFile& layer_file(std::size_t index) const { return files_[index]; }
  const SafetensorsFile& tokens_file() const { return files_.back(); }

  /// Position of each step's query, ascending, none before `context_tokens`. A step attends to
  /// every position up to and including its own.
  const std::vector<std::uint32_t>& query_positions() const { return query_positions_; }
  /// [tokens]
  const std::vector<std::uint32_t>& token_ids() const { return token_ids_; }
  /// Ends (exclusive) of sentences, ascending; empty when not recorded.
  const std::vector<std::uint32_t>& sentence_ends() const { return sentence_ends_; }

  /// The turn that position lies in, or null.
  const TraceTurn* turn_at(std::uint32_t position) const;
  /// Keys and values of the layers that were read, without padding.
  std::uint64_t kv_bytes() const;

 private:
  AttentionTrace() = default;
  Status choose_layers(const AttentionTraceOptions& options, std::vector<std::uint32_t>& chosen);
  Status add_file(const std::string& name, const AttentionTraceOptions& options);
  Status read_layer(std::uint32_t number);
  Status read_tokens();

  TraceManifest manifest_;
  std::string manifest_path_;
  std::string digest_;
  /// One per layer, then the tokens.
  std::vector<SafetensorsFile> files_;
  std::vector<TraceLayer> layers_;
  std::vector<std::uint32_t> query_positions_;
  std::vector<std::uint32_t> token_ids_;
  std::vector<std::uint32_t> sentence_ends_;
};

}  // namespace kvtier
