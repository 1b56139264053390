#include "kernels/cluster_rows.h"

#include "kernels/simd_config.h"
#include "memory/check.h"

#include <algorithm>
#include <cstring>
#include <limits>

// clang-format off
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cluster_rows_cpu.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>
#include "kernels/simd_rows-inl.h"
// clang-format on

#ifndef KVTIER_KERNELS_CLUSTER_ROWS_CPU_ONCE_
#define KVTIER_KERNELS_CLUSTER_ROWS_CPU_ONCE_
namespace kvtier {
namespace {

struct WeightedRows {
  const RowsView& rows;
  const float* weights;
  std::size_t weight_stride;
  std::size_t queries;
  float* sums;
};

/// Rows whose elements are float32 at a time: what `assign_rows` converts once for all centroids.
constexpr std::size_t kTileRows = 6;

}  // namespace
}  // namespace kvtier
#endif

HWY_BEFORE_NAMESPACE();
namespace kvtier {
namespace HWY_NAMESPACE {
namespace {

using IndexTag = hn::RebindToSigned<FloatTag>;
using IndexVec = hn::Vec<IndexTag>;

/// Centroid vectors and rows whose sums stay in registers: 4 x 6 of 32, 2 x 4 of 16. One centroid
/// vector serves all rows, one broadcast element all vectors, and no sum is horizontal.
#if HWY_TARGET <= HWY_AVX3 || HWY_ARCH_ARM
constexpr std::size_t kColumnVectors = 4;
constexpr std::size_t kSumRows = 6;
#else
constexpr std::size_t kColumnVectors = 2;
constexpr std::size_t kSumRows = 3;
#endif
static_assert(kCentroidMultiple % (kColumnVectors * kLanes) == 0);
static_assert(kTileRows % kSumRows == 0);

template <typename T>
void convert_row(const T* from, std::size_t dim, float* target) {
  const FloatTag d;
  std::size_t i = 0;
  for (; i + kLanes <= dim; i += kLanes) hn::StoreU(load_as_f32(d, from + i), d, target + i);
  if (kNeedsTail && i < dim) {
    alignas(64) float rest[kLanes];
    hn::Store(load_tail_as_f32(from + i), d, rest);
    std::copy_n(rest, dim - i, target + i);
  }
}

/// The best centroid of each of `kSumRows` rows, [kSumRows, dim] at `rows`.
void assign_tile(const CentroidTable& table, const float* rows, std::size_t dim,
                 std::uint16_t* nearest) {
  const FloatTag d;
  const IndexTag di;
  FloatVec best[kSumRows];
  IndexVec index[kSumRows];
  for (std::size_t r = 0; r < kSumRows; ++r) {
    best[r] = hn::Set(d, std::numeric_limits<float>::lowest());
    index[r] = hn::Zero(di);
  }
  for (std::size_t column = 0; column < table.stride; column += kColumnVectors * kLanes) {
    FloatVec sums[kSumRows][kColumnVectors];
    for (std::size_t v = 0; v < kColumnVectors; ++v) {
      const FloatVec bias = hn::LoadU(d, table.bias + column + v * kLanes);
      for (std::size_t r = 0; r < kSumRows; ++r) sums[r][v] = bias;
    }
    const float* elements = table.elements + column;
    for (std::size_t i = 0; i < dim; ++i, elements += table.stride) {
      FloatVec centroids[kColumnVectors];
      for (std::size_t v = 0; v < kColumnVectors; ++v) {
        centroids[v] = hn::LoadU(d, elements + v * kLanes);
      }
      HWY_UNROLL(8)
      for (std::size_t r = 0; r < kSumRows; ++r) {
        const FloatVec row = hn::Set(d, rows[r * dim + i]);
        for (std::size_t v = 0; v < kColumnVectors; ++v) {
          sums[r][v] = hn::MulAdd(row, centroids[v], sums[r][v]);
        }
      }
    }
    for (std::size_t r = 0; r < kSumRows; ++r) {
      for (std::size_t v = 0; v < kColumnVectors; ++v) {
        const auto first = static_cast<std::int32_t>(column + v * kLanes);
        const auto better = hn::Gt(sums[r][v], best[r]);
        best[r] = hn::IfThenElse(better, sums[r][v], best[r]);
        index[r] = hn::IfThenElse(hn::RebindMask(di, better), hn::Iota(di, first), index[r]);
      }
    }
  }
  for (std::size_t r = 0; r < kSumRows; ++r) {
    alignas(64) float values[kLanes];
    alignas(64) std::int32_t indices[kLanes];
    hn::Store(best[r], d, values);
    hn::Store(index[r], di, indices);
    std::size_t lane = 0;
    for (std::size_t i = 1; i < kLanes; ++i) {
      const bool first = values[i] == values[lane] && indices[i] < indices[lane];
      if (values[i] > values[lane] || first) lane = i;
    }
    nearest[r] = static_cast<std::uint16_t>(indices[lane]);
  }
}

template <typename T>
void assign_typed(const RowsView& rows, const CentroidTable& table, std::uint16_t* nearest,
                  float* tile) {
  for (std::size_t r = 0; r < rows.rows; r += kSumRows) {
    const std::size_t take = std::min(kSumRows, rows.rows - r);
    for (std::size_t i = 0; i < kSumRows; ++i) {
      // A ragged end repeats the last row; its answers are left out below.
      const std::size_t row = r + std::min(i, take - 1);
      convert_row(reinterpret_cast<const T*>(rows.row(row)), rows.dim, tile + i * rows.dim);
    }
    std::uint16_t found[kSumRows];
    assign_tile(table, tile, rows.dim, found);
    std::copy_n(found, take, nearest + r);
  }
}

template <typename T>
void add_labelled(const RowsView& rows, const std::uint16_t* labels, float* sums) {
  const FloatTag d;
  for (std::size_t r = 0; r < rows.rows; ++r) {
    const T* from = reinterpret_cast<const T*>(rows.row(r));
    float* sum = sums + std::size_t{labels[r]} * rows.dim;
    std::size_t i = 0;
    for (; i + kLanes <= rows.dim; i += kLanes) {
      hn::StoreU(hn::Add(hn::LoadU(d, sum + i), load_as_f32(d, from + i)), d, sum + i);
    }
    for (; i < rows.dim; ++i) sum[i] += load_element(rows.row(r), rows.dtype, i);
  }
}

/// `kRows` queries' sums over all rows, `kVectors` vectors of elements from `first`.
template <typename T, std::size_t kRows, std::size_t kVectors>
void weigh_columns(const WeightedRows& input, std::size_t query, std::size_t first, bool tail) {
  const FloatTag d;
  FloatVec sums[kRows][kVectors];
  for (auto& of_query : sums) {
    for (FloatVec& sum : of_query) sum = hn::Zero(d);
  }
  const float* weights = input.weights + query * input.weight_stride;
  for (std::size_t r = 0; r < input.rows.rows; ++r) {
    const T* from = reinterpret_cast<const T*>(input.rows.row(r)) + first;
    FloatVec row[kVectors];
    for (std::size_t v = 0; v < kVectors; ++v) {
      row[v] = tail ? load_tail_as_f32(from) : load_as_f32(d, from + v * kLanes);
    }
    HWY_UNROLL(8)
    for (std::size_t q = 0; q < kRows; ++q) {
      const FloatVec weight = hn::Set(d, weights[q * input.weight_stride + r]);
      for (std::size_t v = 0; v < kVectors; ++v) {
        sums[q][v] = hn::MulAdd(weight, row[v], sums[q][v]);
      }
    }
  }
  for (std::size_t q = 0; q < kRows; ++q) {
    float* target = input.sums + (query + q) * input.rows.dim + first;
    for (std::size_t v = 0; v < kVectors; ++v) {
      float whole[kLanes];
      hn::StoreU(sums[q][v], d, whole);
      const std::size_t count = tail ? kDimMultiple : kLanes;
      for (std::size_t i = 0; i < count; ++i) target[v * kLanes + i] += whole[i];
    }
  }
}

template <typename T>
void weigh_typed(const WeightedRows& input) {
  constexpr std::size_t kVectors = kColumnVectors;
  for (std::size_t query = 0; query < input.queries;) {
    const std::size_t count = even_piece(input.queries - query, kSumRows);
    with_constant<kSumRows>(count, [&](auto rows) HWY_ATTR {
      std::size_t i = 0;
      for (; i + kVectors * kLanes <= input.rows.dim; i += kVectors * kLanes) {
        weigh_columns<T, rows.value, kVectors>(input, query, i, false);
      }
      for (; i + kLanes <= input.rows.dim; i += kLanes) {
        weigh_columns<T, rows.value, 1>(input, query, i, false);
      }
      if (kNeedsTail && i < input.rows.dim) {
        weigh_columns<T, rows.value, 1>(input, query, i, true);
      }
    });
    query += count;
  }
}

}  // namespace

void assign_all(const RowsView& rows, const CentroidTable& table, std::uint16_t* nearest,
                float* tile) {
  switch (rows.dtype) {
    case DType::kF16: return assign_typed<hwy::float16_t>(rows, table, nearest, tile);
    case DType::kBF16: return assign_typed<hwy::bfloat16_t>(rows, table, nearest, tile);
    case DType::kF32: return assign_typed<float>(rows, table, nearest, tile);
  }
}

void add_all(const RowsView& rows, const std::uint16_t* labels, float* sums) {
  switch (rows.dtype) {
    case DType::kF16: return add_labelled<hwy::float16_t>(rows, labels, sums);
    case DType::kBF16: return add_labelled<hwy::bfloat16_t>(rows, labels, sums);
    case DType::kF32: return add_labelled<float>(rows, labels, sums);
  }
}

void weigh_all(const WeightedRows& input) {
  switch (input.rows.dtype) {
    case DType::kF16: return weigh_typed<hwy::float16_t>(input);
    case DType::kBF16: return weigh_typed<hwy::bfloat16_t>(input);
    case DType::kF32: return weigh_typed<float>(input);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace kvtier
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvtier {

HWY_EXPORT(assign_all);
HWY_EXPORT(add_all);
HWY_EXPORT(weigh_all);

namespace {

void check_cluster_rows(const RowsView& rows) {
  KVTIER_CHECK(rows.dim % 8 == 0 && rows.dim <= kMaxClusterDim,
               "rows of {}: expected a multiple of 8 up to {}", rows.dim, kMaxClusterDim);
}

}  // namespace

void assign_rows(const RowsView& rows, const CentroidTable& centroids,
                 std::span<std::uint16_t> nearest) {
  check_cluster_rows(rows);
  KVTIER_CHECK(centroids.stride % kCentroidMultiple == 0 && centroids.count <= centroids.stride &&
                   centroids.stride <= std::numeric_limits<std::uint16_t>::max(),
               "{} centroids in {} columns", centroids.count, centroids.stride);
  KVTIER_CHECK(nearest.size() >= rows.rows, "place for {} of {} rows", nearest.size(), rows.rows);
  // Stack: 192 KiB at most, 3 KiB for one KV head of 128.
  alignas(64) float tile[kTileRows * kMaxClusterDim];
  HWY_DYNAMIC_DISPATCH(assign_all)(rows, centroids, nearest.data(), tile);
}

void add_rows_by_label(const RowsView& rows, std::span<const std::uint16_t> labels, float* sums) {
  check_cluster_rows(rows);
  KVTIER_CHECK(labels.size() >= rows.rows, "{} labels for {} rows", labels.size(), rows.rows);
  HWY_DYNAMIC_DISPATCH(add_all)(rows, labels.data(), sums);
}

void add_weighted_rows(const RowsView& rows, const float* weights, std::size_t weight_stride,
                       std::size_t queries, float* sums) {
  check_cluster_rows(rows);
  HWY_DYNAMIC_DISPATCH(weigh_all)(WeightedRows{rows, weights, weight_stride, queries, sums});
}

}  // namespace kvtier
#endif  // HWY_ONCE
