#include "tests/tools/make_trace.h"

#include "memory/check.h"
#include "transfer/sha256.h"

#include <stdlib.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <random>
#include <system_error>

namespace kvtier {
namespace {

namespace fs = std::filesystem;
using nlohmann::ordered_json;

constexpr std::size_t kPageBytes = 4096;

// Uniform over [-1, 1) from raw bits: the standard's distributions differ between libraries.
double uniform(std::mt19937_64& random) {
  return static_cast<double>(random() >> 11) * 0x1p-52 - 1.0;
}

const char* safetensors_name(DType dtype) {
  switch (dtype) {
    case DType::kF16: return "F16";
    case DType::kBF16: return "BF16";
    case DType::kF32: return "F32";
  }
  return "unknown";
}

TensorDraft float_tensor(std::string name, DType dtype, std::vector<std::uint64_t> shape,
                         const std::vector<double>& values) {
  TensorDraft tensor{std::move(name), safetensors_name(dtype), std::move(shape), {}};
  tensor.bytes.resize(values.size() * size_of(dtype));
  for (std::size_t i = 0; i < values.size(); ++i) {
    store_element(tensor.bytes.data(), dtype, i, static_cast<float>(values[i]));
  }
  return tensor;
}

template <typename Integer>
TensorDraft integer_tensor(std::string name, const char* dtype,
                           const std::vector<Integer>& values) {
  TensorDraft tensor{std::move(name), dtype, {values.size()}, {}};
  tensor.bytes.resize(values.size() * sizeof(Integer));
  std::memcpy(tensor.bytes.data(), values.data(), tensor.bytes.size());
  return tensor;
}

// What the file will hold after rounding to the trace's dtype: the oracle is exact for those.
std::vector<double> stored_values(const TensorDraft& tensor, DType dtype) {
  std::vector<double> values(tensor.bytes.size() / size_of(dtype));
  for (std::size_t i = 0; i < values.size(); ++i) {
    values[i] = static_cast<double>(load_element(tensor.bytes.data(), dtype, i));
  }
  return values;
}

class LayerMaker {
 public:
  LayerMaker(const MakeTraceOptions& options, const std::vector<TokenSpan>& evidence,
             std::uint32_t layer)
      : options_(options), evidence_(evidence), random_(options.seed * 1000003 + layer) {}

  std::vector<TensorDraft> make() {
    // Planted facts and the queries share a direction, so that attention finds the facts.
    for (std::uint32_t i = 0; i < options_.head_dim; ++i) direction_.push_back(uniform(random_));
    const std::uint32_t context = options_.tokens - options_.steps;
    tensors_.push_back(rows("keys", options_.tokens, options_.kv_heads, options_.head_dim, true));
    tensors_.push_back(rows("values", options_.tokens, options_.kv_heads, options_.value_dim));
    tensors_.push_back(
        rows("queries", options_.steps, options_.query_heads, options_.head_dim, true));
    std::vector<std::int64_t> positions(options_.steps);
    for (std::uint32_t s = 0; s < options_.steps; ++s) positions[s] = context + s;
    tensors_.push_back(integer_tensor("query_positions", "I64", positions));
    if (options_.prompt_queries > 0) add_prompt_queries(context);
    if (options_.with_oracle) add_oracle(context);
    if (options_.with_sink_logits) {
      std::vector<double> sinks(options_.query_heads);
      for (double& sink : sinks) sink = uniform(random_);
      tensors_.push_back(float_tensor("sink_logits", DType::kF32, {options_.query_heads}, sinks));
    }
    return std::move(tensors_);
  }

 private:
  bool is_evidence(std::uint32_t token) const {
    return std::any_of(evidence_.begin(), evidence_.end(), [&](const TokenSpan& span) {
      return token >= span.begin && token < span.end;
    });
  }

  TensorDraft rows(const char* name, std::uint32_t count, std::uint32_t heads, std::uint32_t dim,
                   bool directed = false) {
    const bool all = std::string_view(name) == "queries";
    std::vector<double> values;
    for (std::uint32_t row = 0; row < count; ++row) {
      const double pull = directed && (all || is_evidence(row)) ? 2.0 : 0.0;
      for (std::uint32_t head = 0; head < heads; ++head) {
        for (std::uint32_t i = 0; i < dim; ++i) {
          const double toward = pull == 0.0 ? 0.0 : pull * direction_[i];
          values.push_back(uniform(random_) + toward);
        }
      }
    }
    return float_tensor(name, options_.dtype, {count, heads, dim}, values);
  }

  void add_prompt_queries(std::uint32_t context) {
    const std::uint32_t count = std::min(options_.prompt_queries, context);
    tensors_.push_back(rows("prompt_queries", count, options_.query_heads, options_.head_dim));
    std::vector<std::int64_t> positions(count);
    for (std::uint32_t i = 0; i < count; ++i) positions[i] = std::int64_t{i} * context / count;
    tensors_.push_back(integer_tensor("prompt_query_positions", "I64", positions));
  }

  void add_oracle(std::uint32_t context) {
    const std::vector<double> keys = stored_values(tensors_[0], options_.dtype);
    const std::vector<double> values = stored_values(tensors_[1], options_.dtype);
    const std::vector<double> queries = stored_values(tensors_[2], options_.dtype);
    std::vector<double> out;
    std::vector<double> lse;
    const std::uint32_t group = options_.query_heads / options_.kv_heads;
    for (std::uint32_t step = 0; step < options_.steps; ++step) {
      for (std::uint32_t head = 0; head < options_.query_heads; ++head) {
        const double* query =
            &queries[(std::size_t{step} * options_.query_heads + head) * options_.head_dim];
        attend(query, keys, values, context + step + 1, head / group, out, lse);
      }
    }
    tensors_.push_back(float_tensor(
        "out", DType::kF32, {options_.steps, options_.query_heads, options_.value_dim}, out));
    tensors_.push_back(
        float_tensor("lse", DType::kF32, {options_.steps, options_.query_heads}, lse));
  }

  // Two obvious passes: logits first, then weights relative to the largest.
  void attend(const double* query, const std::vector<double>& keys,
              const std::vector<double>& values, std::uint32_t visible, std::uint32_t kv_head,
              std::vector<double>& out, std::vector<double>& lse) const {
    const double scale = 1.0 / std::sqrt(static_cast<double>(options_.head_dim));
    std::vector<double> logits(visible);
    for (std::uint32_t token = 0; token < visible; ++token) {
      const std::size_t row = std::size_t{token} * options_.kv_heads + kv_head;
      double dot = 0;
      for (std::uint32_t i = 0; i < options_.head_dim; ++i) {
        dot += query[i] * keys[row * options_.head_dim + i];
      }
      logits[token] = dot * scale;
      if (options_.logit_cap > 0) {
        logits[token] = options_.logit_cap * std::tanh(logits[token] / options_.logit_cap);
      }
    }
    const double largest = *std::max_element(logits.begin(), logits.end());
    double sum = 0;
    std::vector<double> mean(options_.value_dim, 0.0);
    for (std::uint32_t token = 0; token < visible; ++token) {
      const std::size_t row = std::size_t{token} * options_.kv_heads + kv_head;
      const double weight = std::exp(logits[token] - largest);
      sum += weight;
      for (std::uint32_t i = 0; i < options_.value_dim; ++i) {
        mean[i] += weight * values[row * options_.value_dim + i];
      }
    }
    for (const double part : mean) out.push_back(part / sum);
    lse.push_back(largest + std::log(sum));
  }

  const MakeTraceOptions& options_;
  const std::vector<TokenSpan>& evidence_;
  std::mt19937_64 random_;
  std::vector<double> direction_;
  std::vector<TensorDraft> tensors_;
};

ordered_json make_turns(const MakeTraceOptions& options, const std::vector<TokenSpan>& evidence) {
  ordered_json turns = ordered_json::array();
  const std::uint32_t context = options.tokens - options.steps;
  const auto count = static_cast<std::uint32_t>(evidence.size());
  for (std::uint32_t i = 0; i < count; ++i) {
    const std::uint32_t start = context + options.steps * i / count;
    const std::uint32_t end = context + options.steps * (i + 1) / count;
    turns.push_back(
        {{"question", fmt::format("What is fact {}?", i)},
         {"answer", fmt::format("It is {}.", i)},
         {"expected", std::vector{fmt::format("{}", i)}},
         {"solved_by_full_attention", i == 0},
         {"question_start", start},
         {"answer_start", start + (end - start) / 2},
         {"end", end},
         {"evidence",
          ordered_json::array({ordered_json::array({evidence[i].begin, evidence[i].end})})}});
  }
  return turns;
}

ordered_json make_manifest(const MakeTraceOptions& options,
                           const std::vector<TokenSpan>& evidence) {
  ordered_json manifest = {
      {"schema", TraceManifest::kSchema},
      {"version", TraceManifest::kVersion},
      {"name", options.name},
      {"description", "Random keys with planted facts"},
      {"model",
       {{"name", "generated"},
        {"layers", options.model_layers},
        {"query_heads", options.query_heads},
        {"kv_heads", options.kv_heads},
        {"head_dim", options.head_dim},
        {"value_dim", options.value_dim},
        {"vocab_size", 1000}}},
      {"rope", {{"theta", 10000.0}, {"applied_to_keys", true}}},
      {"softmax_scale", 1.0 / std::sqrt(static_cast<double>(options.head_dim))},
      {"dtype", to_string(options.dtype)},
      {"tokens", options.tokens},
      {"context_tokens", options.tokens - options.steps},
      {"steps", options.steps},
      {"kept_layers", options.kept_layers},
      {"turns", make_turns(options, evidence)}};
  if (options.logit_cap > 0) manifest["logit_cap"] = options.logit_cap;
  return manifest;
}

std::vector<TensorDraft> make_tokens(const MakeTraceOptions& options) {
  std::vector<std::int32_t> ids(options.tokens);
  std::vector<std::int32_t> ends;
  for (std::uint32_t token = 0; token < options.tokens; ++token) {
    ids[token] = static_cast<std::int32_t>(token * 37 % 1000);
    if ((token + 1) % 8 == 0) ends.push_back(static_cast<std::int32_t>(token + 1));
  }
  return {integer_tensor("token_ids", "I32", ids), integer_tensor("sentence_ends", "I32", ends)};
}

std::vector<std::byte> encode(const std::vector<TensorDraft>& tensors, std::size_t misalign_bytes) {
  ordered_json header = ordered_json::object();
  std::size_t offset = 0;
  for (const TensorDraft& tensor : tensors) {
    header[tensor.name] = {{"dtype", tensor.dtype},
                           {"shape", tensor.shape},
                           {"data_offsets", {offset, offset + tensor.bytes.size()}}};
    offset += tensor.bytes.size();
  }
  std::string text = header.dump();
  const std::size_t start =
      (sizeof(std::uint64_t) + text.size() + kPageBytes - 1) / kPageBytes * kPageBytes +
      misalign_bytes;
  text.resize(start - sizeof(std::uint64_t), ' ');
  const std::uint64_t length = text.size();
  std::vector<std::byte> bytes(start);
  std::memcpy(bytes.data(), &length, sizeof(length));
  std::memcpy(bytes.data() + sizeof(length), text.data(), text.size());
  for (const TensorDraft& tensor : tensors) {
    bytes.insert(bytes.end(), tensor.bytes.begin(), tensor.bytes.end());
  }
  return bytes;
}

}  // namespace

TensorDraft& TraceDraft::tensor(const std::string& file, const std::string& name) {
  for (TensorDraft& candidate : files.at(file)) {
    if (candidate.name == name) return candidate;
  }
  KVTIER_CHECK(false, "no tensor {} in {}", name, file);
  std::abort();
}

TraceDraft make_trace(const MakeTraceOptions& options) {
  KVTIER_CHECK(options.steps > 0 && options.steps < options.tokens, "{} steps in {} tokens",
               options.steps, options.tokens);
  const std::uint32_t context = options.tokens - options.steps;
  std::vector<TokenSpan> evidence = options.evidence;
  if (evidence.empty()) {
    evidence.push_back({context / 4, context / 4 + 2});
    if (options.steps > 1) evidence.push_back({context / 2, context / 2 + 3});
  }
  TraceDraft draft;
  draft.misalign_bytes = options.misalign_bytes;
  draft.manifest = make_manifest(options, evidence);
  for (const std::uint32_t layer : options.kept_layers) {
    draft.files[TraceManifest::layer_file_name(layer)] =
        LayerMaker(options, evidence, layer).make();
  }
  draft.files[std::string(TraceManifest::kTokensFile)] = make_tokens(options);
  return draft;
}

void write_trace(const TraceDraft& draft, const fs::path& folder) {
  fs::create_directories(folder);
  ordered_json manifest = draft.manifest;
  for (const auto& [name, tensors] : draft.files) {
    write_bytes(folder / name, encode(tensors, draft.misalign_bytes));
    // A damaged manifest may name other files; those that are written get their entry.
    manifest["files"][name] = ordered_json::object();
  }
  std::ofstream(folder / "manifest.json") << manifest.dump(1) << "\n";
  reseal_trace(folder);
}

void reseal_trace(const fs::path& folder) {
  ordered_json manifest;
  std::ifstream(folder / "manifest.json") >> manifest;
  for (auto& [name, entry] : manifest["files"].items()) {
    const std::vector<std::byte> bytes = read_bytes(folder / name);
    entry = {{"sha256", sha256_hex(bytes)}, {"bytes", bytes.size()}};
  }
  std::ofstream(folder / "manifest.json") << manifest.dump(1) << "\n";
}

std::vector<std::byte> read_bytes(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  KVTIER_CHECK(file.good(), "cannot read {}", path.string());
  const std::string text{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  std::vector<std::byte> bytes(text.size());
  std::memcpy(bytes.data(), text.data(), text.size());
  return bytes;
}

void write_bytes(const fs::path& path, const std::vector<std::byte>& bytes) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file.write(reinterpret_cast<const char*>(bytes.data()),
             static_cast<std::streamsize>(bytes.size()));
  KVTIER_CHECK(file.flush().good(), "cannot write {}", path.string());
}

ScratchFolder::ScratchFolder() {
  std::string name = (fs::temp_directory_path() / "kvtier-test-XXXXXX").string();
  KVTIER_CHECK(::mkdtemp(name.data()) != nullptr, "cannot create {}", name);
  path_ = name;
}

ScratchFolder::~ScratchFolder() {
  std::error_code ignored;  // What cannot be removed is the temporary folder's problem.
  fs::remove_all(path_, ignored);
}

}  // namespace kvtier
