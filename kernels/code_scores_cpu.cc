#include "kernels/code_scores.h"

#include "kernels/simd_config.h"
#include "memory/check.h"

#include <algorithm>
#include <cmath>
#include <limits>

// clang-format off
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/code_scores_cpu.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>
#include "kernels/simd_rows-inl.h"
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace kvtier {
namespace HWY_NAMESPACE {
namespace {

/// Half the squared distance to each centroid, less what is the same for all, for `kVectors`
/// vectors of centroids at once; keeps the smallest of each lane and where it was.
template <std::size_t kVectors>
HWY_INLINE void try_centroids(const CodebookView& codebook, const float* part,
                              const float* centroids, const float* half_norms, std::size_t at,
                              FloatVec& least, hn::Vec<hn::RebindToSigned<FloatTag>>& where) {
  const FloatTag d;
  const hn::RebindToSigned<FloatTag> di;
  FloatVec distances[kVectors];
  for (std::size_t v = 0; v < kVectors; ++v) {
    distances[v] = hn::LoadU(d, half_norms + at + v * kLanes);
  }
  for (std::size_t i = 0; i < codebook.part_dim(); ++i) {
    const FloatVec element = hn::Set(d, part[i]);
    const float* row = centroids + i * kCodeCentroids + at;
    for (std::size_t v = 0; v < kVectors; ++v) {
      distances[v] = hn::NegMulAdd(hn::LoadU(d, row + v * kLanes), element, distances[v]);
    }
  }
  for (std::size_t v = 0; v < kVectors; ++v) {
    const auto nearer = hn::Lt(distances[v], least);
    least = hn::IfThenElse(nearer, distances[v], least);
    const auto index = hn::Iota(di, static_cast<std::int32_t>(at + v * kLanes));
    where = hn::IfThenElse(hn::RebindMask(di, nearer), index, where);
  }
}

}  // namespace

void nearest_codes_of(const CodebookView& codebook, const float* rows, std::size_t count,
                      std::uint8_t* codes) {
  const FloatTag d;
  const hn::RebindToSigned<FloatTag> di;
  constexpr std::size_t kVectors = 4;
  float least[kLanes];
  std::int32_t where[kLanes];
  for (std::size_t r = 0; r < count; ++r) {
    for (std::uint32_t p = 0; p < codebook.parts; ++p) {
      const float* part = rows + r * codebook.dim + std::size_t{p} * codebook.part_dim();
      const float* centroids =
          codebook.centroids + std::size_t{p} * codebook.part_dim() * kCodeCentroids;
      FloatVec nearest = hn::Set(d, std::numeric_limits<float>::infinity());
      auto index = hn::Zero(di);
      for (std::size_t at = 0; at < kCodeCentroids; at += kVectors * kLanes) {
        try_centroids<kVectors>(codebook, part, centroids, codebook.half_norms + p * kCodeCentroids,
                                at, nearest, index);
      }
      hn::StoreU(nearest, d, least);
      hn::StoreU(index, di, where);
      std::size_t best = 0;
      for (std::size_t lane = 1; lane < kLanes; ++lane) {
        if (least[lane] < least[best] ||
            (least[lane] == least[best] && where[lane] < where[best])) {
          best = lane;
        }
      }
      codes[r * codebook.parts + p] = static_cast<std::uint8_t>(where[best]);
    }
  }
}

/// What each centroid is worth to four queries, `element[i * 4 + q]` being theirs.
void fill_code_table(const CodebookView& codebook, const float* element, float* table) {
  for (std::uint32_t p = 0; p < codebook.parts; ++p) {
    float* target = table + p * kCodeCentroids * 4;
    std::fill_n(target, kCodeCentroids * 4, 0.0f);
    for (std::size_t i = 0; i < codebook.part_dim(); ++i) {
      const std::size_t row = std::size_t{p} * codebook.part_dim() + i;
      const float* centroids = codebook.centroids + row * kCodeCentroids;
      for (std::size_t c = 0; c < kCodeCentroids; ++c) {
        for (std::size_t q = 0; q < 4; ++q)
          target[c * 4 + q] += centroids[c] * element[row * 4 + q];
      }
    }
  }
}

/// What one row's codes are worth to four queries.
HWY_INLINE void sum_codes(const std::uint8_t* codes, std::size_t parts, const float* table,
                          float* four) {
  std::fill_n(four, 4, 0.0f);
  for (std::size_t p = 0; p < parts; ++p) {
    const float* worth = table + (p * kCodeCentroids + codes[p]) * 4;
    for (std::size_t q = 0; q < 4; ++q) four[q] += worth[q];
  }
}

#if HWY_MAX_BYTES >= 16
/// The same for four rows at a time, as four rows of logits; returns the rows done.
HWY_INLINE std::size_t sum_four_rows(float scale, const CodeTask& task, const float* table,
                                     float* logits, std::size_t queries) {
  const hn::FixedTag<float, 4> d;
  const hn::RepartitionToWide<decltype(d)> wide;
  const std::size_t parts = task.codebook.parts;
  const std::size_t stride = task.logit_stride;
  const auto factor = hn::Set(d, scale);
  std::size_t r = 0;
  for (; r + 4 <= task.rows; r += 4) {
    const std::uint8_t* codes = task.codes + r * parts;
    auto a = hn::Zero(d), b = hn::Zero(d), c = hn::Zero(d), e = hn::Zero(d);
    for (std::size_t p = 0; p < parts; ++p) {
      const float* worth = table + p * kCodeCentroids * 4;
      a = hn::Add(a, hn::LoadU(d, worth + codes[p] * 4));
      b = hn::Add(b, hn::LoadU(d, worth + codes[parts + p] * 4));
      c = hn::Add(c, hn::LoadU(d, worth + codes[2 * parts + p] * 4));
      e = hn::Add(e, hn::LoadU(d, worth + codes[3 * parts + p] * 4));
    }
    const auto ab = hn::BitCast(wide, hn::InterleaveLower(d, a, b));
    const auto ce = hn::BitCast(wide, hn::InterleaveLower(d, c, e));
    const auto ab_upper = hn::BitCast(wide, hn::InterleaveUpper(d, a, b));
    const auto ce_upper = hn::BitCast(wide, hn::InterleaveUpper(d, c, e));
    const auto store = [&](std::size_t q, auto row) HWY_ATTR {
      if (q < queries) hn::StoreU(hn::Mul(hn::BitCast(d, row), factor), d, logits + q * stride + r);
    };
    store(0, hn::InterleaveLower(wide, ab, ce));
    store(1, hn::InterleaveUpper(wide, ab, ce));
    store(2, hn::InterleaveLower(wide, ab_upper, ce_upper));
    store(3, hn::InterleaveUpper(wide, ab_upper, ce_upper));
  }
  return r;
}
#else
HWY_INLINE std::size_t sum_four_rows(float, const CodeTask&, const float*, float*, std::size_t) {
  return 0;
}
#endif

/// Sums of the codes for four queries, into the first `queries` rows of logits.
void score_codes_slice(const SoftmaxOptions& softmax, const CodeTask& task, const float* table,
                       float* logits, std::size_t queries) {
  const std::size_t parts = task.codebook.parts;
  float four[4];
  for (std::size_t r = sum_four_rows(softmax.scale, task, table, logits, queries); r < task.rows;
       ++r) {
    sum_codes(task.codes + r * parts, parts, table, four);
    for (std::size_t q = 0; q < queries; ++q) {
      logits[q * task.logit_stride + r] = four[q] * softmax.scale;
    }
  }
  const float cap = softmax.logit_cap;
  if (cap <= 0.0f) return;
  for (std::size_t q = 0; q < queries; ++q) {
    float* row = logits + q * task.logit_stride;
    for (std::size_t r = 0; r < task.rows; ++r) row[r] = cap * std::tanh(row[r] / cap);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace kvtier
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvtier {

HWY_EXPORT(nearest_codes_of);
HWY_EXPORT(fill_code_table);
HWY_EXPORT(score_codes_slice);

void nearest_codes(const CodebookView& codebook, const float* rows, std::size_t count,
                   std::uint8_t* codes) {
  KVTIER_CHECK(codebook.parts > 0 && codebook.dim % codebook.parts == 0, "rows of {} in {} parts",
               codebook.dim, codebook.parts);
  HWY_DYNAMIC_DISPATCH(nearest_codes_of)(codebook, rows, count, codes);
}

void fill_code_tables(const CodeTask& task) {
  constexpr std::uint32_t kMaxDim = 1024;
  KVTIER_CHECK(task.codebook.dim <= kMaxDim, "rows of {}, at most {}", task.codebook.dim, kMaxDim);
  const std::size_t table_size = code_table_size(4, task.codebook.parts);
  float elements[kMaxDim * 4];
  for (std::size_t query = 0; query < task.query_count; query += 4) {
    for (std::size_t q = 0; q < 4; ++q) {
      const bool there = query + q < task.query_count;
      for (std::size_t i = 0; i < task.codebook.dim; ++i) {
        elements[i * 4 + q] = there ? task.queries[(query + q) * task.query_stride + i] : 0.0f;
      }
    }
    HWY_DYNAMIC_DISPATCH(fill_code_table)
    (task.codebook, elements, task.tables + query / 4 * table_size);
  }
}

void score_codes(const SoftmaxOptions& softmax, const CodeTask& task) {
  const std::size_t table_size = code_table_size(4, task.codebook.parts);
  for (std::size_t query = 0; query < task.query_count; query += 4) {
    HWY_DYNAMIC_DISPATCH(score_codes_slice)
    (softmax, task, task.tables + query / 4 * table_size, task.logits + query * task.logit_stride,
     std::min<std::size_t>(4, task.query_count - query));
  }
}

}  // namespace kvtier
#endif  // HWY_ONCE
