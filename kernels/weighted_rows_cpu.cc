#include "kernels/weighted_rows.h"

#include "kernels/simd_config.h"
#include "memory/check.h"

#include <algorithm>

// clang-format off
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/weighted_rows_cpu.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>
#include "kernels/simd_rows-inl.h"
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace kvtier {
namespace HWY_NAMESPACE {
namespace {

/// Sums that share one conversion of a row; their vectors stay in registers over all rows.
constexpr std::size_t kSumsAtOnce = 4;

/// Columns [first, first + vectors * lanes) of `kSums` sums.
template <typename T, std::size_t kSums, std::size_t kVectors>
void sum_columns(const WeightedRows& task, std::size_t first_sum, std::size_t column) {
  const FloatTag d;
  FloatVec sums[kSums][kVectors];
  for (std::size_t s = 0; s < kSums; ++s) {
    for (std::size_t v = 0; v < kVectors; ++v) sums[s][v] = hn::Zero(d);
  }
  const float* weights = task.weights + first_sum * task.weight_stride;
  for (std::size_t r = 0; r < task.rows.rows; ++r) {
    const T* row = reinterpret_cast<const T*>(task.rows.row(r)) + column;
    FloatVec values[kVectors];
    for (std::size_t v = 0; v < kVectors; ++v) values[v] = load_as_f32(d, row + v * kLanes);
    for (std::size_t s = 0; s < kSums; ++s) {
      const FloatVec weight = hn::Set(d, weights[s * task.weight_stride + r]);
      for (std::size_t v = 0; v < kVectors; ++v) {
        sums[s][v] = hn::MulAdd(weight, values[v], sums[s][v]);
      }
    }
  }
  for (std::size_t s = 0; s < kSums; ++s) {
    float* target = task.target + (first_sum + s) * task.target_stride + column;
    for (std::size_t v = 0; v < kVectors; ++v) hn::StoreU(sums[s][v], d, target + v * kLanes);
  }
}

template <typename T, std::size_t kSums>
void sum_rows(const WeightedRows& task, std::size_t first_sum) {
  const std::size_t dim = task.rows.dim;
  std::size_t column = 0;
  for (; column + 4 * kLanes <= dim; column += 4 * kLanes) {
    sum_columns<T, kSums, 4>(task, first_sum, column);
  }
  for (; column + kLanes <= dim; column += kLanes) {
    sum_columns<T, kSums, 1>(task, first_sum, column);
  }
  // Half a vector, with the widest ones only.
  for (; column < dim; ++column) {
    for (std::size_t s = first_sum; s < first_sum + kSums; ++s) {
      float sum = 0.0f;
      for (std::size_t r = 0; r < task.rows.rows; ++r) {
        sum += task.weights[s * task.weight_stride + r] *
               load_element(task.rows.row(r), task.rows.dtype, column);
      }
      task.target[s * task.target_stride + column] = sum;
    }
  }
}

template <typename T>
void sum_typed(const WeightedRows& task) {
  for (std::size_t first = 0; first < task.sums;) {
    const std::size_t count = even_piece(task.sums - first, kSumsAtOnce);
    with_constant<kSumsAtOnce>(count,
                               [&](auto sums) HWY_ATTR { sum_rows<T, sums.value>(task, first); });
    first += count;
  }
}

}  // namespace

void sum_all(const WeightedRows& task) {
  switch (task.rows.dtype) {
    case DType::kF16: return sum_typed<hwy::float16_t>(task);
    case DType::kBF16: return sum_typed<hwy::bfloat16_t>(task);
    case DType::kF32: return sum_typed<float>(task);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace kvtier
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvtier {

HWY_EXPORT(sum_all);

void sum_weighted_rows(const WeightedRows& task) {
  KVTIER_CHECK(task.rows.dim % 8 == 0, "rows of {}, expected a multiple of 8", task.rows.dim);
  HWY_DYNAMIC_DISPATCH(sum_all)(task);
}

}  // namespace kvtier
#endif  // HWY_ONCE
