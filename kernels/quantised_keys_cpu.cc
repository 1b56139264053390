#include "kernels/quantised_keys.h"

#include "kernels/simd_config.h"
#include "kernels/simd_targets.h"
#include "memory/check.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

// clang-format off
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/quantised_keys_cpu.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>
#include <hwy/contrib/math/math-inl.h>
#include "kernels/simd_rows-inl.h"
// clang-format on

#ifndef KVTIER_KERNELS_QUANTISED_KEYS_CPU_ONCE_
#define KVTIER_KERNELS_QUANTISED_KEYS_CPU_ONCE_
namespace kvtier {
namespace {

/// Channels with the padding of the last line.
constexpr std::size_t kMaxCodedChannels = KeyCodes::kDimMax + 16;
/// Queries that are scored in one pass over the codes.
constexpr std::size_t kCodedRows = 4;

/// What a folded query is rounded to: integers up to this, either way.
constexpr float kFoldedLevels = 127.0f;
/// A query whose largest product with a step is below this is taken as zero.
constexpr float kLeastFolded = 0x1p-100f;

/// Queries folded with one run's steps: integers in [-127, 127] in fours of channels, and
/// logit = slope * (sum of code * folded) + offset.
struct FoldedQueries {
  alignas(64) std::int8_t folded[kCodedRows][kMaxCodedChannels];
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
        std::int32_t channels;
        std::memcpy(&channels, job.queries->folded[r] + 4 * (line * kFours + n), sizeof(channels));
        const IntVec four = hn::Set(di, channels);
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

template <int kBits, bool kVnni, std::size_t kRows, std::size_t kTiles>
HWY_INLINE void score_tiles(const TileJob& job) {
  static_assert(kTiles == 1);
  for (std::size_t token = 0; token < KeyCodes::kTileTokens; ++token) {
    std::int32_t sums[kRows] = {};
    for (std::size_t line = 0; line < job.tile_lines; ++line) {
      for (std::size_t c = 0; c < 32 / kBits; ++c) {
        const auto byte = std::to_integer<int>(job.tiles[line].bytes[4 * token + c % 4]);
        const int code = (byte >> (c / 4 * kBits)) & ((1 << kBits) - 1);
        for (std::size_t r = 0; r < kRows; ++r) {
          sums[r] += code * job.queries->folded[r][line * (32 / kBits) + c];
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

/// logits[0, count) = cap * tanh(logits / cap); count is a multiple of 16.
void cap_logits(float cap, float* logits, std::size_t count) {
  const FloatTag d;
  const FloatVec inverse = hn::Set(d, 1.0f / cap);
  for (std::size_t i = 0; i < count; i += kLanes) {
    const FloatVec x = hn::Mul(hn::LoadU(d, logits + i), inverse);
    hn::StoreU(hn::Mul(hn::Tanh(d, x), hn::Set(d, cap)), d, logits + i);
  }
}

/// Folds `kRows` queries, padded with zeros to whole vectors, with a run's steps and smallest keys,
/// each of which is converted once for all of them.
///
/// Rounding a folded query puts a dot off by the rounding times the code. Codes are therefore taken
/// from the middle of their range: `offset` has the exact product with the middle, less what the
/// rounded query makes of it.
template <typename T, std::size_t kRows>
void fold_queries(const KeyCodes& codes, float scale, const CodeLine* run, QueryRows queries,
                  FoldedQueries& result) {
  const FloatTag d;
  alignas(64) float products[kRows][kMaxCodedChannels];
  const auto* steps = reinterpret_cast<const T*>(run + KeyCodes::kRunTiles * codes.tile_lines());
  const T* least = steps + codes.dim;
  const float middle = 0.5f * static_cast<float>((1u << codes.bits) - 1);
  FloatVec offsets[kCodedRows];
  FloatVec rounded[kCodedRows];
  FloatVec largest[kRows];
  for (FloatVec& offset : offsets) offset = hn::Zero(d);
  for (FloatVec& sum : rounded) sum = hn::Zero(d);
  for (FloatVec& most : largest) most = hn::Zero(d);
  const auto fold = [&](std::size_t i, FloatVec step, FloatVec smallest) HWY_ATTR {
    const FloatVec centre = hn::MulAdd(step, hn::Set(d, middle), smallest);
    HWY_UNROLL(4)
    for (std::size_t r = 0; r < kRows; ++r) {
      const FloatVec q = hn::Load(d, queries.data + r * queries.stride + i);
      const FloatVec product = hn::Mul(q, step);
      hn::Store(product, d, products[r] + i);
      offsets[r] = hn::MulAdd(q, centre, offsets[r]);
      largest[r] = hn::Max(largest[r], hn::Abs(product));
    }
  };
  std::size_t i = 0;
  for (; i + kLanes <= codes.dim; i += kLanes) {
    fold(i, load_as_f32(d, steps + i), load_as_f32(d, least + i));
  }
  if (kNeedsTail && i < codes.dim) {
    fold(i, load_tail_as_f32(steps + i), load_tail_as_f32(least + i));
  }
  // Adding it leaves a small number's integer part in the low bits of the sum, rounded to nearest.
  const FloatVec magic = hn::Set(d, 0x1.8p23f);
  const hn::RebindToSigned<FloatTag> di;
  const hn::Rebind<std::int8_t, FloatTag> db;
  for (std::size_t r = 0; r < kRows; ++r) {
    const float top = hn::GetLane(hn::MaxOfLanes(d, largest[r]));
    result.slopes[r] = scale * (top / kFoldedLevels);
    // Integers would hide that a product overflowed.
    if (!std::isfinite(top)) result.slopes[r] = std::numeric_limits<float>::quiet_NaN();
    const FloatVec up = hn::Set(d, top > kLeastFolded ? kFoldedLevels / top : 0.0f);
    for (std::size_t c = 0; c < codes.dim; c += kLanes) {
      const FloatVec sum = hn::MulAdd(hn::Load(d, products[r] + c), up, magic);
      rounded[r] = hn::Add(rounded[r], hn::Sub(sum, magic));
      const auto integers = hn::Sub(hn::BitCast(di, sum), hn::BitCast(di, magic));
      hn::StoreU(hn::DemoteTo(db, integers), db, result.folded[r] + c);
    }
  }
  float exact[kCodedRows];
  float sums[kCodedRows];
  store_four_sums(offsets[0], offsets[1], offsets[2], offsets[3], exact);
  store_four_sums(rounded[0], rounded[1], rounded[2], rounded[3], sums);
  for (std::size_t r = 0; r < kRows; ++r) {
    result.offsets[r] = scale * exact[r] - result.slopes[r] * (middle * sums[r]);
  }
}

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

/// Every run against `kRows` queries.
template <typename T, std::size_t kRows>
void score_runs(const SoftmaxOptions& softmax, const CodedTask& task, QueryRows queries,
                float* logits) {
  const KeyCodes& codes = task.codes;
  FoldedQueries folded;
  // The channels that fill up the last line have the code 0; they must not be read unset.
  std::memset(folded.folded, 0, sizeof(folded.folded));
  for (std::size_t r = 0; r < task.run_count; ++r) {
    const unsigned tiles = task.tiles == nullptr ? 15u : task.tiles[r];
    if (tiles == 0) continue;
    const CodeLine* run = task.runs + r * codes.run_lines();
    fold_queries<T, kRows>(codes, softmax.scale, run, queries, folded);
    const bool last = r + 1 == task.run_count && !task.goes_on;
    const CodeLine* next = last ? run : run + codes.run_lines();
    for (std::size_t i = KeyCodes::kRunTiles * codes.tile_lines(); i < codes.run_lines(); ++i) {
      prefetch_line(next + i);
    }
    const TileJob job{.tiles = run,
                      .next = next,
                      .tile_lines = codes.tile_lines(),
                      .queries = &folded,
                      .logits = logits + r * KeyCodes::kRunTokens,
                      .logit_stride = task.logit_stride};
    codes.bits == 4 ? score_run_as<4, kRows>(job, tiles) : score_run_as<2, kRows>(job, tiles);
    if (softmax.logit_cap <= 0.0f) continue;
    for (std::size_t i = 0; i < kRows * KeyCodes::kRunTiles; ++i) {
      const std::size_t t = i % KeyCodes::kRunTiles;
      if (((tiles >> t) & 1) == 0) continue;
      cap_logits(
          softmax.logit_cap,
          job.logits + i / KeyCodes::kRunTiles * job.logit_stride + t * KeyCodes::kTileTokens,
          KeyCodes::kTileTokens);
    }
  }
}

template <typename T>
void score_typed(const SoftmaxOptions& softmax, const CodedTask& task) {
  const std::size_t dim = task.codes.dim;
  const std::size_t stride = (dim + kLanes - 1) / kLanes * kLanes;
  alignas(64) float padded[kCodedRows * kMaxCodedChannels];
  for (std::size_t first = 0; first < task.query_count;) {
    const std::size_t count = even_piece(task.query_count - first, kCodedRows);
    for (std::size_t q = 0; q < count; ++q) {
      std::copy_n(task.queries + (first + q) * task.query_stride, dim, padded + q * stride);
      std::fill(padded + q * stride + dim, padded + (q + 1) * stride, 0.0f);
    }
    with_constant<kCodedRows>(count, [&](auto rows) HWY_ATTR {
      score_runs<T, rows.value>(softmax, task, QueryRows{padded, stride},
                                task.logits + first * task.logit_stride);
    });
    first += count;
  }
}

}  // namespace

void score_coded_runs(const SoftmaxOptions& softmax, const CodedTask& task) {
  switch (task.codes.dtype) {
    case DType::kF16: return score_typed<hwy::float16_t>(softmax, task);
    case DType::kBF16: return score_typed<hwy::bfloat16_t>(softmax, task);
    case DType::kF32: return score_typed<float>(softmax, task);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace kvtier
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvtier {

HWY_EXPORT(score_coded_runs);

void score_codes(const SoftmaxOptions& softmax, const CodedTask& task) {
  KVTIER_CHECK(check_codes(task.codes).ok(), "codes of {}, {} bits", task.codes.dim,
               task.codes.bits);
  HWY_DYNAMIC_DISPATCH(score_coded_runs)(softmax, task);
}

}  // namespace kvtier
#endif  // HWY_ONCE
