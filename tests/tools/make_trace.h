#pragma once

#include "memory/dtype.h"
#include "tools/trace/trace_manifest.h"

#include <nlohmann/json.hpp>

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

namespace kvtier {

/// What a generated trace looks like. The defaults are small enough to attend by hand.
struct MakeTraceOptions {
  std::string name = "generated";
  std::uint32_t tokens = 40;
  std::uint32_t steps = 6;  ///< At the last positions.
  std::uint32_t query_heads = 4;
  std::uint32_t kv_heads = 2;
  std::uint32_t head_dim = 8;
  std::uint32_t value_dim = 8;
  std::uint32_t model_layers = 4;
  std::vector<std::uint32_t> kept_layers = {1, 3};
  DType dtype = DType::kF16;
  std::uint64_t seed = 1;
  double logit_cap = 0;
  std::uint32_t prompt_queries = 5;  ///< 0: not recorded.
  bool with_oracle = true;           ///< `out` and `lse`, attention in float64.
  bool with_sink_logits = false;
  /// Each turn takes an equal part of the steps. Empty: the generator plants two facts, one
  /// question per half of the steps.
  std::vector<TokenSpan> evidence = {};
  /// Tensor data starts at the next multiple of 4 KiB plus this: 0 is as we write it, 1 misaligns
  /// all.
  std::size_t misalign_bytes = 0;
};

/// A tensor as it will be written.
struct TensorDraft {
  std::string name;
  std::string dtype;
  std::vector<std::uint64_t> shape;
  std::vector<std::byte> bytes;
};

/// A sound trace in memory, to be damaged and then written. Same options, same bytes.
struct TraceDraft {
  nlohmann::ordered_json manifest;
  /// By file name, in the order in which they lie in the file.
  std::map<std::string, std::vector<TensorDraft>> files;
  std::size_t misalign_bytes = 0;

  TensorDraft& tensor(const std::string& file, const std::string& name);
};

TraceDraft make_trace(const MakeTraceOptions& options);

/// Writes the files and a manifest with their sizes and SHA-256 into `folder`, which is created.
void write_trace(const TraceDraft& draft, const std::filesystem::path& folder);

/// Sets every size and SHA-256 of a written manifest to what its files hold now, so that later
/// checks are reached.
void reseal_trace(const std::filesystem::path& folder);

std::vector<std::byte> read_bytes(const std::filesystem::path& path);
void write_bytes(const std::filesystem::path& path, const std::vector<std::byte>& bytes);

/// A folder of its own under the temporary one, removed with everything in it.
class ScratchFolder {
 public:
  ScratchFolder();
  ~ScratchFolder();
  ScratchFolder(const ScratchFolder&) = delete;
  ScratchFolder& operator=(const ScratchFolder&) = delete;

  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

}  // namespace kvtier
