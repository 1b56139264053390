#include "kernels/quantised_keys.h"

#include "kernels/simd_config.h"
#include "memory/check.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

// clang-format off
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/quantised_keys_cpu.cc"
#include <hwy/foreach_target.h>
#include <hwy/cache_control.h>
#include <hwy/highway.h>
#include <hwy/contrib/math/math-inl.h>
#include "kernels/simd_rows-inl.h"
// clang-format on

#ifndef KVTIER_KERNELS_QUANTISED_KEYS_CPU_ONCE_
#define KVTIER_KERNELS_QUANTISED_KEYS_CPU_ONCE_
namespace kvtier {
namespace {

constexpr std::uint32_t kMaxCodedDim = 576;
/// Channels with the padding of the last line.
constexpr std::size_t kMaxCodedChannels = kMaxCodedDim + 16;
/// Queries that are scored in one pass over the codes.
constexpr std::size_t kCodedRows = 4;

/// Smallest and largest key of each channel.
struct ChannelRanges {
  alignas(64) float least[kMaxCodedDim];
  alignas(64) float most[kMaxCodedDim];
};

/// One query folded with one run's steps: integers in [-32767, 32767] in pairs of channels, and
/// logit = slope * (sum of code * folded) + offset.
struct FoldedQuery {
  alignas(64) std::int16_t folded[kMaxCodedChannels];
  float slope = 0.0f;
  float offset = 0.0f;
};

/// What one call of the inner loop scores.
struct TileJob {
  const CodeLine* tiles = nullptr;
  /// What is read next, to be fetched meanwhile: the same tiles of the next run, or these again.
  const CodeLine* next = nullptr;
  std::size_t tile_lines = 0;
  const FoldedQuery* queries = nullptr;
  float* logits = nullptr;
  std::size_t logit_stride = 0;
};

}  // namespace
}  // namespace kvtier
#endif

HWY_BEFORE_NAMESPACE();
namespace kvtier {
namespace HWY_NAMESPACE {
namespace {

#if HWY_MAX_BYTES >= 16

using IntTag = hn::ScalableTag<std::int32_t>;
using IntVec = hn::Vec<IntTag>;
using WordTag = hn::ScalableTag<std::uint16_t>;
using WordVec = hn::Vec<WordTag>;
using ShortTag = hn::ScalableTag<std::int16_t>;
/// Vectors in a line.
inline constexpr std::size_t kLineParts = 64 / (kLanes * sizeof(float));

/// Tiles whose sums stay in registers together: 4 queries times 4 tiles, 4 words, 4 codes and 2
/// more of 32 registers; 4 times 2, 2 and 2 of 16. More tiles share one load of the query.
#if HWY_TARGET <= HWY_AVX3 || HWY_ARCH_ARM
inline constexpr std::size_t kTileStep = 4;
#elif HWY_TARGET == HWY_AVX2
inline constexpr std::size_t kTileStep = 2;
#else
inline constexpr std::size_t kTileStep = 1;
#endif

/// Adds the products of both 16-bit halves of each lane: codes are not negative.
HWY_INLINE IntVec add_pairs(IntVec sum, WordVec codes, IntVec pair) {
  const IntTag d;
#if HWY_ARCH_X86
  IntVec unused = hn::Zero(d);
  return hn::ReorderWidenMulAccumulate(d, hn::BitCast(ShortTag(), codes),
                                       hn::BitCast(ShortTag(), pair), sum, unused);
#else
  const IntVec both = hn::BitCast(d, codes);
  const IntVec even = hn::And(both, hn::Set(d, 0xffff));
  const IntVec odd = hn::ShiftRight<16>(both);
  sum = hn::Add(sum, hn::Mul(even, hn::ShiftRight<16>(hn::ShiftLeft<16>(pair))));
  return hn::Add(sum, hn::Mul(odd, hn::ShiftRight<16>(pair)));
#endif
}

/// One vector's width of `kTiles` tiles against `kRows` queries.
template <int kBits, std::size_t kRows, std::size_t kTiles>
HWY_INLINE void score_part(const TileJob& job, std::size_t part) {
  const IntTag di;
  const WordTag dw;
  constexpr std::size_t kPairs = 16 / kBits;
  const WordVec mask = hn::Set(dw, (1u << kBits) - 1);
  IntVec sums[kRows][kTiles];
  for (std::size_t r = 0; r < kRows; ++r) {
    for (std::size_t t = 0; t < kTiles; ++t) sums[r][t] = hn::Zero(di);
  }
  for (std::size_t line = 0; line < job.tile_lines; ++line) {
    WordVec words[kTiles];
    for (std::size_t t = 0; t < kTiles; ++t) {
      const CodeLine& codes = job.tiles[t * job.tile_lines + line];
      words[t] = hn::Load(
          dw, reinterpret_cast<const std::uint16_t*>(codes.bytes) + part * hn::MaxLanes(dw));
      // Tiles side by side are more streams than the hardware follows by itself.
      if (part == 0) hwy::Prefetch(job.next + t * job.tile_lines + line);
    }
    // Unrolled, compilers move the masks of all pairs to the front and the sums to memory.
    HWY_UNROLL(1)
    for (std::size_t n = 0; n < kPairs; ++n) {
      WordVec codes[kTiles];
      for (std::size_t t = 0; t < kTiles; ++t) {
        codes[t] = hn::And(words[t], mask);
        words[t] = hn::ShiftRight<kBits>(words[t]);
      }
      for (std::size_t r = 0; r < kRows; ++r) {
        std::int32_t pair;
        std::memcpy(&pair, job.queries[r].folded + 2 * (line * kPairs + n), sizeof(pair));
        const IntVec both = hn::Set(di, pair);
        for (std::size_t t = 0; t < kTiles; ++t) sums[r][t] = add_pairs(sums[r][t], codes[t], both);
      }
    }
  }
  const FloatTag d;
  for (std::size_t r = 0; r < kRows; ++r) {
    const FloatVec slope = hn::Set(d, job.queries[r].slope);
    const FloatVec offset = hn::Set(d, job.queries[r].offset);
    for (std::size_t t = 0; t < kTiles; ++t) {
      const FloatVec logits = hn::MulAdd(hn::ConvertTo(d, sums[r][t]), slope, offset);
      hn::StoreU(logits, d,
                 job.logits + r * job.logit_stride + t * KeyCodes::kTileTokens + part * kLanes);
    }
  }
}

template <int kBits, std::size_t kRows, std::size_t kTiles>
HWY_INLINE void score_tiles(const TileJob& job) {
  for (std::size_t part = 0; part < kLineParts; ++part) score_part<kBits, kRows, kTiles>(job, part);
}

#else  // No vectors: one code at a time.

inline constexpr std::size_t kTileStep = 1;

template <int kBits, std::size_t kRows, std::size_t kTiles>
HWY_INLINE void score_tiles(const TileJob& job) {
  static_assert(kTiles == 1);
  for (std::size_t token = 0; token < KeyCodes::kTileTokens; ++token) {
    std::int32_t sums[kRows] = {};
    for (std::size_t line = 0; line < job.tile_lines; ++line) {
      for (std::size_t c = 0; c < 32 / kBits; ++c) {
        std::uint16_t word;
        std::memcpy(&word, job.tiles[line].bytes + 2 * (2 * token + c % 2), sizeof(word));
        const int code = (word >> (c / 2 * kBits)) & ((1 << kBits) - 1);
        for (std::size_t r = 0; r < kRows; ++r) {
          sums[r] += code * job.queries[r].folded[line * (32 / kBits) + c];
        }
      }
    }
    for (std::size_t r = 0; r < kRows; ++r) {
      const FoldedQuery& query = job.queries[r];
      job.logits[r * job.logit_stride + token] =
          static_cast<float>(sums[r]) * query.slope + query.offset;
    }
  }
}

#endif

/// logits[0, count) = cap * tanh(logits / cap); count is a multiple of 16.
void cap_logits(float cap, float* logits, std::size_t count) {
  const FloatTag d;
  const FloatVec inverse = hn::Set(d, 1.0f / cap);
  for (std::size_t i = 0; i < count; i += kLanes) {
    const FloatVec x = hn::Mul(hn::LoadU(d, logits + i), inverse);
    hn::StoreU(hn::Mul(hn::Tanh(d, x), hn::Set(d, cap)), d, logits + i);
  }
}

/// The run's steps and smallest keys as float32, [dim] each.
struct RunScales {
  alignas(64) float steps[kMaxCodedDim];
  alignas(64) float least[kMaxCodedDim];
};

template <typename T>
void load_scales(const KeyCodes& codes, const CodeLine* run, RunScales& scales) {
  const FloatTag d;
  const auto* from = reinterpret_cast<const T*>(run + KeyCodes::kRunTiles * codes.tile_lines());
  for (std::size_t half = 0; half < 2; ++half) {
    float* target = half == 0 ? scales.steps : scales.least;
    std::size_t i = 0;
    for (; i + kLanes <= codes.dim; i += kLanes) {
      hn::Store(load_as_f32(d, from + half * codes.dim + i), d, target + i);
    }
    if (kNeedsTail && i < codes.dim) {
      hn::Store(load_tail_as_f32(from + half * codes.dim + i), d, target + i);
    }
  }
}

void load_scales(const KeyCodes& codes, const CodeLine* run, RunScales& scales) {
  switch (codes.dtype) {
    case DType::kF16: return load_scales<hwy::float16_t>(codes, run, scales);
    case DType::kBF16: return load_scales<hwy::bfloat16_t>(codes, run, scales);
    case DType::kF32: return load_scales<float>(codes, run, scales);
  }
}

/// `query` is padded with zeros to a whole vector and so are the scales.
void fold_query(const KeyCodes& codes, float scale, const RunScales& scales, const float* query,
                FoldedQuery& result) {
  const FloatTag d;
  alignas(64) float products[kMaxCodedDim];
  FloatVec offset = hn::Zero(d);
  FloatVec largest = hn::Zero(d);
  for (std::size_t i = 0; i < codes.dim; i += kLanes) {
    const FloatVec q = hn::Load(d, query + i);
    const FloatVec product = hn::Mul(q, hn::Load(d, scales.steps + i));
    offset = hn::MulAdd(q, hn::Load(d, scales.least + i), offset);
    largest = hn::Max(largest, hn::Abs(product));
    hn::Store(product, d, products + i);
  }
  const float top = hn::GetLane(hn::MaxOfLanes(d, largest));
  result.offset = scale * hn::GetLane(hn::SumOfLanes(d, offset));
  int exponent = 0;
  std::frexp(top, &exponent);  // top < 2^exponent
  exponent = std::clamp(exponent, -100, 128);
  result.slope = scale * std::ldexp(1.0f, exponent - 15);
  // Integers would hide that a product overflowed.
  if (!std::isfinite(top)) result.slope = std::numeric_limits<float>::quiet_NaN();
  const FloatVec up = hn::Set(d, std::ldexp(1.0f, 15 - exponent));
  const FloatVec limit = hn::Set(d, 32767.0f);
  const hn::Rebind<std::int16_t, FloatTag> ds;
  for (std::size_t i = 0; i < codes.dim; i += kLanes) {
    FloatVec scaled = hn::Mul(hn::Load(d, products + i), up);
    scaled = hn::Max(hn::Min(scaled, limit), hn::Neg(limit));
    hn::StoreU(hn::DemoteTo(ds, hn::NearestInt(scaled)), ds, result.folded + i);
  }
}

template <int kBits, std::size_t kRows>
void score_run(const TileJob& job, unsigned tiles) {
  constexpr unsigned kStepMask = (1u << kTileStep) - 1;
  for (std::size_t t = 0; t < KeyCodes::kRunTiles;) {
    TileJob part = job;
    part.tiles += t * job.tile_lines;
    part.next += t * job.tile_lines;
    part.logits += t * KeyCodes::kTileTokens;
    if (t % kTileStep == 0 && ((tiles >> t) & kStepMask) == kStepMask) {
      score_tiles<kBits, kRows, kTileStep>(part);
      t += kTileStep;
      continue;
    }
    if ((tiles >> t) & 1) score_tiles<kBits, kRows, 1>(part);
    ++t;
  }
}

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

void score_coded_runs(const SoftmaxOptions& softmax, const CodedTask& task) {
  const KeyCodes& codes = task.codes;
  const std::size_t stride = (codes.dim + kLanes - 1) / kLanes * kLanes;
  alignas(64) float padded[kCodedRows * (kMaxCodedDim + 16)];
  RunScales scales;
  FoldedQuery folded[kCodedRows];
  // The channels that fill up the last line have the code 0; they must not be read unset.
  for (FoldedQuery& query : folded) std::memset(query.folded, 0, sizeof(query.folded));
  for (std::size_t first = 0; first < task.query_count;) {
    const std::size_t count = even_piece(task.query_count - first, kCodedRows);
    for (std::size_t q = 0; q < count; ++q) {
      std::copy_n(task.queries + (first + q) * task.query_stride, codes.dim, padded + q * stride);
      std::fill(padded + q * stride + codes.dim, padded + (q + 1) * stride, 0.0f);
    }
    for (std::size_t r = 0; r < task.run_count; ++r) {
      const unsigned tiles = task.tiles == nullptr ? 15u : task.tiles[r];
      if (tiles == 0) continue;
      const CodeLine* run = task.runs + r * codes.run_lines();
      load_scales(codes, run, scales);
      for (std::size_t q = 0; q < count; ++q) {
        fold_query(codes, softmax.scale, scales, padded + q * stride, folded[q]);
      }
      const CodeLine* next = r + 1 < task.run_count ? run + codes.run_lines() : run;
      for (std::size_t i = KeyCodes::kRunTiles * codes.tile_lines(); i < codes.run_lines(); ++i) {
        hwy::Prefetch(next + i);
      }
      const TileJob job{run,
                        next,
                        codes.tile_lines(),
                        folded,
                        task.logits + first * task.logit_stride + r * KeyCodes::kRunTokens,
                        task.logit_stride};
      with_constant<kCodedRows>(count, [&](auto rows) HWY_ATTR {
        if (codes.bits == 4) {
          score_run<4, rows.value>(job, tiles);
        } else {
          score_run<2, rows.value>(job, tiles);
        }
      });
      if (softmax.logit_cap <= 0.0f) continue;
      for (std::size_t i = 0; i < count * KeyCodes::kRunTiles; ++i) {
        const std::size_t t = i % KeyCodes::kRunTiles;
        if (((tiles >> t) & 1) == 0) continue;
        cap_logits(
            softmax.logit_cap,
            job.logits + i / KeyCodes::kRunTiles * job.logit_stride + t * KeyCodes::kTileTokens,
            KeyCodes::kTileTokens);
      }
    }
    first += count;
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace kvtier
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvtier {

HWY_EXPORT(ranges_of);
HWY_EXPORT(codes_of);
HWY_EXPORT(score_coded_runs);

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

/// Four codes of every other byte of `eight`, side by side.
std::uint64_t gather_codes(std::uint64_t eight, std::uint32_t bits) {
  const std::uint64_t kept = eight & 0x000f000f000f000f;
  const std::uint32_t step = 16 - bits;
  const std::uint64_t all = kept | kept >> step | kept >> 2 * step | kept >> 3 * step;
  return all & ((1u << 4 * bits) - 1);
}

/// Bytes [64][stride] into the tiles' lines.
void pack_codes(const KeyCodes& codes, const std::uint8_t* from, std::size_t stride,
                CodeLine* target) {
  const std::size_t eights = codes.channels_per_line() / 8;
  for (std::size_t token = 0; token < KeyCodes::kRunTokens; ++token) {
    CodeLine* tile = target + token / KeyCodes::kTileTokens * codes.tile_lines();
    for (std::size_t line = 0; line < codes.tile_lines(); ++line) {
      std::uint64_t even = 0;
      std::uint64_t odd = 0;
      for (std::size_t e = 0; e < eights; ++e) {
        std::uint64_t eight;
        std::memcpy(&eight, from + token * stride + (line * eights + e) * 8, sizeof(eight));
        even |= gather_codes(eight, codes.bits) << e * 4 * codes.bits;
        odd |= gather_codes(eight >> 8, codes.bits) << e * 4 * codes.bits;
      }
      const std::uint16_t words[2] = {static_cast<std::uint16_t>(even),
                                      static_cast<std::uint16_t>(odd)};
      std::memcpy(tile[line].bytes + token % KeyCodes::kTileTokens * sizeof(words), words,
                  sizeof(words));
    }
  }
}

static_assert(std::endian::native == std::endian::little, "codes are packed byte by byte");

}  // namespace

Status check_codes(const KeyCodes& codes) {
  if ((codes.bits == 4 || codes.bits == 2) && codes.dim % 8 == 0 && codes.dim <= kMaxCodedDim) {
    return {};
  }
  return unsupported(fmt::format(
      "keys of {} coded with {} bits: expected a multiple of 8 up to {}, and 4 or 2 bits",
      codes.dim, codes.bits, kMaxCodedDim));
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
    const std::uint32_t in_line = i % codes.channels_per_line();
    std::uint16_t word;
    std::memcpy(&word, tile[i / codes.channels_per_line()].bytes + 2 * (2 * place + in_line % 2),
                sizeof(word));
    const int code = (word >> (in_line / 2 * codes.bits)) & ((1 << codes.bits) - 1);
    // The step times the code can overflow where their sum with the smallest key does not.
    target[i] = static_cast<float>(double{load_element(scales, codes.dtype, codes.dim + i)} +
                                   double{load_element(scales, codes.dtype, i)} * code);
  }
}

void score_codes(const SoftmaxOptions& softmax, const CodedTask& task) {
  KVTIER_CHECK(check_codes(task.codes).ok(), "codes of {}, {} bits", task.codes.dim,
               task.codes.bits);
  HWY_DYNAMIC_DISPATCH(score_coded_runs)(softmax, task);
}

}  // namespace kvtier
#endif  // HWY_ONCE
