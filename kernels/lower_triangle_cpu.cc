#include "kernels/lower_triangle.h"

#include "kernels/simd_config.h"

#include <algorithm>
#include <cstddef>

// clang-format off
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/lower_triangle_cpu.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>
#include "kernels/simd_rows-inl.h"
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace kvtier {
namespace HWY_NAMESPACE {
namespace {

/// target[i] += factor * row[i]
HWY_INLINE void add_scaled(float factor, const float* HWY_RESTRICT row, std::size_t count,
                           float* HWY_RESTRICT target) {
  const FloatTag d;
  const FloatVec scale = hn::Set(d, factor);
  std::size_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    hn::StoreU(hn::MulAdd(scale, hn::LoadU(d, row + i), hn::LoadU(d, target + i)), d, target + i);
  }
  for (; i < count; ++i) target[i] += factor * row[i];
}

}  // namespace

void multiply_transposed_rows(const float* triangle, std::uint32_t dim, const float* source,
                              float* target) {
  std::fill_n(target, dim, 0.0f);
  for (std::size_t i = 0; i < dim; ++i) add_scaled(source[i], triangle + i * dim, i + 1, target);
}

void add_outer_product_rows(const float* row, std::uint32_t dim, float* triangle) {
  for (std::size_t i = 0; i < dim; ++i) add_scaled(row[i], row, i + 1, triangle + i * dim);
}

}  // namespace HWY_NAMESPACE
}  // namespace kvtier
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvtier {

HWY_EXPORT(multiply_transposed_rows);
HWY_EXPORT(add_outer_product_rows);

void multiply_transposed(const float* triangle, std::uint32_t dim, const float* source,
                         float* target) {
  HWY_DYNAMIC_DISPATCH(multiply_transposed_rows)(triangle, dim, source, target);
}

void add_outer_product(const float* row, std::uint32_t dim, float* triangle) {
  HWY_DYNAMIC_DISPATCH(add_outer_product_rows)(row, dim, triangle);
}

}  // namespace kvtier
#endif  // HWY_ONCE
