// Tiles of small codes against queries that were rounded to bytes, compiled once per instruction
// set: what `quantised_keys_cpu.cc` and `int4_rows_cpu.cc` share.

#if defined(KVTIER_KERNELS_CODE_TILES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KVTIER_KERNELS_CODE_TILES_INL_H_
#undef KVTIER_KERNELS_CODE_TILES_INL_H_
#else
#define KVTIER_KERNELS_CODE_TILES_INL_H_
#endif

#include "kernels/quantised_keys.h"
#include "kernels/simd_rows-inl.h"
#include "kernels/simd_targets.h"

#include <hwy/contrib/math/math-inl.h>
#include <hwy/highway.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

HWY_BEFORE_NAMESPACE();
namespace kvtier {
namespace HWY_NAMESPACE {

/// Channels, and room for a vector that begins at the last of them.
inline constexpr std::size_t kMaxCodedChannels = KeyCodes::kDimMax + 16;
/// Fours of channels, likewise.
inline constexpr std::size_t kMaxFours = KeyCodes::kDimMax / 4 + 16;
/// Queries that are scored in one pass over the codes.
inline constexpr std::size_t kCodedRows = 4;
/// What a query is rounded to: integers up to this, either way.
inline constexpr float kFoldedLevels = 127.0f;
/// A query whose largest element is below this is taken as zero.
inline constexpr float kLeastFolded = 0x1p-100f;

/// Queries as integers in [-127, 127]: byte b of number n is channel n + b * dim / 4, as in a
/// tile's words. logit = slope * (sum of code * integer) + offset.
struct FoldedQueries {
  alignas(64) std::int32_t fours[kCodedRows][kMaxFours];
  float slopes[kCodedRows];
  float offsets[kCodedRows];
};

/// What one call of the inner loop scores.
struct TileJob {
  const CodeLine* tiles = nullptr;
  /// What is read next, to be fetched meanwhile: the same tiles of a later run, or these again.
  const CodeLine* next = nullptr;
  std::size_t tile_lines = 0;
  const FoldedQueries* queries = nullptr;
  float* logits = nullptr;
  std::size_t logit_stride = 0;
};

/// Rounds elements * `up` to bytes and packs them: `elements` has room for a vector behind `dim`.
/// Adding 1.5 * 2^23 leaves the integer nearest to a small number in the low bits of the sum.
HWY_INLINE void pack_fours(const float* elements, std::uint32_t dim, float up,
                           std::int32_t* fours) {
  const FloatTag d;
  const hn::RebindToSigned<FloatTag> di;
  const std::size_t count = dim / 4;
  const FloatVec magic = hn::Set(d, 0x1.8p23f);
  const FloatVec factor = hn::Set(d, up);
  const auto byte = hn::Set(di, 0xff);
  for (std::size_t n = 0; n < count; n += kLanes) {
    const auto rounded = [&](std::size_t b) HWY_ATTR {
      return hn::BitCast(di, hn::MulAdd(hn::LoadU(d, elements + b * count + n), factor, magic));
    };
    const auto low = hn::Or(hn::And(rounded(0), byte), hn::ShiftLeft<8>(hn::And(rounded(1), byte)));
    const auto high =
        hn::Or(hn::ShiftLeft<16>(hn::And(rounded(2), byte)), hn::ShiftLeft<24>(rounded(3)));
    hn::StoreU(hn::Or(low, high), di, fours + n);
  }
  std::fill(fours + count, fours + (count + kLanes - 1) / kLanes * kLanes, 0);
}

#if HWY_MAX_BYTES >= 16

using IntTag = hn::ScalableTag<std::int32_t>;
using IntVec = hn::Vec<IntTag>;
using WordTag = hn::ScalableTag<std::uint32_t>;
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

/// Adds the products of the four bytes of each lane: of codes, which are not negative, with a
/// folded query's.
template <bool kVnni>
HWY_INLINE IntVec add_fours(IntVec sum, WordVec codes, IntVec four) {
#if HWY_TARGET == HWY_AVX3
  if constexpr (kVnni) {
    // As an intrinsic it would need a function of another instruction set, into which compilers
    // differ in what they inline.
    asm("vpdpbusd %2, %1, %0" : "+v"(sum.raw) : "v"(codes.raw), "v"(four.raw));
    return sum;
  }
#else
  static_assert(!kVnni);
#endif
#if HWY_ARCH_X86
  // Bytes 0 and 2, then 1 and 3, as pairs of 16-bit integers.
  const IntTag d;
  const ShortTag ds;
  const hn::RebindToUnsigned<ShortTag> du;
  IntVec unused = hn::Zero(d);
  const auto even = hn::And(hn::BitCast(du, codes), hn::Set(du, 0xff));
  const auto odd = hn::ShiftRight<8>(hn::BitCast(du, codes));
  const auto both = hn::BitCast(ds, four);
  sum = hn::ReorderWidenMulAccumulate(d, hn::BitCast(ds, even),
                                      hn::ShiftRight<8>(hn::ShiftLeft<8>(both)), sum, unused);
  return hn::ReorderWidenMulAccumulate(d, hn::BitCast(ds, odd), hn::ShiftRight<8>(both), sum,
                                       unused);
#else
  const IntTag d;
  const IntVec all = hn::BitCast(d, codes);
  const IntVec byte = hn::Set(d, 0xff);
  const auto add = [&](IntVec code, IntVec query) HWY_ATTR {
    sum = hn::Add(sum, hn::Mul(hn::And(code, byte), hn::ShiftRight<24>(query)));
  };
  add(all, hn::ShiftLeft<24>(four));
  add(hn::ShiftRight<8>(all), hn::ShiftLeft<16>(four));
  add(hn::ShiftRight<16>(all), hn::ShiftLeft<8>(four));
  add(hn::ShiftRight<24>(all), four);
  return sum;
#endif
}

/// Vectors whose lanes add up to the sum of all integers of a query, exactly.
HWY_INLINE FloatVec sums_of_fours(const std::int32_t* fours, std::uint32_t dim) {
  const IntTag d;
  IntVec sum = hn::Zero(d);
  for (std::size_t n = 0; n < dim / 4; n += kLanes) {
    sum = add_fours<false>(sum, hn::Set(WordTag(), 0x01010101u), hn::LoadU(d, fours + n));
  }
  return hn::ConvertTo(FloatTag(), sum);
}

/// One vector's width of `kTiles` tiles against `kRows` queries.
template <int kBits, bool kVnni, std::size_t kRows, std::size_t kTiles>
HWY_INLINE void score_part(const TileJob& job, std::size_t part) {
  const IntTag di;
  const WordTag dw;
  constexpr std::size_t kFours = 8 / kBits;
  const WordVec mask = hn::Set(dw, ((1u << kBits) - 1) * 0x01010101u);
  IntVec sums[kRows][kTiles];
  for (std::size_t r = 0; r < kRows; ++r) {
    for (std::size_t t = 0; t < kTiles; ++t) sums[r][t] = hn::Zero(di);
  }
  for (std::size_t line = 0; line < job.tile_lines; ++line) {
    WordVec words[kTiles];
    for (std::size_t t = 0; t < kTiles; ++t) {
      const CodeLine& codes = job.tiles[t * job.tile_lines + line];
      words[t] = hn::Load(
          dw, reinterpret_cast<const std::uint32_t*>(codes.bytes) + part * hn::MaxLanes(dw));
      // Tiles side by side are more streams than the hardware follows by itself.
      if (part == 0) prefetch_line(job.next + t * job.tile_lines + line);
    }
    // Unrolled, compilers move the masks of all fours to the front and the sums to memory.
    HWY_UNROLL(1)
    for (std::size_t n = 0; n < kFours; ++n) {
      WordVec codes[kTiles];
      for (std::size_t t = 0; t < kTiles; ++t) {
        // What the shift brings into a byte from the one above it is masked.
        codes[t] = hn::And(words[t], mask);
        words[t] = hn::ShiftRight<kBits>(words[t]);
      }
      for (std::size_t r = 0; r < kRows; ++r) {
        const IntVec four = hn::Set(di, job.queries->fours[r][line * kFours + n]);
        for (std::size_t t = 0; t < kTiles; ++t) {
          sums[r][t] = add_fours<kVnni>(sums[r][t], codes[t], four);
        }
      }
    }
  }
  const FloatTag d;
  for (std::size_t r = 0; r < kRows; ++r) {
    const FloatVec slope = hn::Set(d, job.queries->slopes[r]);
    const FloatVec offset = hn::Set(d, job.queries->offsets[r]);
    for (std::size_t t = 0; t < kTiles; ++t) {
      const FloatVec logits = hn::MulAdd(hn::ConvertTo(d, sums[r][t]), slope, offset);
      hn::StoreU(logits, d,
                 job.logits + r * job.logit_stride + t * KeyCodes::kTileTokens + part * kLanes);
    }
  }
}

template <int kBits, bool kVnni, std::size_t kRows, std::size_t kTiles>
HWY_INLINE void score_tiles(const TileJob& job) {
  for (std::size_t part = 0; part < kLineParts; ++part)
    score_part<kBits, kVnni, kRows, kTiles>(job, part);
}

#else  // No vectors: one code at a time.

inline constexpr std::size_t kTileStep = 1;

HWY_INLINE FloatVec sums_of_fours(const std::int32_t* fours, std::uint32_t dim) {
  std::int32_t sum = 0;
  for (std::size_t i = 0; i < dim; ++i) {
    sum += static_cast<std::int8_t>(fours[i / 4] >> 8 * (i % 4));
  }
  return hn::Set(FloatTag(), static_cast<float>(sum));
}

template <int kBits, bool kVnni, std::size_t kRows, std::size_t kTiles>
HWY_INLINE void score_tiles(const TileJob& job) {
  static_assert(kTiles == 1);
  constexpr std::size_t kFours = 8 / kBits;
  for (std::size_t token = 0; token < KeyCodes::kTileTokens; ++token) {
    std::int32_t sums[kRows] = {};
    for (std::size_t line = 0; line < job.tile_lines; ++line) {
      for (std::size_t c = 0; c < 4 * kFours; ++c) {
        const auto byte = std::to_integer<int>(job.tiles[line].bytes[4 * token + c % 4]);
        const int code = (byte >> (c / 4 * kBits)) & ((1 << kBits) - 1);
        for (std::size_t r = 0; r < kRows; ++r) {
          const std::int32_t four = job.queries->fours[r][line * kFours + c / 4];
          sums[r] += code * static_cast<std::int8_t>(four >> 8 * (c % 4));
        }
      }
    }
    for (std::size_t r = 0; r < kRows; ++r) {
      job.logits[r * job.logit_stride + token] =
          static_cast<float>(sums[r]) * job.queries->slopes[r] + job.queries->offsets[r];
    }
  }
}

#endif

/// The tiles of a run that have a bit in `tiles`.
template <int kBits, bool kVnni, std::size_t kRows>
void score_run(const TileJob& job, unsigned tiles) {
  constexpr unsigned kStepMask = (1u << kTileStep) - 1;
  for (std::size_t t = 0; t < KeyCodes::kRunTiles;) {
    TileJob part = job;
    part.tiles += t * job.tile_lines;
    part.next += t * job.tile_lines;
    part.logits += t * KeyCodes::kTileTokens;
    if (t % kTileStep == 0 && ((tiles >> t) & kStepMask) == kStepMask) {
      score_tiles<kBits, kVnni, kRows, kTileStep>(part);
      t += kTileStep;
      continue;
    }
    if ((tiles >> t) & 1) score_tiles<kBits, kVnni, kRows, 1>(part);
    ++t;
  }
}

template <int kBits, std::size_t kRows>
void score_run_as(const TileJob& job, unsigned tiles) {
#if HWY_TARGET == HWY_AVX3
  if (simd_vnni()) return score_run<kBits, true, kRows>(job, tiles);
#endif
  score_run<kBits, false, kRows>(job, tiles);
}

/// logits[0, count) = cap * tanh(logits / cap); count is a multiple of 16.
HWY_INLINE void cap_logits(float cap, float* logits, std::size_t count) {
  const FloatTag d;
  const FloatVec inverse = hn::Set(d, 1.0f / cap);
  for (std::size_t i = 0; i < count; i += kLanes) {
    const FloatVec x = hn::Mul(hn::LoadU(d, logits + i), inverse);
    hn::StoreU(hn::Mul(hn::Tanh(d, x), hn::Set(d, cap)), d, logits + i);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace kvtier
HWY_AFTER_NAMESPACE();

#endif  // include guard per target
