#include "kernels/quantised_keys.h"

#include "kernels/simd_config.h"
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
#include "kernels/code_tiles-inl.h"
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace kvtier {
namespace HWY_NAMESPACE {
namespace {

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
  FloatVec largest[kCodedRows];
  for (FloatVec& offset : offsets) offset = hn::Zero(d);
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
  float exact[kCodedRows];
  float tops[kCodedRows];
  float sums[kCodedRows];
  store_four_sums(offsets[0], offsets[1], offsets[2], offsets[3], exact);
  store_four_maxima(largest[0], largest[1], largest[2], largest[3], tops);
  FloatVec rounded[kCodedRows];
  for (FloatVec& sum : rounded) sum = hn::Zero(d);
  for (std::size_t r = 0; r < kRows; ++r) {
    std::fill_n(products[r] + codes.dim, 16, 0.0f);
    const float up = tops[r] > kLeastFolded ? kFoldedLevels / tops[r] : 0.0f;
    pack_fours(products[r], codes.dim, up, result.fours[r]);
    rounded[r] = sums_of_fours(result.fours[r], codes.dim);
  }
  store_four_sums(rounded[0], rounded[1], rounded[2], rounded[3], sums);
  for (std::size_t r = 0; r < kRows; ++r) {
    result.slopes[r] = scale * (tops[r] / kFoldedLevels);
    // Integers would hide that a product overflowed.
    if (!std::isfinite(tops[r])) result.slopes[r] = std::numeric_limits<float>::quiet_NaN();
    result.offsets[r] = scale * exact[r] - result.slopes[r] * (middle * sums[r]);
  }
}

/// Every run against `kRows` queries.
template <typename T, std::size_t kRows>
void score_runs(const SoftmaxOptions& softmax, const CodedTask& task, QueryRows queries,
                float* logits) {
  const KeyCodes& codes = task.codes;
  FoldedQueries folded;
  // The channels that fill up the last line have the code 0; they must not be read unset.
  std::memset(folded.fours, 0, sizeof(folded.fours));
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
