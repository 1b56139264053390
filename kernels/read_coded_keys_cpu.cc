#include "kernels/quantised_keys.h"
#include "kernels/simd_config.h"
#include "memory/check.h"

#include <cstring>

// clang-format off
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/read_coded_keys_cpu.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>
#include "kernels/simd_rows-inl.h"
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace kvtier {
namespace HWY_NAMESPACE {
namespace {

/// What a row may be written past its end: a vector of `ChannelTag`.
constexpr std::size_t kPadding = kDimMultiple;
/// At most eight lanes: what a row is padded for.
using ChannelTag = hn::CappedTag<float, kDimMultiple>;

template <typename T>
void load_row(const std::byte* source, std::size_t dim, float* target) {
  const ChannelTag d;
  const T* row = reinterpret_cast<const T*>(source);
  for (std::size_t i = 0; i < dim; i += hn::Lanes(d)) {
    hn::StoreU(load_as_f32(d, row + i), d, target + i);
  }
}

/// Rounds as `store_element` does, whatever the version of Highway.
void store_row(const float* row, std::size_t dim, hwy::bfloat16_t* target) {
  const ChannelTag d;
  const hn::RebindToUnsigned<ChannelTag> du;
  const hn::Rebind<std::uint16_t, ChannelTag> d16;
  auto* words = reinterpret_cast<std::uint16_t*>(target);
  for (std::size_t i = 0; i < dim; i += hn::Lanes(d)) {
    const auto value = hn::LoadU(d, row + i);
    const auto bits = hn::BitCast(du, value);
    const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(du, 1u));
    const auto rounded = hn::Add(bits, hn::Add(odd, hn::Set(du, 0x7FFFu)));
    const auto kept = hn::IfThenElse(hn::RebindMask(du, hn::Eq(value, value)), rounded,
                                     hn::Or(bits, hn::Set(du, 0x400000u)));
    hn::StoreU(hn::TruncateTo(d16, hn::ShiftRight<16>(kept)), d16, words + i);
  }
}

void store_row(const float* row, std::size_t dim, hwy::float16_t* target) {
#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX2
  const ChannelTag d;
  const hn::Rebind<hwy::float16_t, ChannelTag> narrow;
  for (std::size_t i = 0; i < dim; i += hn::Lanes(d)) {
    hn::StoreU(hn::DemoteTo(narrow, hn::LoadU(d, row + i)), narrow, target + i);
  }
#else
  for (std::size_t i = 0; i < dim; ++i) {
    store_element(reinterpret_cast<std::byte*>(target), DType::kF16, i, row[i]);
  }
#endif
}

void store_row(const float* row, std::size_t dim, float* target) {
  std::memcpy(target, row, dim * sizeof(float));
}

template <typename T>
void read_typed(const KeyCodes& codes, const CodeLine* run, std::uint32_t first,
                std::uint32_t count, std::byte* target, std::size_t stride_bytes) {
  const ChannelTag d;
  const hn::RebindToUnsigned<ChannelTag> du;
  const hn::RebindToSigned<ChannelTag> di;
  alignas(64) float steps[KeyCodes::kDimMax + kPadding] = {};
  alignas(64) float least[KeyCodes::kDimMax + kPadding] = {};
  alignas(64) float row[KeyCodes::kDimMax + kPadding];
  // Each four of a token, from the low end of each byte up: one word of 32 bits.
  alignas(64) std::uint32_t fours[KeyCodes::kDimMax / 4 + kPadding] = {};
  const std::byte* scales = run[KeyCodes::kRunTiles * codes.tile_lines()].bytes;
  load_row<T>(scales, codes.dim, steps);
  load_row<T>(scales + codes.dim * sizeof(T), codes.dim, least);
  const auto mask = hn::Set(du, (1u << codes.bits) - 1);
  const std::size_t quarter = codes.dim / 4;
  const std::size_t fours_per_line = codes.channels_per_line() / 4;
  for (std::uint32_t token = first; token < first + count; ++token) {
    const CodeLine* tile = run + token / KeyCodes::kTileTokens * codes.tile_lines();
    const std::size_t place = token % KeyCodes::kTileTokens * sizeof(std::uint32_t);
    for (std::size_t four = 0; four < quarter; ++four) {
      std::uint32_t word;
      std::memcpy(&word, tile[four / fours_per_line].bytes + place, sizeof(word));
      fours[four] = word >> four % fours_per_line * codes.bits;
    }
    for (std::size_t byte = 0; byte < 4; ++byte) {
      const int shift = static_cast<int>(8 * byte);
      for (std::size_t four = 0; four < quarter; four += hn::Lanes(d)) {
        const auto shifted = hn::ShiftRightSame(hn::Load(du, fours + four), shift);
        const auto code = hn::ConvertTo(d, hn::BitCast(di, hn::And(shifted, mask)));
        const std::size_t channel = byte * quarter + four;
        hn::StoreU(hn::MulAdd(hn::LoadU(d, steps + channel), code, hn::LoadU(d, least + channel)),
                   d, row + channel);
      }
    }
    store_row(row, codes.dim, reinterpret_cast<T*>(target + (token - first) * stride_bytes));
  }
}

}  // namespace

void read_keys(const KeyCodes& codes, const CodeLine* run, std::uint32_t first, std::uint32_t count,
               std::byte* target, std::size_t stride_bytes) {
  switch (codes.dtype) {
    case DType::kF16:
      return read_typed<hwy::float16_t>(codes, run, first, count, target, stride_bytes);
    case DType::kBF16:
      return read_typed<hwy::bfloat16_t>(codes, run, first, count, target, stride_bytes);
    case DType::kF32: return read_typed<float>(codes, run, first, count, target, stride_bytes);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace kvtier
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvtier {

HWY_EXPORT(read_keys);

void read_coded_keys(const KeyCodes& codes, const CodeLine* run, std::uint32_t first,
                     std::uint32_t count, std::byte* target, std::size_t stride_bytes) {
  KVTIER_CHECK(check_codes(codes).ok() && first <= KeyCodes::kRunTokens &&
                   count <= KeyCodes::kRunTokens - first,
               "keys {} + {} of a run of {} channels", first, count, codes.dim);
  HWY_DYNAMIC_DISPATCH(read_keys)(codes, run, first, count, target, stride_bytes);
}

}  // namespace kvtier
#endif  // HWY_ONCE
