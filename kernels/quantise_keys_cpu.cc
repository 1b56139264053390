#include "kernels/quantised_keys.h"
#include "kernels/simd_config.h"
#include "memory/check.h"

#include <bit>
#include <cmath>
#include <cstring>

// clang-format off
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/quantise_keys_cpu.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>
#include "kernels/simd_rows-inl.h"
// clang-format on

#ifndef KVTIER_KERNELS_QUANTISE_KEYS_CPU_ONCE_
#define KVTIER_KERNELS_QUANTISE_KEYS_CPU_ONCE_
namespace kvtier {
namespace {

/// Channels with the padding of the last line.
constexpr std::size_t kMaxCodedChannels = KeyCodes::kDimMax + 16;

/// Smallest and largest key of each channel.
struct ChannelRanges {
  alignas(64) float least[KeyCodes::kDimMax];
  alignas(64) float most[KeyCodes::kDimMax];
};

}  // namespace
}  // namespace kvtier
#endif

HWY_BEFORE_NAMESPACE();
namespace kvtier {
namespace HWY_NAMESPACE {
namespace {

template <typename T>
void find_ranges(const RowsView& keys, std::size_t skip, ChannelRanges& ranges) {
  const FloatTag d;
  for (std::size_t i = 0; i < keys.dim; i += kLanes) {
    const bool tail = kNeedsTail && i + kLanes > keys.dim;
    const auto load = [&](std::size_t row) HWY_ATTR {
      const T* at = reinterpret_cast<const T*>(keys.row(row)) + i;
      return tail ? load_tail_as_f32(at) : load_as_f32(d, at);
    };
    FloatVec least = hn::Zero(d);
    FloatVec most = hn::Zero(d);
    // Not a number as soon as one key is not finite: zero times it is not a number, and stays so.
    FloatVec sum = hn::Zero(d);
    for (std::size_t row = skip; row < KeyCodes::kRunTokens; ++row) {
      const FloatVec key = load(row);
      least = row == skip ? key : hn::Min(least, key);
      most = row == skip ? key : hn::Max(most, key);
      sum = hn::MulAdd(key, hn::Zero(d), sum);
    }
    hn::Store(hn::Add(least, sum), d, ranges.least + i);
    hn::Store(most, d, ranges.most + i);
  }
}

/// codes[row][i] = round((key - least) * inverse step), a byte each.
template <typename T>
void find_codes(const RowsView& keys, std::size_t skip, const ChannelRanges& ranges, float largest,
                std::uint8_t* target, std::size_t stride) {
  const FloatTag d;
  const hn::Rebind<std::uint8_t, FloatTag> db;
  const FloatVec limit = hn::Set(d, largest);
  for (std::size_t row = skip; row < KeyCodes::kRunTokens; ++row) {
    const T* key = reinterpret_cast<const T*>(keys.row(row));
    for (std::size_t i = 0; i < keys.dim; i += kLanes) {
      const bool tail = kNeedsTail && i + kLanes > keys.dim;
      FloatVec x = tail ? load_tail_as_f32(key + i) : load_as_f32(d, key + i);
      x = hn::Mul(hn::Sub(x, hn::Load(d, ranges.least + i)), hn::Load(d, ranges.most + i));
      // What is not a number compares as false and becomes zero.
      x = hn::IfThenElseZero(hn::Gt(x, hn::Zero(d)), hn::Min(x, limit));
      hn::StoreU(hn::DemoteTo(db, hn::NearestInt(x)), db, target + row * stride + i);
    }
  }
}

}  // namespace

void ranges_of(const RowsView& keys, std::size_t skip, ChannelRanges& ranges) {
  switch (keys.dtype) {
    case DType::kF16: return find_ranges<hwy::float16_t>(keys, skip, ranges);
    case DType::kBF16: return find_ranges<hwy::bfloat16_t>(keys, skip, ranges);
    case DType::kF32: return find_ranges<float>(keys, skip, ranges);
  }
}

/// `ranges.most` holds the inverse steps here.
void codes_of(const RowsView& keys, std::size_t skip, const ChannelRanges& ranges, float largest,
              std::uint8_t* target, std::size_t stride) {
  switch (keys.dtype) {
    case DType::kF16:
      return find_codes<hwy::float16_t>(keys, skip, ranges, largest, target, stride);
    case DType::kBF16:
      return find_codes<hwy::bfloat16_t>(keys, skip, ranges, largest, target, stride);
    case DType::kF32: return find_codes<float>(keys, skip, ranges, largest, target, stride);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace kvtier
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvtier {

HWY_EXPORT(ranges_of);
HWY_EXPORT(codes_of);

namespace {

/// The smallest number of `dtype` that is not below `value` (>= 0).
float round_up(DType dtype, float value) {
  std::byte bytes[4];
  store_element(bytes, dtype, 0, value);
  float rounded = load_element(bytes, dtype, 0);
  if (!(rounded < value)) return rounded;
  // Positive numbers ascend with their bits.
  std::uint32_t bits = 0;
  std::memcpy(&bits, bytes, size_of(dtype));
  ++bits;
  std::memcpy(bytes, &bits, size_of(dtype));
  return load_element(bytes, dtype, 0);
}

/// Bytes [64][stride] into the tiles' lines.
void pack_codes(const KeyCodes& codes, const std::uint8_t* from, std::size_t stride,
                CodeLine* target) {
  const std::size_t fours = codes.channels_per_line() / 4;
  const std::size_t all = codes.dim / 4;
  for (std::size_t token = 0; token < KeyCodes::kRunTokens; ++token) {
    CodeLine* tile = target + token / KeyCodes::kTileTokens * codes.tile_lines();
    for (std::size_t line = 0; line < codes.tile_lines(); ++line) {
      std::uint32_t word = 0;
      for (std::size_t n = 0; n < fours && line * fours + n < all; ++n) {
        for (std::size_t b = 0; b < 4; ++b) {
          const std::uint32_t code = from[token * stride + b * all + line * fours + n];
          word |= code << (8 * b + n * codes.bits);
        }
      }
      std::memcpy(tile[line].bytes + token % KeyCodes::kTileTokens * sizeof(word), &word,
                  sizeof(word));
    }
  }
}

static_assert(std::endian::native == std::endian::little, "codes are packed byte by byte");

}  // namespace

Status check_codes(const KeyCodes& codes) {
  if ((codes.bits == 4 || codes.bits == 2) && codes.dim % 8 == 0 &&
      codes.dim <= KeyCodes::kDimMax) {
    return {};
  }
  return unsupported(fmt::format(
      "keys of {} coded with {} bits: expected a multiple of 8 up to {}, and 4 or 2 bits",
      codes.dim, codes.bits, KeyCodes::kDimMax));
}

void quantise_run(const KeyCodes& codes, const RowsView& keys, std::uint32_t skip,
                  CodeLine* target) {
  KVTIER_CHECK(check_codes(codes).ok() && keys.dim == codes.dim && keys.dtype == codes.dtype &&
                   keys.rows == KeyCodes::kRunTokens && skip <= KeyCodes::kRunTokens,
               "{} keys of {} for codes of {}, {} skipped", keys.rows, keys.dim, codes.dim, skip);
  constexpr std::size_t kStride = kMaxCodedChannels;
  alignas(64) std::uint8_t bytes[KeyCodes::kRunTokens * kStride] = {};
  ChannelRanges ranges;
  const auto largest = static_cast<float>((1u << codes.bits) - 1);
  CodeLine* scales = target + KeyCodes::kRunTiles * codes.tile_lines();
  std::memset(scales, 0, codes.scale_lines() * sizeof(CodeLine));
  if (skip < KeyCodes::kRunTokens) {
    HWY_DYNAMIC_DISPATCH(ranges_of)(keys, skip, ranges);
    for (std::uint32_t i = 0; i < codes.dim; ++i) {
      float step = (ranges.most[i] - ranges.least[i]) / largest;
      if (std::isinf(step)) step = ranges.most[i] / largest - ranges.least[i] / largest;
      step = round_up(codes.dtype, step);
      store_element(scales->bytes, codes.dtype, i, step);
      store_element(scales->bytes, codes.dtype, codes.dim + i, ranges.least[i]);
      // A step so small that its inverse overflows is taken for none: such keys are all alike.
      const float inverse = 1.0f / step;
      ranges.most[i] = step > 0.0f && std::isfinite(inverse) ? inverse : 0.0f;
    }
    HWY_DYNAMIC_DISPATCH(codes_of)(keys, skip, ranges, largest, bytes, kStride);
  }
  pack_codes(codes, bytes, kStride, target);
}

void read_coded_key(const KeyCodes& codes, const CodeLine* run, std::uint32_t token,
                    float* target) {
  const std::byte* scales = run[KeyCodes::kRunTiles * codes.tile_lines()].bytes;
  const CodeLine* tile = run + token / KeyCodes::kTileTokens * codes.tile_lines();
  const std::uint32_t place = token % KeyCodes::kTileTokens;
  for (std::uint32_t i = 0; i < codes.dim; ++i) {
    const std::uint32_t four = i % (codes.dim / 4);
    const std::uint32_t fours = codes.channels_per_line() / 4;
    const auto byte =
        std::to_integer<std::uint32_t>(tile[four / fours].bytes[4 * place + i / (codes.dim / 4)]);
    const auto code =
        static_cast<int>((byte >> four % fours * codes.bits) & ((1u << codes.bits) - 1));
    // The step times the code can overflow where their sum with the smallest key does not.
    target[i] = static_cast<float>(double{load_element(scales, codes.dtype, codes.dim + i)} +
                                   double{load_element(scales, codes.dtype, i)} * code);
  }
}

}  // namespace kvtier
#endif  // HWY_ONCE
