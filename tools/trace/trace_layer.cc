#include "tools/trace/trace_layer.h"

#include "tools/trace/json_document.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace kvtier {
namespace {

std::string_view safetensors_name(DType dtype) {
  switch (dtype) {
    case DType::kF16: return "F16";
    case DType::kBF16: return "BF16";
    case DType::kF32: return "F32";
  }
  return "unknown";
}

Status check_dtype(const SafetensorsFile& file, const TensorView& tensor, DType expected) {
  if (tensor.dtype == safetensors_name(expected)) return {};
  return input_error(file.path(), tensor.name + ".dtype", tensor.dtype, safetensors_name(expected));
}

Status check_shape(const SafetensorsFile& file, const TensorView& tensor,
                   std::span<const std::uint64_t> expected) {
  if (std::ranges::equal(tensor.shape, expected)) return {};
  return input_error(file.path(), tensor.name + ".shape", to_string(tensor.shape),
                     to_string(expected));
}

// Index of the first element whose exponent is all ones (NaN or infinite), or `count`.
template <typename Bits>
std::size_t first_not_finite(std::span<const std::byte> bytes, Bits exponent) {
  const auto* elements = reinterpret_cast<const Bits*>(bytes.data());
  const std::size_t count = bytes.size() / sizeof(Bits);
  // Chunks without an early exit let the compiler vectorise: traces are mostly sound and large.
  constexpr std::size_t kChunk = 4096;
  for (std::size_t begin = 0; begin < count; begin += kChunk) {
    const std::size_t end = std::min(count, begin + kChunk);
    unsigned found = 0;
    for (std::size_t i = begin; i < end; ++i) {
      found |= (elements[i] & exponent) == exponent ? 1u : 0u;
    }
    if (found == 0) continue;
    for (std::size_t i = begin; i < end; ++i) {
      if ((elements[i] & exponent) == exponent) return i;
    }
  }
  return count;
}

Status check_finite(const SafetensorsFile& file, const TensorView& tensor, DType dtype) {
  std::size_t flat = 0;
  switch (dtype) {
    case DType::kF16: flat = first_not_finite<std::uint16_t>(tensor.bytes, 0x7C00); break;
    case DType::kBF16: flat = first_not_finite<std::uint16_t>(tensor.bytes, 0x7F80); break;
    case DType::kF32: flat = first_not_finite<std::uint32_t>(tensor.bytes, 0x7F800000); break;
  }
  if (flat == tensor.element_count()) return {};
  std::vector<std::uint64_t> place(tensor.shape.size());
  std::uint64_t rest = flat;
  for (std::size_t axis = tensor.shape.size(); axis-- > 0;) {
    place[axis] = rest % tensor.shape[axis];
    rest /= tensor.shape[axis];
  }
  const float value = load_element(tensor.bytes.data(), dtype, flat);
  return input_error(file.path(), tensor.name + to_string(place),
                     std::isnan(value) ? "NaN" : "infinity", "finite numbers");
}

// The bytes of a float tensor that is sound in every respect.
Result<std::span<const std::byte>> read_floats(const SafetensorsFile& file,
                                               const TensorView& tensor, DType dtype,
                                               std::span<const std::uint64_t> shape) {
  KVTIER_RETURN_IF_ERROR(check_dtype(file, tensor, dtype));
  KVTIER_RETURN_IF_ERROR(check_shape(file, tensor, shape));
  KVTIER_RETURN_IF_ERROR(check_finite(file, tensor, dtype));
  return tensor.bytes;
}

Result<const TensorView*> required(const SafetensorsFile& file, std::string_view name) {
  const TensorView* tensor = file.find(name);
  if (tensor != nullptr) return tensor;
  return input_error(file.path(), name, "nothing", "a tensor of this name");
}

Status read_payload(const SafetensorsFile& file, std::string_view name, DType dtype,
                    std::initializer_list<std::uint64_t> shape,
                    std::span<const std::byte>& target) {
  KVTIER_ASSIGN_OR_RETURN(const TensorView* tensor, required(file, name));
  KVTIER_ASSIGN_OR_RETURN(target, read_floats(file, *tensor, dtype, {shape.begin(), shape.size()}));
  return {};
}

Status read_oracle(const SafetensorsFile& file, std::string_view name,
                   std::initializer_list<std::uint64_t> shape, std::span<const float>& target) {
  const TensorView* tensor = file.find(name);
  if (tensor == nullptr) return {};
  KVTIER_ASSIGN_OR_RETURN(const auto bytes,
                          read_floats(file, *tensor, DType::kF32, {shape.begin(), shape.size()}));
  target = {reinterpret_cast<const float*>(bytes.data()), bytes.size() / sizeof(float)};
  return {};
}

Status read_prompt_queries(const SafetensorsFile& file, const TraceManifest& manifest,
                           TraceLayer& layer) {
  const bool has_queries = file.find("prompt_queries") != nullptr;
  const bool has_positions = file.find("prompt_query_positions") != nullptr;
  if (!has_queries && !has_positions) return {};
  // One without the other is useless, and then `required` says which one is missing.
  KVTIER_ASSIGN_OR_RETURN(const TensorView* queries, required(file, "prompt_queries"));
  KVTIER_RETURN_IF_ERROR(required(file, "prompt_query_positions").status());
  KVTIER_ASSIGN_OR_RETURN(
      layer.prompt_query_positions,
      read_integers(file, "prompt_query_positions", std::nullopt,
                    {.least = 0, .most = std::int64_t{manifest.tokens} - 1, .ascending = true}));
  const std::uint64_t shape[] = {layer.prompt_query_positions.size(), manifest.model.query_heads,
                                 manifest.model.head_dim};
  KVTIER_ASSIGN_OR_RETURN(layer.prompt_queries, read_floats(file, *queries, manifest.dtype, shape));
  return {};
}

std::int64_t integer_at(const TensorView& tensor, std::size_t index) {
  if (tensor.element_bytes == sizeof(std::int32_t)) {
    std::int32_t value;
    std::memcpy(&value, tensor.bytes.data() + index * sizeof(value), sizeof(value));
    return value;
  }
  std::int64_t value;
  std::memcpy(&value, tensor.bytes.data() + index * sizeof(value), sizeof(value));
  return value;
}

}  // namespace

Result<std::vector<std::uint32_t>> read_integers(const SafetensorsFile& file, std::string_view name,
                                                 std::optional<std::uint64_t> length,
                                                 const IntegerRange& range) {
  KVTIER_ASSIGN_OR_RETURN(const TensorView* tensor, required(file, name));
  if (tensor->dtype != "I64" && tensor->dtype != "I32") {
    return input_error(file.path(), tensor->name + ".dtype", tensor->dtype, "I64 or I32");
  }
  if (tensor->shape.size() != 1 || (length && tensor->shape[0] != *length)) {
    return input_error(file.path(), tensor->name + ".shape", to_string(tensor->shape),
                       length ? fmt::format("[{}]", *length) : "one dimension");
  }
  std::vector<std::uint32_t> values;
  values.reserve(tensor->element_count());
  std::int64_t least = range.least;
  for (std::size_t i = 0; i < tensor->element_count(); ++i) {
    const std::int64_t value = integer_at(*tensor, i);
    if (value < least || value > range.most) {
      const bool falls = range.ascending && i > 0 && value < least && value >= range.least;
      return input_error(file.path(), fmt::format("{}[{}]", name, i), fmt::format("{}", value),
                         falls ? fmt::format("more than {}, the one before it", values.back())
                               : fmt::format("a number from {} to {}", range.least, range.most));
    }
    values.push_back(static_cast<std::uint32_t>(value));
    if (range.ascending) least = value + 1;
  }
  return values;
}

Result<TraceLayerReading> read_trace_layer(const SafetensorsFile& file,
                                           const TraceManifest& manifest, std::uint32_t number) {
  const TraceModel& model = manifest.model;
  const std::uint64_t tokens = manifest.tokens;
  const std::uint64_t steps = manifest.steps;
  TraceLayerReading reading;
  TraceLayer& layer = reading.layer;
  layer.number = number;
  const auto recorded = file.metadata().find("layer");
  if (recorded != file.metadata().end() && recorded->second != fmt::format("{}", number)) {
    return input_error(file.path(), "__metadata__.layer", recorded->second,
                       fmt::format("{}", number));
  }
  const DType dtype = manifest.dtype;
  KVTIER_RETURN_IF_ERROR(
      read_payload(file, "keys", dtype, {tokens, model.kv_heads, model.head_dim}, layer.keys));
  KVTIER_RETURN_IF_ERROR(
      read_payload(file, "values", dtype, {tokens, model.kv_heads, model.value_dim}, layer.values));
  KVTIER_RETURN_IF_ERROR(read_payload(file, "queries", dtype,
                                      {steps, model.query_heads, model.head_dim}, layer.queries));
  KVTIER_ASSIGN_OR_RETURN(reading.query_positions,
                          read_integers(file, "query_positions", steps,
                                        {.least = manifest.context_tokens,
                                         .most = std::int64_t{manifest.tokens} - 1,
                                         .ascending = true}));
  KVTIER_RETURN_IF_ERROR(read_prompt_queries(file, manifest, layer));
  KVTIER_RETURN_IF_ERROR(
      read_oracle(file, "out", {steps, model.query_heads, model.value_dim}, layer.out));
  KVTIER_RETURN_IF_ERROR(read_oracle(file, "lse", {steps, model.query_heads}, layer.lse));
  KVTIER_RETURN_IF_ERROR(read_oracle(file, "sink_logits", {model.query_heads}, layer.sink_logits));
  return reading;
}

}  // namespace kvtier
