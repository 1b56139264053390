// From a tile's dots to weights against a running maximum, compiled once per instruction set.

#if defined(KVTIER_KERNELS_SIMD_SOFTMAX_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KVTIER_KERNELS_SIMD_SOFTMAX_INL_H_
#undef KVTIER_KERNELS_SIMD_SOFTMAX_INL_H_
#else
#define KVTIER_KERNELS_SIMD_SOFTMAX_INL_H_
#endif

#include "kernels/partial_attention.h"
#include "kernels/simd_rows-inl.h"

#include <hwy/contrib/math/math-inl.h>
#include <hwy/highway.h>

#include <algorithm>
#include <cmath>
#include <cstddef>

HWY_BEFORE_NAMESPACE();
namespace kvtier {
namespace HWY_NAMESPACE {

inline constexpr std::size_t kTile = kAttentionTileTokens;
static_assert(kTile % 16 == 0, "logits of a tile are whole vectors");

/// Scales and caps one row of dots; what lies behind `tokens` becomes "masked".
HWY_INLINE void finish_logits(const SoftmaxOptions& softmax, std::size_t tokens, float* logits) {
  const FloatTag d;
  const FloatVec scale = hn::Set(d, softmax.scale);
  for (std::size_t t = 0; t < tokens; t += kLanes) {
    hn::Store(hn::Mul(hn::Load(d, logits + t), scale), d, logits + t);
  }
  if (softmax.logit_cap > 0.0f) {
    const FloatVec cap = hn::Set(d, softmax.logit_cap);
    const FloatVec inverse = hn::Set(d, 1.0f / softmax.logit_cap);
    for (std::size_t t = 0; t < tokens; t += kLanes) {
      const FloatVec capped = hn::Tanh(d, hn::Mul(hn::Load(d, logits + t), inverse));
      hn::Store(hn::Mul(capped, cap), d, logits + t);
    }
  }
  std::fill(logits + tokens, logits + kTile, kEmptyLse);
}

/// Turns one row of logits into weights against the running maximum and returns the factor that
/// earlier weights shrink by.
HWY_INLINE float weigh_row(float* logits, float& max, float& sum) {
  const FloatTag d;
  FloatVec tops = hn::Set(d, max);
  for (std::size_t t = 0; t < kTile; t += kLanes) tops = hn::Max(tops, hn::Load(d, logits + t));
  const float top = hn::GetLane(hn::MaxOfLanes(d, tops));
  if (top == kEmptyLse) {
    // Nothing seen so far: -inf minus -inf is no number, so the weights are set by hand.
    std::fill(logits, logits + kTile, 0.0f);
    return 1.0f;
  }
  const FloatVec shift = hn::Set(d, top);
  FloatVec sums = hn::Zero(d);
  for (std::size_t t = 0; t < kTile; t += kLanes) {
    const FloatVec weight = hn::Exp(d, hn::Sub(hn::Load(d, logits + t), shift));
    hn::Store(weight, d, logits + t);
    sums = hn::Add(sums, weight);
  }
  const float shrink = max == top ? 1.0f : std::exp(max - top);
  sum = sum * shrink + hn::GetLane(hn::SumOfLanes(d, sums));
  max = top;
  return shrink;
}

HWY_INLINE void scale_row(float factor, std::size_t count, float* row) {
  const FloatTag d;
  const FloatVec f = hn::Set(d, factor);
  for (std::size_t i = 0; i < count; i += kLanes)
    hn::Store(hn::Mul(hn::Load(d, row + i), f), d, row + i);
}

}  // namespace HWY_NAMESPACE
}  // namespace kvtier
HWY_AFTER_NAMESPACE();

#endif  // include guard per target
