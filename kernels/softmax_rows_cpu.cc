#include "kernels/score_rows.h"
#include "kernels/simd_config.h"

#include <algorithm>
#include <cmath>

// From rows of logits to weights and sums of weights.

// clang-format off
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/softmax_rows_cpu.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>
#include <hwy/contrib/math/math-inl.h>
#include "kernels/simd_rows-inl.h"
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace kvtier {
namespace HWY_NAMESPACE {

/// The largest of a row that is not empty.
float top_of_row(std::span<const float> row) {
  const FloatTag d;
  if (row.size() < kLanes) return *std::max_element(row.begin(), row.end());
  // Four at a time: one maximum would wait for the other. The last vector overlaps.
  FloatVec tops[4];
  for (FloatVec& top : tops) top = hn::LoadU(d, row.data());
  std::size_t i = 0;
  for (; i + 4 * kLanes <= row.size(); i += 4 * kLanes) {
    for (std::size_t k = 0; k < 4; ++k) {
      tops[k] = hn::Max(tops[k], hn::LoadU(d, row.data() + i + k * kLanes));
    }
  }
  for (; i < row.size(); i += kLanes) {
    tops[0] = hn::Max(tops[0], hn::LoadU(d, row.data() + std::min(i, row.size() - kLanes)));
  }
  return hn::GetLane(
      hn::MaxOfLanes(d, hn::Max(hn::Max(tops[0], tops[1]), hn::Max(tops[2], tops[3]))));
}

/// Weights in place and their sum; `logits` holds at least one finite number.
double exp_row(std::span<float> logits, float top) {
  const FloatTag d;
  const FloatVec shift = hn::Set(d, top);
  // A few hundred terms of one lane are exact enough in float32; a hundred thousand are not.
  constexpr std::size_t kFloatTerms = 256 * kLanes;
  double sum = 0.0;
  std::size_t i = 0;
  while (i + kLanes <= logits.size()) {
    const std::size_t end = std::min(logits.size(), i + kFloatTerms);
    FloatVec weights = hn::Zero(d);
    for (; i + kLanes <= end; i += kLanes) {
      const FloatVec weight = hn::Exp(d, hn::Sub(hn::LoadU(d, logits.data() + i), shift));
      hn::StoreU(weight, d, logits.data() + i);
      weights = hn::Add(weights, weight);
    }
    sum += double{hn::GetLane(hn::SumOfLanes(d, weights))};
  }
  for (; i < logits.size(); ++i) {
    logits[i] = std::exp(logits[i] - top);
    sum += double{logits[i]};
  }
  return sum;
}

void multiply_row(std::span<float> row, float factor) {
  const FloatTag d;
  std::size_t i = 0;
  for (; i + kLanes <= row.size(); i += kLanes) {
    hn::StoreU(hn::Mul(hn::LoadU(d, row.data() + i), hn::Set(d, factor)), d, row.data() + i);
  }
  for (; i < row.size(); ++i) row[i] *= factor;
}

void reduce_columns(const float* logits, std::size_t stride, std::span<const float> offsets,
                    std::span<float> target) {
  const FloatTag d;
  float last[kLanes];
  for (std::size_t c = 0; c < target.size(); c += kLanes) {
    const auto logit = [&](std::size_t row) HWY_ATTR {
      return hn::Sub(hn::LoadU(d, logits + row * stride + c), hn::Set(d, offsets[row]));
    };
    FloatVec top = logit(0);
    for (std::size_t row = 1; row < offsets.size(); ++row) top = hn::Max(top, logit(row));
    FloatVec sum = hn::Zero(d);
    for (std::size_t row = 0; row < offsets.size(); ++row) {
      sum = hn::Add(sum, hn::Exp(d, hn::Sub(logit(row), top)));
    }
    const FloatVec result = hn::Add(top, hn::Log(d, sum));
    if (c + kLanes <= target.size()) {
      hn::StoreU(result, d, target.data() + c);
    } else {
      hn::StoreU(result, d, last);
      std::copy_n(last, target.size() - c, target.data() + c);
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace kvtier
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvtier {

HWY_EXPORT(top_of_row);
HWY_EXPORT(exp_row);
HWY_EXPORT(multiply_row);
HWY_EXPORT(reduce_columns);

float softmax_row(std::span<float> logits) {
  if (logits.empty()) return kEmptyLse;
  const float top = HWY_DYNAMIC_DISPATCH(top_of_row)(logits);
  if (top == kEmptyLse) {
    // Every token is masked: no weights, rather than not-a-number.
    std::fill(logits.begin(), logits.end(), 0.0f);
    return kEmptyLse;
  }
  const double sum = HWY_DYNAMIC_DISPATCH(exp_row)(logits, top);
  HWY_DYNAMIC_DISPATCH(multiply_row)(logits, static_cast<float>(1.0 / sum));
  return static_cast<float>(double{top} + std::log(sum));
}

void log_sum_exp_columns(const float* logits, std::size_t stride, std::span<const float> offsets,
                         std::span<float> target) {
  HWY_DYNAMIC_DISPATCH(reduce_columns)(logits, stride, offsets, target);
}

}  // namespace kvtier
#endif  // HWY_ONCE
