#include "kernels/score_rows.h"

#include "kernels/simd_config.h"
#include "memory/check.h"

#include <algorithm>
#include <cmath>

// clang-format off
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/score_rows_cpu.cc"
#include <hwy/foreach_target.h>
#include <hwy/cache_control.h>
#include <hwy/highway.h>
#include <hwy/contrib/math/math-inl.h>
#include "kernels/simd_rows-inl.h"
// clang-format on

#ifndef KVTIER_KERNELS_SCORE_ROWS_CPU_ONCE_
#define KVTIER_KERNELS_SCORE_ROWS_CPU_ONCE_
namespace kvtier {
namespace {

/// Rows that one worker scores at a time: 32 to 64 KiB of f16, which stays in the cache while one
/// piece of the queries after the other passes over it.
constexpr std::size_t kSliceRows = 256;
/// A row may hold three vectors of the largest head: a mean and the corners of a box.
constexpr std::uint32_t kMaxScoreDim = 3 * 576;
constexpr std::uint32_t kMaxScoreQueries = 128;
/// Bytes of rows that are asked for ahead of those being scored: the hardware's own prefetching
/// stops at page edges and follows no lists.
constexpr std::size_t kAheadBytes = 8192;
constexpr std::size_t kCacheLineBytes = 64;

/// Rows [first, first + count) of one task.
struct ScoreSlice {
  const SoftmaxOptions& softmax;
  const ScoreTask& task;
  std::size_t first;
  std::size_t count;
};

/// `count` rows starting at `first`: one group.
struct RowGroup {
  const RowsView& rows;
  std::size_t first;
  std::size_t count;
};

}  // namespace
}  // namespace kvtier
#endif

HWY_BEFORE_NAMESPACE();
namespace kvtier {
namespace HWY_NAMESPACE {
namespace {

/// logits[i] = cap(scale * logits[i]), in whole vectors: the rest goes through a copy.
void finish_row(const SoftmaxOptions& softmax, std::size_t count, float* logits) {
  const FloatTag d;
  const FloatVec scale = hn::Set(d, softmax.scale);
  const bool capped = softmax.logit_cap > 0.0f;
  const FloatVec cap = hn::Set(d, softmax.logit_cap);
  const FloatVec inverse = hn::Set(d, capped ? 1.0f / softmax.logit_cap : 0.0f);
  const auto finish = [&](float* at) HWY_ATTR {
    FloatVec logit = hn::Mul(hn::LoadU(d, at), scale);
    if (capped) logit = hn::Mul(hn::Tanh(d, hn::Mul(logit, inverse)), cap);
    hn::StoreU(logit, d, at);
  };
  std::size_t i = 0;
  for (; i + kLanes <= count; i += kLanes) finish(logits + i);
  if (i < count) {
    float rest[kLanes] = {};
    std::copy(logits + i, logits + count, rest);
    finish(rest);
    std::copy_n(rest, count - i, logits + i);
  }
}

/// Dots of the slice's rows with `kRows` queries, whole fours of rows into the task's logits.
template <typename T, std::size_t kRows>
void dot_slice(const ScoreSlice& slice, QueryRows queries, float* logits) {
  const RowsView& rows = slice.task.rows;
  const std::size_t row_bytes = rows.dim * sizeof(T);
  const std::size_t stride = slice.task.logit_stride;
  const std::size_t ahead_rows = std::max<std::size_t>(4, kAheadBytes / row_bytes / 4 * 4);
  float four[kRows * 4] = {};
  for (std::size_t r = 0; r < slice.count; r += 4) {
    const std::size_t take = std::min<std::size_t>(4, slice.count - r);
    const T* keys[4];
    for (std::size_t i = 0; i < 4; ++i) {
      // A ragged end repeats the last row; its dots are left out below.
      const std::size_t row = slice.first + r + std::min(i, take - 1);
      const auto& listed = slice.task.listed;
      keys[i] = reinterpret_cast<const T*>(rows.row(listed.empty() ? row : listed[row]));
    }
    const std::size_t ahead = std::min<std::size_t>(slice.count, r + ahead_rows + 4);
    for (std::size_t i = r + ahead_rows; i < ahead; ++i) {
      const std::size_t row = slice.first + i;
      const auto& listed = slice.task.listed;
      const std::byte* bytes = rows.row(listed.empty() ? row : listed[row]);
      for (std::size_t at = 0; at < row_bytes; at += kCacheLineBytes) prefetch_line(bytes + at);
    }
    // One call for both cases: every number of rows is compiled for every type.
    const bool ragged = take < 4;
    dot_four_keys<T, kRows>(keys, queries, rows.dim, ragged ? four : logits + r,
                            ragged ? 4 : stride);
    if (!ragged) continue;
    for (std::size_t q = 0; q < kRows; ++q) {
      std::copy_n(four + q * 4, take, logits + q * stride + r);
    }
  }
}

template <typename T>
void score_typed(const ScoreSlice& slice) {
  const ScoreTask& task = slice.task;
  const std::size_t dim = task.rows.dim;
  const std::size_t stride = (dim + kLanes - 1) / kLanes * kLanes;
  alignas(64) float padded[kRegisterRows * (kMaxScoreDim + 16)];
  for (std::size_t query = 0; query < task.query_count;) {
    const std::size_t count = even_piece(task.query_count - query, kRegisterRows);
    for (std::size_t q = 0; q < count; ++q) {
      const float* from = task.queries + (query + q) * task.query_stride;
      std::copy_n(from, dim, padded + q * stride);
      std::fill(padded + q * stride + dim, padded + (q + 1) * stride, 0.0f);
    }
    float* logits = task.logits + query * task.logit_stride + slice.first;
    with_constant<kRegisterRows>(count, [&](auto rows) HWY_ATTR {
      dot_slice<T, rows.value>(slice, QueryRows{padded, stride}, logits);
    });
    for (std::size_t q = 0; q < count; ++q) {
      finish_row(slice.softmax, slice.count, logits + q * task.logit_stride);
    }
    query += count;
  }
}

template <typename T>
void average_group(const RowGroup& group, float* mean) {
  const FloatTag d;
  const std::size_t dim = group.rows.dim;
  const float share = 1.0f / static_cast<float>(group.count);
  std::size_t i = 0;
  for (; i + kLanes <= dim; i += kLanes) {
    FloatVec sum = hn::Zero(d);
    for (std::size_t r = 0; r < group.count; ++r) {
      sum = hn::Add(
          sum, load_as_f32(d, reinterpret_cast<const T*>(group.rows.row(group.first + r)) + i));
    }
    hn::StoreU(hn::Mul(sum, hn::Set(d, share)), d, mean + i);
  }
  for (; i < dim; ++i) {
    float sum = 0.0f;
    for (std::size_t r = 0; r < group.count; ++r) {
      sum += load_element(group.rows.row(group.first + r), group.rows.dtype, i);
    }
    mean[i] = sum * share;
  }
}

/// Cosine between a row and a mean of its type; 0 when either is a zero vector.
template <typename T>
float cosine(const RowsView& rows, const std::byte* row_bytes, const std::byte* mean_bytes) {
  const FloatTag d;
  const auto* row = reinterpret_cast<const T*>(row_bytes);
  const auto* mean = reinterpret_cast<const T*>(mean_bytes);
  FloatVec ab = hn::Zero(d);
  FloatVec aa = hn::Zero(d);
  FloatVec bb = hn::Zero(d);
  std::size_t i = 0;
  for (; i + kLanes <= rows.dim; i += kLanes) {
    const FloatVec a = load_as_f32(d, row + i);
    const FloatVec b = load_as_f32(d, mean + i);
    ab = hn::MulAdd(a, b, ab);
    aa = hn::MulAdd(a, a, aa);
    bb = hn::MulAdd(b, b, bb);
  }
  float sum_ab = hn::GetLane(hn::SumOfLanes(d, ab));
  float sum_aa = hn::GetLane(hn::SumOfLanes(d, aa));
  float sum_bb = hn::GetLane(hn::SumOfLanes(d, bb));
  for (; i < rows.dim; ++i) {
    const float a = load_element(row_bytes, rows.dtype, i);
    const float b = load_element(mean_bytes, rows.dtype, i);
    sum_ab += a * b;
    sum_aa += a * a;
    sum_bb += b * b;
  }
  const double norm = std::sqrt(double{sum_aa}) * std::sqrt(double{sum_bb});
  return norm > 0.0 ? static_cast<float>(double{sum_ab} / norm) : 0.0f;
}

}  // namespace

void score_slice(const ScoreSlice& slice) {
  switch (slice.task.rows.dtype) {
    case DType::kF16: return score_typed<hwy::float16_t>(slice);
    case DType::kBF16: return score_typed<hwy::bfloat16_t>(slice);
    case DType::kF32: return score_typed<float>(slice);
  }
}

void mean_of_group(const RowGroup& group, float* mean) {
  switch (group.rows.dtype) {
    case DType::kF16: return average_group<hwy::float16_t>(group, mean);
    case DType::kBF16: return average_group<hwy::bfloat16_t>(group, mean);
    case DType::kF32: return average_group<float>(group, mean);
  }
}

float cosine_of(const RowsView& rows, const std::byte* row, const std::byte* mean) {
  switch (rows.dtype) {
    case DType::kF16: return cosine<hwy::float16_t>(rows, row, mean);
    case DType::kBF16: return cosine<hwy::bfloat16_t>(rows, row, mean);
    case DType::kF32: return cosine<float>(rows, row, mean);
  }
  return 0.0f;
}

}  // namespace HWY_NAMESPACE
}  // namespace kvtier
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvtier {

HWY_EXPORT(score_slice);
HWY_EXPORT(mean_of_group);
HWY_EXPORT(cosine_of);

namespace {

constexpr std::uint32_t kMaxMeanDim = 1024;

std::size_t slices_of(const ScoreTask& task) {
  return task.query_count == 0 ? 0 : (task.row_count() + kSliceRows - 1) / kSliceRows;
}

Status check_score_task(const ScoreTask& task) {
  if (task.rows.dim % 8 != 0 || task.rows.dim > kMaxScoreDim) {
    return unsupported(fmt::format("scoring rows of {}: expected a multiple of 8 up to {}",
                                   task.rows.dim, kMaxScoreDim));
  }
  if (task.query_count > kMaxScoreQueries) {
    return unsupported(
        fmt::format("scoring {} queries: expected up to {}", task.query_count, kMaxScoreQueries));
  }
  return {};
}

std::size_t group_count(const RowsView& rows, std::uint32_t rows_per_group) {
  KVTIER_CHECK(rows_per_group > 0 && rows.dim <= kMaxMeanDim, "groups of {} rows of {}",
               rows_per_group, rows.dim);
  return (rows.rows + rows_per_group - 1) / rows_per_group;
}

}  // namespace

Status score_rows(const SoftmaxOptions& softmax, std::span<const ScoreTask> tasks,
                  WorkerPool& pool) {
  std::size_t slices = 0;
  for (const ScoreTask& task : tasks) {
    KVTIER_RETURN_IF_ERROR(check_score_task(task));
    slices += slices_of(task);
  }
  struct Context {
    const SoftmaxOptions& softmax;
    std::span<const ScoreTask> tasks;
  } context{softmax, tasks};
  pool.run(slices, [&context](std::size_t slice) {
    const ScoreTask* task = context.tasks.data();
    // Tasks are few (KV heads of a layer); slices are numbered task by task.
    for (; slice >= slices_of(*task); ++task) slice -= slices_of(*task);
    const std::size_t first = slice * kSliceRows;
    HWY_DYNAMIC_DISPATCH(score_slice)
    ({context.softmax, *task, first, std::min(kSliceRows, task->row_count() - first)});
  });
  return {};
}

Status score_rows(const SoftmaxOptions& softmax, const ScoreTask& task) {
  KVTIER_RETURN_IF_ERROR(check_score_task(task));
  for (std::size_t slice = 0; slice < slices_of(task); ++slice) {
    const std::size_t first = slice * kSliceRows;
    HWY_DYNAMIC_DISPATCH(score_slice)
    ({softmax, task, first, std::min(kSliceRows, task.row_count() - first)});
  }
  return {};
}

void mean_rows(const RowsView& rows, std::uint32_t rows_per_group, std::byte* target) {
  const std::size_t groups = group_count(rows, rows_per_group);
  alignas(64) float mean[kMaxMeanDim];
  for (std::size_t group = 0; group < groups; ++group) {
    const std::size_t first = group * rows_per_group;
    const std::size_t count = std::min<std::size_t>(rows_per_group, rows.rows - first);
    HWY_DYNAMIC_DISPATCH(mean_of_group)(RowGroup{rows, first, count}, mean);
    for (std::size_t i = 0; i < rows.dim; ++i) store_element(target, rows.dtype, i, mean[i]);
    target += rows.dim * size_of(rows.dtype);
  }
}

void min_cosine_to_mean(const RowsView& rows, std::uint32_t rows_per_group, const std::byte* means,
                        std::span<float> target) {
  const std::size_t groups = group_count(rows, rows_per_group);
  KVTIER_CHECK(target.size() >= groups, "place for {} of {} groups", target.size(), groups);
  for (std::size_t group = 0; group < groups; ++group) {
    const std::size_t first = group * rows_per_group;
    const std::size_t count = std::min<std::size_t>(rows_per_group, rows.rows - first);
    const std::byte* mean = means + group * rows.dim * size_of(rows.dtype);
    float least = 1.0f;
    for (std::size_t r = 0; r < count; ++r) {
      least = std::min(least, HWY_DYNAMIC_DISPATCH(cosine_of)(rows, rows.row(first + r), mean));
    }
    target[group] = least;
  }
}

}  // namespace kvtier
#endif  // HWY_ONCE
