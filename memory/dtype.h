#pragma once

#include "memory/status.h"

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace kvtier {

/// Element types of keys and values.
enum class DType : unsigned char { kF16, kBF16, kF32 };

constexpr std::size_t size_of(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }
/// "float16", "bfloat16", "float32".
std::string_view to_string(DType dtype);
/// Accepts the names above and the short forms of safetensors ("F16", "BF16", "F32").
Result<DType> parse_dtype(std::string_view name);

/// Scalar conversions for references, tests and tools; the kernels have vector ones.
float f16_to_f32(std::uint16_t bits);
std::uint16_t f32_to_f16(float value);  ///< Round to nearest even.
float bf16_to_f32(std::uint16_t bits);
std::uint16_t f32_to_bf16(float value);  ///< Round to nearest even.
/// Reads element `index` of a row of `dtype` at `row` (any alignment).
float load_element(const std::byte* row, DType dtype, std::size_t index);
void store_element(std::byte* row, DType dtype, std::size_t index, float value);

}  // namespace kvtier
