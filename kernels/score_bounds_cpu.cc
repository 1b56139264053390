#include "kernels/score_bounds.h"

#include "kernels/simd_config.h"
#include "memory/check.h"
#include "memory/dtype.h"

#include <algorithm>
#include <cstring>

// clang-format off
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/score_bounds_cpu.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>
#include "kernels/simd_rows-inl.h"
// clang-format on

#ifndef KVTIER_KERNELS_SCORE_BOUNDS_CPU_ONCE_
#define KVTIER_KERNELS_SCORE_BOUNDS_CPU_ONCE_
namespace kvtier {
namespace {

constexpr std::uint32_t kMaxBoxDim = 1024;

/// Two views of `count` rows: where the high corners are looked for, and the low ones.
struct CornerRows {
  const std::byte* high;
  const std::byte* low;
  std::size_t stride_bytes;
  std::size_t count;
  std::uint32_t dim;
  DType dtype;
};

}  // namespace
}  // namespace kvtier
#endif

HWY_BEFORE_NAMESPACE();
namespace kvtier {
namespace HWY_NAMESPACE {
namespace {

template <typename T>
void corners_of(const CornerRows& rows, float* high, float* low) {
  const FloatTag d;
  const auto element = [&rows](const std::byte* base, std::size_t row) HWY_ATTR {
    return reinterpret_cast<const T*>(base + row * rows.stride_bytes);
  };
  std::size_t i = 0;
  for (; i + kLanes <= rows.dim; i += kLanes) {
    FloatVec most = load_as_f32(d, element(rows.high, 0) + i);
    FloatVec least = load_as_f32(d, element(rows.low, 0) + i);
    for (std::size_t r = 1; r < rows.count; ++r) {
      most = hn::Max(most, load_as_f32(d, element(rows.high, r) + i));
      least = hn::Min(least, load_as_f32(d, element(rows.low, r) + i));
    }
    hn::StoreU(most, d, high + i);
    hn::StoreU(least, d, low + i);
  }
  for (; i < rows.dim; ++i) {
    high[i] = load_element(rows.high, rows.dtype, i);
    low[i] = load_element(rows.low, rows.dtype, i);
    for (std::size_t r = 1; r < rows.count; ++r) {
      high[i] = std::max(high[i], load_element(rows.high + r * rows.stride_bytes, rows.dtype, i));
      low[i] = std::min(low[i], load_element(rows.low + r * rows.stride_bytes, rows.dtype, i));
    }
  }
}

}  // namespace

void find_corners(const CornerRows& rows, float* high, float* low) {
  switch (rows.dtype) {
    case DType::kF16: return corners_of<hwy::float16_t>(rows, high, low);
    case DType::kBF16: return corners_of<hwy::bfloat16_t>(rows, high, low);
    case DType::kF32: return corners_of<float>(rows, high, low);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace kvtier
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvtier {

HWY_EXPORT(find_corners);

namespace {

void write_box(const CornerRows& rows, std::byte* target) {
  KVTIER_CHECK(rows.count > 0 && rows.dim <= kMaxBoxDim, "a box of {} rows of {}", rows.count,
               rows.dim);
  alignas(64) float high[kMaxBoxDim];
  alignas(64) float low[kMaxBoxDim];
  HWY_DYNAMIC_DISPATCH(find_corners)(rows, high, low);
  for (std::size_t i = 0; i < rows.dim; ++i) {
    store_element(target, rows.dtype, i, high[i]);
    store_element(target, rows.dtype, rows.dim + i, low[i]);
  }
}

}  // namespace

void box_rows(const RowsView& rows, std::uint32_t rows_per_group, std::byte* target) {
  KVTIER_CHECK(rows_per_group > 0, "groups of {} rows", rows_per_group);
  for (std::size_t first = 0; first < rows.rows; first += rows_per_group) {
    const std::size_t count = std::min<std::size_t>(rows_per_group, rows.rows - first);
    write_box({rows.row(first), rows.row(first), rows.stride_bytes, count, rows.dim, rows.dtype},
              target);
    target += 2 * rows.dim * size_of(rows.dtype);
  }
}

void join_boxes(const RowsView& boxes, std::byte* target) {
  const std::uint32_t dim = boxes.dim / 2;
  write_box({boxes.data, boxes.data + dim * size_of(boxes.dtype), boxes.stride_bytes, boxes.rows,
             dim, boxes.dtype},
            target);
}

void split_by_sign(std::span<const float> query, float factor, float* target) {
  for (std::size_t i = 0; i < query.size(); ++i) {
    target[i] = factor * std::max(query[i], 0.0f);
    target[query.size() + i] = factor * std::min(query[i], 0.0f);
  }
}

}  // namespace kvtier
#endif  // HWY_ONCE
