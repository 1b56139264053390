#include "memory/dtype.h"

#include <bit>
#include <cstring>

namespace kvtier {

std::string_view to_string(DType dtype) {
  switch (dtype) {
    case DType::kF16: return "float16";
    case DType::kBF16: return "bfloat16";
    case DType::kF32: return "float32";
  }
  return "unknown";
}

Result<DType> parse_dtype(std::string_view name) {
  if (name == "float16" || name == "F16" || name == "f16") return DType::kF16;
  if (name == "bfloat16" || name == "BF16" || name == "bf16") return DType::kBF16;
  if (name == "float32" || name == "F32" || name == "f32") return DType::kF32;
  return invalid_argument(fmt::format("dtype '{}' is not one of float16, bfloat16, float32", name));
}

float f16_to_f32(std::uint16_t bits) {
  const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000u) << 16;
  const std::uint32_t exponent = (bits >> 10) & 0x1Fu;
  const std::uint32_t mantissa = bits & 0x3FFu;
  if (exponent == 0) {
    // Zero and subnormals: the value is mantissa * 2^-24, exact in f32.
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return std::bit_cast<float>(std::bit_cast<std::uint32_t>(magnitude) | sign);
  }
  const std::uint32_t wide_exponent = exponent == 31 ? 255u : exponent + 112u;
  return std::bit_cast<float>(sign | (wide_exponent << 23) | (mantissa << 13));
}

std::uint16_t f32_to_f16(float value) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  const auto sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000u);
  const std::uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude >= 0x7F800000u) {
    const std::uint32_t quiet = magnitude > 0x7F800000u ? 0x200u : 0u;
    return static_cast<std::uint16_t>(sign | 0x7C00u | quiet);
  }
  if (magnitude >= 0x477FF000u) return static_cast<std::uint16_t>(sign | 0x7C00u);
  if (magnitude < 0x38800000u) {
    // Below the smallest normal: adding 0.5 shifts the mantissa so that the FPU does the rounding.
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    const std::uint32_t rounded = std::bit_cast<std::uint32_t>(shifted) - 0x3F000000u;
    return static_cast<std::uint16_t>(sign | rounded);
  }
  const std::uint32_t odd = (magnitude >> 13) & 1u;
  const std::uint32_t rounded = magnitude + 0xFFFu + odd - (112u << 23);
  return static_cast<std::uint16_t>(sign | (rounded >> 13));
}

float bf16_to_f32(std::uint16_t bits) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

std::uint16_t f32_to_bf16(float value) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return static_cast<std::uint16_t>((bits >> 16) | 0x40u);
  return static_cast<std::uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

float load_element(const std::byte* row, DType dtype, std::size_t index) {
  if (dtype == DType::kF32) {
    float value;
    std::memcpy(&value, row + index * sizeof(float), sizeof(float));
    return value;
  }
  std::uint16_t bits;
  std::memcpy(&bits, row + index * sizeof(bits), sizeof(bits));
  return dtype == DType::kF16 ? f16_to_f32(bits) : bf16_to_f32(bits);
}

void store_element(std::byte* row, DType dtype, std::size_t index, float value) {
  if (dtype == DType::kF32) {
    std::memcpy(row + index * sizeof(float), &value, sizeof(float));
    return;
  }
  const std::uint16_t bits = dtype == DType::kF16 ? f32_to_f16(value) : f32_to_bf16(value);
  std::memcpy(row + index * sizeof(bits), &bits, sizeof(bits));
}

}  // namespace kvtier
