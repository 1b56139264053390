#include "kernels/int4_rows.h"

#include "kernels/simd_config.h"
#include "memory/check.h"
#include "memory/dtype.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

// clang-format off
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/int4_rows_cpu.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>
#include "kernels/code_tiles-inl.h"
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace kvtier {
namespace HWY_NAMESPACE {
namespace {

/// A few queries as bytes. What a code says is 8 more than it means: the offset takes that back.
/// The scale of a query is handed out and not multiplied yet, so that sums stay integers.
void fold_int4_queries(const Int4Task& task, std::size_t first, std::size_t count,
                       FoldedQueries& folded, float* scales) {
  const std::uint32_t dim = task.rows.dim;
  alignas(64) float padded[kMaxCodedChannels];
  for (std::size_t q = 0; q < count; ++q) {
    const float* query = task.queries + (first + q) * task.query_stride;
    std::copy_n(query, dim, padded);
    std::fill_n(padded + dim, 16, 0.0f);
    float most = 0.0f;
    for (std::size_t i = 0; i < dim; ++i) most = std::max(most, std::abs(query[i]));
    pack_fours(padded, dim, most > kLeastFolded ? kFoldedLevels / most : 0.0f, folded.fours[q]);
    folded.slopes[q] = 1.0f;
    const FloatVec sums = sums_of_fours(folded.fours[q], dim);
    folded.offsets[q] = -8.0f * hn::GetLane(hn::SumOfLanes(FloatTag(), sums));
    scales[q] = most / kFoldedLevels;
  }
}

/// Integer dots of a tile to logits: times both scales, with what was taken off the rows, capped.
void finish_int4(const SoftmaxOptions& softmax, const std::uint16_t* row_scales, float query_scale,
                 float dot_offset, float* logits) {
  const FloatTag d;
  const hn::Rebind<std::uint16_t, FloatTag> narrow;
  const hn::RebindToUnsigned<FloatTag> bits;
  const FloatVec factor = hn::Set(d, query_scale * softmax.scale);
  const FloatVec offset = hn::Set(d, dot_offset * softmax.scale);
  for (std::size_t i = 0; i < Int4Rows::kTileRows; i += kLanes) {
    const auto scale =
        hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(bits, hn::LoadU(narrow, row_scales + i))));
    hn::StoreU(hn::MulAdd(hn::LoadU(d, logits + i), hn::Mul(scale, factor), offset), d, logits + i);
  }
  if (softmax.logit_cap > 0.0f) cap_logits(softmax.logit_cap, logits, Int4Rows::kTileRows);
}

template <std::size_t kRows>
void score_int4_tiles(const SoftmaxOptions& softmax, const Int4Task& task, std::size_t first,
                      const FoldedQueries& folded, const float* query_scales) {
  const std::size_t tile_lines = int4_tile_lines(task.rows.dim);
  const std::size_t tiles = (task.rows.rows + Int4Rows::kTileRows - 1) / Int4Rows::kTileRows;
  for (std::size_t t = 0; t < tiles; t += KeyCodes::kRunTiles) {
    const std::size_t take = std::min<std::size_t>(KeyCodes::kRunTiles, tiles - t);
    const CodeLine* codes = task.rows.tiles + t * tile_lines;
    const bool more = t + 2 * KeyCodes::kRunTiles <= tiles;
    const TileJob job{.tiles = codes,
                      .next = more ? codes + KeyCodes::kRunTiles * tile_lines : codes,
                      .tile_lines = tile_lines,
                      .queries = &folded,
                      .logits = task.logits + first * task.logit_stride + t * Int4Rows::kTileRows,
                      .logit_stride = task.logit_stride};
    score_run_as<4, kRows>(job, (1u << take) - 1);
    for (std::size_t i = 0; i < take; ++i) {
      const std::size_t row = (t + i) * Int4Rows::kTileRows;
      std::uint16_t scales[Int4Rows::kTileRows] = {};
      std::copy_n(task.rows.scales + row,
                  std::min<std::size_t>(Int4Rows::kTileRows, task.rows.rows - row), scales);
      for (std::size_t q = 0; q < kRows; ++q) {
        const float offset = task.offsets == nullptr ? 0.0f : task.offsets[first + q];
        finish_int4(softmax, scales, query_scales[q], offset,
                    job.logits + q * job.logit_stride + i * Int4Rows::kTileRows);
      }
    }
  }
}

}  // namespace

void score_int4_rows(const SoftmaxOptions& softmax, const Int4Task& task) {
  FoldedQueries folded;
  float scales[kCodedRows];
  for (std::size_t first = 0; first < task.query_count;) {
    const std::size_t count = even_piece(task.query_count - first, kCodedRows);
    fold_int4_queries(task, first, count, folded, scales);
    with_constant<kCodedRows>(count, [&](auto rows) HWY_ATTR {
      score_int4_tiles<rows.value>(softmax, task, first, folded, scales);
    });
    first += count;
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace kvtier
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvtier {

HWY_EXPORT(score_int4_rows);

void quantise_int4(std::span<const float> row, std::uint32_t place, CodeLine* tile,
                   std::uint16_t& scale) {
  float most = 0.0f;
  bool finite = true;
  for (float value : row) {
    most = std::max(most, std::abs(value));
    finite &= std::isfinite(value);
  }
  scale = f32_to_bf16(finite ? most / 7.0f : std::numeric_limits<float>::infinity());
  // Up, so that the largest element still has a code. The next bit pattern is the next number.
  if (finite && bf16_to_f32(scale) * 7.0f < most) ++scale;
  const float step = bf16_to_f32(scale);
  const bool codable = step > 0.0f && std::isfinite(step);
  const std::size_t fours = row.size() / 4;
  for (std::size_t b = 0; b < 4; ++b) {
    for (std::size_t n = 0; n < fours; ++n) {
      // Not multiplied by the inverse, which overflows for a step that is barely a number.
      const float level = codable ? std::clamp(row[b * fours + n] / step, -7.0f, 7.0f) : 0.0f;
      const auto code = static_cast<unsigned>(level + 8.5f);
      std::byte& byte = tile[n / 2].bytes[4 * place + b];
      byte = n % 2 == 0 ? (byte & std::byte{0xf0}) | std::byte(code)
                        : (byte & std::byte{0x0f}) | std::byte(code << 4);
    }
  }
}

void dequantise_int4(const CodeLine* tile, std::uint32_t place, std::uint16_t scale,
                     std::span<float> row) {
  const std::size_t fours = row.size() / 4;
  for (std::size_t i = 0; i < row.size(); ++i) {
    const std::size_t n = i % fours;
    const auto byte = std::to_integer<int>(tile[n / 2].bytes[4 * place + i / fours]);
    const int code = (n % 2 == 0 ? byte & 15 : byte >> 4) - 8;
    row[i] = static_cast<float>(code) * bf16_to_f32(scale);
  }
}

void score_int4(const SoftmaxOptions& softmax, const Int4Task& task) {
  KVTIER_CHECK(task.rows.dim % 8 == 0 && task.rows.dim <= KeyCodes::kDimMax,
               "4-bit rows of {}, expected a multiple of 8 up to {}", task.rows.dim,
               KeyCodes::kDimMax);
  HWY_DYNAMIC_DISPATCH(score_int4_rows)(softmax, task);
}

}  // namespace kvtier
#endif  // HWY_ONCE
