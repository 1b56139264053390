#include "kernels/weigh_cells.h"

#include "kernels/kv_view.h"
#include "kernels/simd_config.h"
#include "memory/check.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

// clang-format off
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/weigh_cells_cpu.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>
#include "kernels/simd_rows-inl.h"
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace kvtier {
namespace HWY_NAMESPACE {
namespace {

/// Vectors whose maxima and sums do not wait for each other.
inline constexpr std::size_t kChains = 4;
inline constexpr std::size_t kStride = kChains * kLanes;
static_assert(kCellRowTokens % kStride == 0);

/// The largest of whole strides of logits, or not-a-number if one is not finite.
float largest_finite(const float* logits, std::size_t count) {
  const FloatTag d;
  const hn::RebindToSigned<FloatTag> di;
  const FloatVec lowest = hn::Set(d, std::numeric_limits<float>::lowest());
  FloatVec tops[kChains] = {lowest, lowest, lowest, lowest};
  // Without its sign a float's bits ascend with its size: infinities and NaN are above the others.
  auto sizes = hn::Zero(di);
  for (std::size_t i = 0; i < count; i += kStride) {
    for (std::size_t k = 0; k < kChains; ++k) {
      const FloatVec x = hn::Load(d, logits + i + k * kLanes);
      tops[k] = hn::Max(tops[k], x);
      sizes = hn::Max(sizes, hn::BitCast(di, hn::Abs(x)));
    }
  }
  constexpr std::int32_t kInfinity = 0x7f800000;
  if (!hn::AllTrue(di, hn::Lt(sizes, hn::Set(di, kInfinity)))) {
    return std::numeric_limits<float>::quiet_NaN();
  }
  const FloatVec top = hn::Max(hn::Max(tops[0], tops[1]), hn::Max(tops[2], tops[3]));
  return hn::GetLane(hn::MaxOfLanes(d, top));
}

/// exp(x) for x <= 0: 2^n times a polynomial of what is left of x, at most log(2) / 2 either way,
/// where the series ends at the sixth power with an error of 2e-7. Highway's is good for every x
/// and takes more steps. Where 2^n would not be a normal number the result is zero.
HWY_INLINE FloatVec exp_of_negative(FloatVec x) {
  const FloatTag d;
  const hn::RebindToSigned<FloatTag> di;
  // Adding it leaves the integer nearest to a small number in the low bits of the sum.
  const FloatVec magic = hn::Set(d, 0x1.8p23f);
  const FloatVec sum = hn::MulAdd(x, hn::Set(d, 1.44269504f), magic);
  const FloatVec n = hn::Sub(sum, magic);
  // log(2) in two parts, of which n times the first is exact.
  FloatVec rest = hn::NegMulAdd(n, hn::Set(d, 0x1.62ep-1f), x);
  rest = hn::NegMulAdd(n, hn::Set(d, 0x1.0bfbe8p-15f), rest);
  FloatVec p = hn::MulAdd(rest, hn::Set(d, 1.0f / 720), hn::Set(d, 1.0f / 120));
  p = hn::MulAdd(p, rest, hn::Set(d, 1.0f / 24));
  p = hn::MulAdd(p, rest, hn::Set(d, 1.0f / 6));
  p = hn::MulAdd(p, rest, hn::Set(d, 0.5f));
  p = hn::MulAdd(p, rest, hn::Set(d, 1.0f));
  p = hn::MulAdd(p, rest, hn::Set(d, 1.0f));
  const auto bits = hn::Add(hn::BitCast(di, p), hn::ShiftLeft<23>(hn::BitCast(di, sum)));
  return hn::IfThenElseZero(hn::Gt(x, hn::Set(d, -87.0f)), hn::BitCast(d, bits));
}

/// exp(logit - top) in place, of whole strides; returns their sum. A thousand positive terms in
/// 64 chains: float32 is exact enough.
float exp_and_sum(float* logits, std::size_t count, float top) {
  const FloatTag d;
  const FloatVec shift = hn::Set(d, top);
  FloatVec sums[kChains] = {hn::Zero(d), hn::Zero(d), hn::Zero(d), hn::Zero(d)};
  for (std::size_t i = 0; i < count; i += kStride) {
    for (std::size_t k = 0; k < kChains; ++k) {
      float* at = logits + i + k * kLanes;
      const FloatVec weight = exp_of_negative(hn::Sub(hn::Load(d, at), shift));
      hn::Store(weight, d, at);
      sums[k] = hn::Add(sums[k], weight);
    }
  }
  const FloatVec sum = hn::Add(hn::Add(sums[0], sums[1]), hn::Add(sums[2], sums[3]));
  return hn::GetLane(hn::SumOfLanes(d, sum));
}

/// row[i] = row[2 i] + row[2 i + 1], in place: what is written has been read.
void add_neighbours(float* row, std::size_t count) {
  std::size_t i = 0;
#if HWY_MAX_BYTES >= 16
  const FloatTag d;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    const FloatVec low = hn::Load(d, row + i);
    const FloatVec high = hn::Load(d, row + i + kLanes);
    const FloatVec sums = hn::Add(hn::ConcatEven(d, high, low), hn::ConcatOdd(d, high, low));
    hn::Store(sums, d, row + i / 2);
  }
#endif
  for (; i + 2 <= count; i += 2) row[i / 2] = row[i] + row[i + 1];
}

}  // namespace

float weigh_row_cells(const CellRow& row) {
  const std::size_t whole = (row.count + kStride - 1) / kStride * kStride;
  // exp() of it is zero, and it is no infinity.
  std::fill(row.logits + row.count, row.logits + whole, std::numeric_limits<float>::lowest());
  const float top = largest_finite(row.logits, whole);
  if (std::isnan(top)) return top;
  // Not one of the numbers that stand in for what is not there, unless all are as low as they.
  const float sum = exp_and_sum(row.logits, whole, top);
  const float lse = static_cast<float>(double{top} + std::log(double{sum}));
  if (row.begin >= row.end) return lse;
  std::fill(row.logits, row.logits + row.begin, 0.0f);
  const std::size_t cells_end = (row.end - 1) / row.cell_tokens + 1;
  std::size_t count = cells_end * row.cell_tokens;
  std::fill(row.logits + row.end, row.logits + std::max<std::size_t>(count, row.end), 0.0f);
  for (std::uint32_t size = row.cell_tokens; size > 1; size /= 2) {
    add_neighbours(row.logits, count);
    count /= 2;
  }
  const float share = 1.0f / sum;
  for (std::size_t c = row.begin / row.cell_tokens; c < cells_end; ++c) {
    row.cells[c] = row.logits[c] * share;
  }
  return lse;
}

}  // namespace HWY_NAMESPACE
}  // namespace kvtier
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvtier {

HWY_EXPORT(weigh_row_cells);

float weigh_cells(const CellRow& row) {
  KVTIER_CHECK(row.count <= kCellRowTokens && row.end <= row.count &&
                   std::has_single_bit(row.cell_tokens) && row.cell_tokens <= kCellRowTokens,
               "{} logits, [{}, {}) in cells of {}", row.count, row.begin, row.end,
               row.cell_tokens);
  if (row.count == 0) return kEmptyLse;
  return HWY_DYNAMIC_DISPATCH(weigh_row_cells)(row);
}

}  // namespace kvtier
#endif  // HWY_ONCE
