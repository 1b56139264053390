#include "kernels/int4_rows.h"

#include "kernels/simd_config.h"
#include "memory/check.h"
#include "memory/dtype.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

// clang-format off
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/int4_rows_cpu.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>
#include <hwy/contrib/math/math-inl.h>
#include "kernels/simd_rows-inl.h"
// clang-format on

#ifndef KVTIER_KERNELS_INT4_ROWS_CPU_ONCE_
#define KVTIER_KERNELS_INT4_ROWS_CPU_ONCE_
namespace kvtier {
namespace {

/// Rows that one worker scores at a time: enough that bringing the queries into order costs little.
constexpr std::size_t kInt4SliceRows = 2048;
constexpr std::uint32_t kMaxInt4Dim = 576;
constexpr std::size_t kMaxInt4Words = int4_words(kMaxInt4Dim);
constexpr float kQueryLevels = 32767.0f;

/// Rows [first, first + count) of one task.
struct Int4Slice {
  const SoftmaxOptions& softmax;
  const Int4Task& task;
  std::size_t first;
  std::size_t count;
};

/// A few queries as 16-bit integers, [query][nibble][word].
template <std::size_t kQueries>
struct IntegerQueries {
  alignas(64) std::int16_t elements[kQueries][4 * kMaxInt4Words];
  std::int32_t start[kQueries];  ///< Takes the codes' offset of 8 back.
  float scale[kQueries];
};

/// Brings one query into the order of the codes; elements behind `dim` are zero.
template <std::size_t kQueries>
void set_query(const Int4Task& task, std::size_t query, std::size_t at,
               IntegerQueries<kQueries>& integers) {
  const std::size_t words = int4_words(task.rows.dim);
  const float* source = task.queries + query * task.query_stride;
  float most = 0.0f;
  for (std::size_t i = 0; i < task.rows.dim; ++i) most = std::max(most, std::abs(source[i]));
  const float inverse = most > 0.0f ? kQueryLevels / most : 0.0f;
  std::int32_t sum = 0;
  std::fill_n(integers.elements[at], 4 * words, std::int16_t{0});
  for (std::size_t i = 0; i < task.rows.dim; ++i) {
    // The quotient may exceed the levels by a rounding.
    const float level = std::clamp(source[i] * inverse, -kQueryLevels, kQueryLevels);
    const auto rounded = static_cast<std::int16_t>(std::lrint(level));
    integers.elements[at][i] = rounded;
    sum += rounded;
  }
  integers.start[at] = -8 * sum;
  integers.scale[at] = most / kQueryLevels;
}

}  // namespace
}  // namespace kvtier
#endif

HWY_BEFORE_NAMESPACE();
namespace kvtier {
namespace HWY_NAMESPACE {
namespace {

#if HWY_MAX_BYTES >= 16
/// A row is whole vectors of these. Wider ones were slower: one multiply-add a cycle instead of
/// two.
using CodeTag = hn::CappedTag<std::int16_t, 16>;
using SumTag = hn::RepartitionToWide<CodeTag>;
using SumVec = hn::Vec<SumTag>;

/// Adds the blocks of four sums of a vector.
template <class D, class V>
HWY_INLINE hn::Vec<hn::FixedTag<std::int32_t, 4>> fold_blocks([[maybe_unused]] D d, V sums) {
  if constexpr (hn::MaxLanes(D()) <= 4) {
    return sums;
  } else {
    const hn::Half<D> half;
    return fold_blocks(half, hn::Add(hn::LowerHalf(half, sums), hn::UpperHalf(half, sums)));
  }
}
/// Queries whose sums over four rows stay in registers.
#if HWY_TARGET <= HWY_AVX3 || HWY_ARCH_ARM
inline constexpr std::size_t kInt4Queries = 4;
#else
inline constexpr std::size_t kInt4Queries = 2;
#endif

/// target[q * stride + r] = the integer dot of four rows with each query.
template <std::size_t kQueries>
void dot_four(const std::uint16_t* const* rows, std::size_t words,
              const IntegerQueries<kInt4Queries>& queries, float* target, std::size_t stride) {
  const CodeTag d;
  const hn::RebindToUnsigned<CodeTag> du;
  const SumTag d32;
  const auto mask = hn::Set(du, 15);
  SumVec sums[kQueries][4];
  SumVec more[kQueries][4];
  for (std::size_t q = 0; q < kQueries; ++q) {
    for (std::size_t r = 0; r < 4; ++r) sums[q][r] = more[q][r] = hn::Zero(d32);
  }
  for (std::size_t w = 0; w < words; w += hn::MaxLanes(CodeTag())) {
    auto four0 = hn::LoadU(du, rows[0] + w);
    auto four1 = hn::LoadU(du, rows[1] + w);
    auto four2 = hn::LoadU(du, rows[2] + w);
    auto four3 = hn::LoadU(du, rows[3] + w);
    for (std::size_t nibble = 0; nibble < 4; ++nibble) {
      const auto codes0 = hn::BitCast(d, hn::And(four0, mask));
      const auto codes1 = hn::BitCast(d, hn::And(four1, mask));
      const auto codes2 = hn::BitCast(d, hn::And(four2, mask));
      const auto codes3 = hn::BitCast(d, hn::And(four3, mask));
      for (std::size_t q = 0; q < kQueries; ++q) {
        const auto query = hn::LoadU(d, queries.elements[q] + nibble * words + w);
        sums[q][0] = hn::ReorderWidenMulAccumulate(d32, codes0, query, sums[q][0], more[q][0]);
        sums[q][1] = hn::ReorderWidenMulAccumulate(d32, codes1, query, sums[q][1], more[q][1]);
        sums[q][2] = hn::ReorderWidenMulAccumulate(d32, codes2, query, sums[q][2], more[q][2]);
        sums[q][3] = hn::ReorderWidenMulAccumulate(d32, codes3, query, sums[q][3], more[q][3]);
      }
      four0 = hn::ShiftRight<4>(four0);
      four1 = hn::ShiftRight<4>(four1);
      four2 = hn::ShiftRight<4>(four2);
      four3 = hn::ShiftRight<4>(four3);
    }
  }
  for (std::size_t q = 0; q < kQueries; ++q) {
    // 32-bit integers throughout, so nothing is rounded before the offset is taken back.
    const hn::RepartitionToWide<hn::RebindToUnsigned<SumTag>> wide;
    for (std::size_t r = 0; r < 4; ++r) sums[q][r] = hn::Add(sums[q][r], more[q][r]);
    const auto ab = hn::BitCast(wide, hn::Add(hn::InterleaveLower(d32, sums[q][0], sums[q][1]),
                                              hn::InterleaveUpper(d32, sums[q][0], sums[q][1])));
    const auto cd = hn::BitCast(wide, hn::Add(hn::InterleaveLower(d32, sums[q][2], sums[q][3]),
                                              hn::InterleaveUpper(d32, sums[q][2], sums[q][3])));
    const SumVec four = hn::Add(hn::BitCast(d32, hn::InterleaveLower(wide, ab, cd)),
                                hn::BitCast(d32, hn::InterleaveUpper(wide, ab, cd)));
    const hn::FixedTag<std::int32_t, 4> d4;
    const hn::FixedTag<float, 4> df4;
    const auto exact = hn::Add(fold_blocks(d32, four), hn::Set(d4, queries.start[q]));
    hn::StoreU(hn::ConvertTo(df4, exact), df4, target + q * stride);
  }
}

#else
inline constexpr std::size_t kInt4Queries = 1;

template <std::size_t kQueries>
void dot_four(const std::uint16_t* const* rows, std::size_t words,
              const IntegerQueries<kInt4Queries>& queries, float* target, std::size_t stride) {
  for (std::size_t q = 0; q < kQueries; ++q) {
    for (std::size_t r = 0; r < 4; ++r) {
      std::int32_t sum = queries.start[q];
      for (std::size_t i = 0; i < 4 * words; ++i) {
        sum += (rows[r][i % words] >> (4 * (i / words)) & 15) * queries.elements[q][i];
      }
      target[q * stride + r] = static_cast<float>(sum);
    }
  }
}
#endif

/// Integer dots to logits: times both scales, with what was taken off the rows, capped.
void finish_int4(const Int4Slice& slice, float query_scale, float dot_offset, float* logits) {
  const FloatTag d;
  const std::uint16_t* scales = slice.task.rows.scales + slice.first;
  const float factor = query_scale * slice.softmax.scale;
  const float offset = dot_offset * slice.softmax.scale;
  std::size_t i = 0;
  const hn::Rebind<std::uint16_t, FloatTag> narrow;
  const hn::RebindToUnsigned<FloatTag> bits;
  for (; i + kLanes <= slice.count; i += kLanes) {
    const auto scale =
        hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(bits, hn::LoadU(narrow, scales + i))));
    const FloatVec logit = hn::MulAdd(hn::LoadU(d, logits + i), hn::Mul(scale, hn::Set(d, factor)),
                                      hn::Set(d, offset));
    hn::StoreU(logit, d, logits + i);
  }
  for (; i < slice.count; ++i) {
    logits[i] = logits[i] * (bf16_to_f32(scales[i]) * factor) + offset;
  }
  const float cap = slice.softmax.logit_cap;
  if (cap <= 0.0f) return;
  for (i = 0; i < slice.count; ++i) logits[i] = cap * std::tanh(logits[i] / cap);
}

}  // namespace

void score_int4_slice(const Int4Slice& slice) {
  const Int4Task& task = slice.task;
  const std::size_t words = int4_words(task.rows.dim);
  IntegerQueries<kInt4Queries> queries;
  float four[kInt4Queries * 4] = {};
  for (std::size_t query = 0; query < task.query_count;) {
    const std::size_t count = even_piece(task.query_count - query, kInt4Queries);
    for (std::size_t q = 0; q < count; ++q) set_query(task, query + q, q, queries);
    float* logits = task.logits + query * task.logit_stride + slice.first;
    with_constant<kInt4Queries>(count, [&](auto constant) HWY_ATTR {
      constexpr std::size_t kQueries = decltype(constant)::value;
      for (std::size_t r = 0; r < slice.count; r += 4) {
        const std::size_t take = std::min<std::size_t>(4, slice.count - r);
        const std::uint16_t* rows[4];
        for (std::size_t i = 0; i < 4; ++i) {
          rows[i] = task.rows.words + (slice.first + r + std::min(i, take - 1)) * words;
        }
        const bool ragged = take < 4;
        dot_four<kQueries>(rows, words, queries, ragged ? four : logits + r,
                           ragged ? 4 : task.logit_stride);
        if (!ragged) continue;
        for (std::size_t q = 0; q < kQueries; ++q) {
          std::copy_n(four + q * 4, take, logits + q * task.logit_stride + r);
        }
      }
    });
    for (std::size_t q = 0; q < count; ++q) {
      const float offset = task.offsets == nullptr ? 0.0f : task.offsets[query + q];
      finish_int4(slice, queries.scale[q], offset, logits + q * task.logit_stride);
    }
    query += count;
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace kvtier
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvtier {

HWY_EXPORT(score_int4_slice);

namespace {

std::size_t slices_of(const Int4Task& task) {
  return task.query_count == 0 ? 0 : (task.rows.rows + kInt4SliceRows - 1) / kInt4SliceRows;
}

}  // namespace

void quantise_int4(std::span<const float> row, std::uint16_t* words, std::uint16_t& scale) {
  const std::size_t count = int4_words(static_cast<std::uint32_t>(row.size()));
  float most = 0.0f;
  bool finite = true;
  for (float value : row) {
    most = std::max(most, std::abs(value));
    finite &= std::isfinite(value);
  }
  // Code 8 is zero, also of the elements behind the row's end.
  std::fill_n(words, count, std::uint16_t{0x8888});
  if (!finite) {
    scale = f32_to_bf16(std::numeric_limits<float>::infinity());
    return;
  }
  scale = f32_to_bf16(most / 7.0f);
  // Up, so that the largest element still has a code. The next bit pattern is the next number.
  if (bf16_to_f32(scale) * 7.0f < most) ++scale;
  const float step = bf16_to_f32(scale);
  if (step == 0.0f || !std::isfinite(step)) return;
  // Not multiplied by the inverse, which overflows for a step that is barely a number.
  for (std::size_t i = 0; i < row.size(); ++i) {
    const auto code = static_cast<std::uint32_t>(std::clamp(row[i] / step, -7.0f, 7.0f) + 8.5f);
    const std::size_t shift = 4 * (i / count);
    std::uint16_t& word = words[i % count];
    word = static_cast<std::uint16_t>((word & ~(15u << shift)) | code << shift);
  }
}

void dequantise_int4(const std::uint16_t* words, std::uint16_t scale, std::span<float> row) {
  const std::size_t count = int4_words(static_cast<std::uint32_t>(row.size()));
  for (std::size_t i = 0; i < row.size(); ++i) {
    const int code = (words[i % count] >> (4 * (i / count)) & 15) - 8;
    row[i] = static_cast<float>(code) * bf16_to_f32(scale);
  }
}

Status score_int4(const SoftmaxOptions& softmax, std::span<const Int4Task> tasks,
                  WorkerPool& pool) {
  std::size_t slices = 0;
  for (const Int4Task& task : tasks) {
    if (task.rows.dim % 8 != 0 || task.rows.dim > kMaxInt4Dim || task.query_count > 128) {
      return unsupported(fmt::format(
          "scoring 4-bit rows of {} against {} queries: expected a multiple of 8 up to {}, and up "
          "to 128 queries",
          task.rows.dim, task.query_count, kMaxInt4Dim));
    }
    slices += slices_of(task);
  }
  struct Context {
    const SoftmaxOptions& softmax;
    std::span<const Int4Task> tasks;
  } context{softmax, tasks};
  pool.run(slices, [&context](std::size_t slice) {
    const Int4Task* task = context.tasks.data();
    for (; slice >= slices_of(*task); ++task) slice -= slices_of(*task);
    const std::size_t first = slice * kInt4SliceRows;
    HWY_DYNAMIC_DISPATCH(score_int4_slice)
    ({context.softmax, *task, first, std::min(kInt4SliceRows, task->rows.rows - first)});
  });
  return {};
}

}  // namespace kvtier
#endif  // HWY_ONCE
