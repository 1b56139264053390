#include "kernels/attention_plan.h"
#include "kernels/simd_config.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

// clang-format off
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/attend_many_cpu.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>
#include "kernels/simd_rows-inl.h"
#include "kernels/simd_softmax-inl.h"
// clang-format on

// Attention of many queries: a tile of keys is transposed to float32 once, then used by a few
// hundred rows as a product of small matrices, where the decode kernel multiplies row by row. The
// accumulators of kProductRows rows and kProductVectors vectors stay in registers.

HWY_BEFORE_NAMESPACE();
namespace kvtier {
namespace HWY_NAMESPACE {
namespace {

// 6 * 4 + 4 + 1 of 32 registers, 6 * 2 + 2 + 1 of 16.
constexpr std::size_t kProductRows = 6;
#if HWY_TARGET <= HWY_AVX3 || HWY_ARCH_ARM
constexpr std::size_t kProductVectors = 4;
#else
constexpr std::size_t kProductVectors = 2;
#endif
static_assert(kManyLogitRows % kProductRows == 0, "pieces of equal size");

/// Memory of one worker.
struct Scratch {
  float* queries;   // [kManyRows, padded head_dim]
  float* weighted;  // [kManyRows, padded value_dim]
  float* max;       // [kManyRows]
  float* sum;       // [kManyRows]
  float* keys;      // [head_dim, kTile]: transposed, zeros behind the tile's tokens.
  float* values;    // [kTile, padded value_dim], zeros in the padding.
  float* logits;    // [kManyLogitRows, kTile]
};

Scratch place_scratch(const BlockLayout& layout, float* memory) {
  const std::size_t key_stride = padded_dim(layout.head_dim());
  const std::size_t value_stride = padded_dim(layout.value_dim());
  // As many as `many_scratch_floats` counts.
  Scratch scratch;
  scratch.queries = memory;
  scratch.weighted = scratch.queries + kManyRows * key_stride;
  scratch.max = scratch.weighted + kManyRows * value_stride;
  scratch.sum = scratch.max + kManyRows;
  scratch.keys = scratch.sum + kManyRows;
  scratch.values = scratch.keys + key_stride * kTile;
  scratch.logits = scratch.values + kTile * value_stride;
  return scratch;
}

/// A tile's tokens, and what of them can be masked.
struct TileTokens {
  std::uint32_t tokens = 0;
  std::uint32_t first_position = 0;
  std::uint32_t last_position = 0;
  const std::byte* keys[kTile];
  const std::byte* values[kTile];
  std::uint32_t positions[kTile];
};

/// Cuts a task's ranges into tiles, in order.
class TileReader {
 public:
  TileReader(const BlockLayout& layout, const AttentionTask& task, std::uint32_t head)
      : layout_(layout), ranges_(task.blocks), head_(head) {}

  bool next(TileTokens& tile) {
    tile.tokens = 0;
    tile.first_position = std::numeric_limits<std::uint32_t>::max();
    tile.last_position = 0;
    for (; at_ < ranges_.size() && tile.tokens < kTile; ++at_, used_ = 0) {
      const BlockRange& range = ranges_[at_];
      for (; used_ < range.tokens && tile.tokens < kTile; ++used_) {
        const std::uint32_t token = range.first_token + used_;
        const std::uint32_t position = range.position + used_;
        tile.keys[tile.tokens] = range.keys_begin() + layout_.key_offset(head_, token);
        tile.values[tile.tokens] = range.block + layout_.value_offset(head_, token);
        tile.positions[tile.tokens++] = position;
        tile.first_position = std::min(tile.first_position, position);
        tile.last_position = std::max(tile.last_position, position);
      }
      if (used_ < range.tokens) break;
    }
    return tile.tokens > 0;
  }

 private:
  const BlockLayout& layout_;
  std::span<const BlockRange> ranges_;
  std::uint32_t head_;
  std::size_t at_ = 0;
  std::uint32_t used_ = 0;
};

template <typename T>
HWY_INLINE void convert_row(const std::byte* source, std::size_t dim, float* HWY_RESTRICT target) {
  const FloatTag d;
  const T* HWY_RESTRICT row = reinterpret_cast<const T*>(source);
  std::size_t i = 0;
  for (; i + kLanes <= dim; i += kLanes) hn::Store(load_as_f32(d, row + i), d, target + i);
  if (kNeedsTail && i < dim) hn::Store(load_tail_as_f32(row + i), d, target + i);
}

template <typename T>
void load_tile(const BlockLayout& layout, const TileTokens& tile, const Scratch& scratch) {
  const std::size_t head_dim = layout.head_dim();
  const std::size_t value_stride = padded_dim(layout.value_dim());
  alignas(64) float row[padded_dim(kMaxAttentionDim)];
  for (std::size_t t = 0; t < tile.tokens; ++t) {
    convert_row<T>(tile.keys[t], head_dim, row);
    for (std::size_t i = 0; i < head_dim; ++i) scratch.keys[i * kTile + t] = row[i];
    convert_row<T>(tile.values[t], layout.value_dim(), scratch.values + t * value_stride);
  }
  for (std::size_t i = 0; tile.tokens < kTile && i < head_dim; ++i) {
    std::fill(scratch.keys + i * kTile + tile.tokens, scratch.keys + (i + 1) * kTile, 0.0f);
  }
}

/// target[r][c] (+)= sum over i < depth of left[r][i] * right[i][c]; strides in floats.
struct Product {
  const float* left;
  std::size_t left_stride;
  const float* right;
  std::size_t right_stride;
  float* target;
  std::size_t target_stride;
  std::size_t depth;
  bool accumulate;
};

template <std::size_t kRows, std::size_t kVectors>
HWY_INLINE void multiply_columns(const Product& p, std::size_t row, std::size_t column) {
  const FloatTag d;
  const float* HWY_RESTRICT left = p.left + row * p.left_stride;
  const float* HWY_RESTRICT right = p.right + column;
  float* HWY_RESTRICT target = p.target + row * p.target_stride + column;
  FloatVec sums[kRows][kVectors];
  HWY_UNROLL(8)
  for (std::size_t r = 0; r < kRows; ++r) {
    HWY_UNROLL(8)
    for (std::size_t v = 0; v < kVectors; ++v) {
      sums[r][v] =
          p.accumulate ? hn::Load(d, target + r * p.target_stride + v * kLanes) : hn::Zero(d);
    }
  }
  for (std::size_t i = 0; i < p.depth; ++i, right += p.right_stride) {
    FloatVec columns[kVectors];
    HWY_UNROLL(8)
    for (std::size_t v = 0; v < kVectors; ++v) columns[v] = hn::Load(d, right + v * kLanes);
    HWY_UNROLL(8)
    for (std::size_t r = 0; r < kRows; ++r) {
      const FloatVec factor = hn::Set(d, left[r * p.left_stride + i]);
      HWY_UNROLL(8)
      for (std::size_t v = 0; v < kVectors; ++v) {
        sums[r][v] = hn::MulAdd(columns[v], factor, sums[r][v]);
      }
    }
  }
  HWY_UNROLL(8)
  for (std::size_t r = 0; r < kRows; ++r) {
    HWY_UNROLL(8)
    for (std::size_t v = 0; v < kVectors; ++v) {
      hn::Store(sums[r][v], d, target + r * p.target_stride + v * kLanes);
    }
  }
}

/// `columns` is a multiple of 16, and so of a vector.
void multiply(const Product& p, std::size_t rows, std::size_t columns) {
  for (std::size_t row = 0; row < rows;) {
    const std::size_t piece = even_piece(rows - row, kProductRows);
    with_constant<kProductRows>(piece, [&](auto count) HWY_ATTR {
      std::size_t column = 0;
      for (; column + kProductVectors * kLanes <= columns; column += kProductVectors * kLanes) {
        multiply_columns<count.value, kProductVectors>(p, row, column);
      }
      for (; column < columns; column += kLanes) multiply_columns<count.value, 1>(p, row, column);
    });
    row += piece;
  }
}

/// Position of the query of a row; without positions every token is behind every query.
std::uint32_t row_position(const ManyRun& run, const ManyRows& rows, std::size_t row) {
  if (rows.task->query_positions.empty()) return std::numeric_limits<std::uint32_t>::max();
  return rows.task->query_positions[(rows.first_row + row) / run.queries_per_kv_head];
}

/// Logits to weights; what the rows have gathered so far shrinks with their running maximum.
void weigh_rows(const ManyRun& run, const ManyRows& rows, const TileTokens& tile, std::size_t first,
                std::size_t count, const Scratch& scratch) {
  const std::size_t value_stride = padded_dim(run.layout->value_dim());
  for (std::size_t i = 0; i < count; ++i) {
    const std::size_t row = first + i;
    float* logits = scratch.logits + i * kTile;
    finish_logits(run.softmax, tile.tokens, logits);
    const std::uint32_t position = row_position(run, rows, row);
    if (tile.last_position > position) {
      for (std::size_t t = 0; t < tile.tokens; ++t) {
        if (tile.positions[t] > position) logits[t] = kEmptyLse;
      }
    }
    const float shrink = weigh_row(logits, scratch.max[row], scratch.sum[row]);
    if (shrink != 1.0f) scale_row(shrink, value_stride, scratch.weighted + row * value_stride);
  }
}

void attend_tile(const ManyRun& run, const ManyRows& rows, const TileTokens& tile,
                 std::size_t first_row, const Scratch& scratch) {
  const std::size_t head_dim = run.layout->head_dim();
  const std::size_t key_stride = padded_dim(head_dim);
  const std::size_t value_stride = padded_dim(run.layout->value_dim());
  for (std::size_t row = first_row; row < rows.rows;) {
    const std::size_t count = std::min<std::size_t>(kManyLogitRows, rows.rows - row);
    multiply({.left = scratch.queries + row * key_stride,
              .left_stride = key_stride,
              .right = scratch.keys,
              .right_stride = kTile,
              .target = scratch.logits,
              .target_stride = kTile,
              .depth = head_dim,
              .accumulate = false},
             count, kTile);
    weigh_rows(run, rows, tile, row, count, scratch);
    multiply({.left = scratch.logits,
              .left_stride = kTile,
              .right = scratch.values,
              .right_stride = value_stride,
              .target = scratch.weighted + row * value_stride,
              .target_stride = value_stride,
              .depth = tile.tokens,
              .accumulate = true},
             count, value_stride);
    row += count;
  }
}

void start_rows(const ManyRun& run, const ManyRows& rows, const Scratch& scratch) {
  const std::size_t dim = run.layout->head_dim();
  const std::size_t stride = padded_dim(dim);
  const std::size_t group = run.queries_per_kv_head;
  for (std::size_t i = 0; i < rows.rows; ++i) {
    const std::size_t row = rows.first_row + i;
    std::memcpy(scratch.queries + i * stride,
                rows.task->queries + row / group * rows.task->query_stride +
                    (rows.head * group + row % group) * dim,
                dim * sizeof(float));
  }
  const std::size_t value_stride = padded_dim(run.layout->value_dim());
  std::fill_n(scratch.weighted, rows.rows * value_stride, 0.0f);
  std::fill_n(scratch.values, kTile * value_stride, 0.0f);
  std::fill_n(scratch.max, rows.rows, kEmptyLse);
  std::fill_n(scratch.sum, rows.rows, 0.0f);
}

void finish_rows(const ManyRun& run, const ManyRows& rows, const Scratch& scratch) {
  const std::size_t dim = run.layout->value_dim();
  const std::size_t group = run.queries_per_kv_head;
  for (std::size_t i = 0; i < rows.rows; ++i) {
    const std::size_t query = (rows.first_row + i) / group;
    const std::size_t head = rows.head * group + (rows.first_row + i) % group;
    float* out = rows.task->out + query * rows.task->out_stride + head * dim;
    float& lse = rows.task->lse[query * rows.task->lse_stride + head];
    const bool empty = scratch.max[i] == kEmptyLse;
    const float inverse = empty ? 0.0f : 1.0f / scratch.sum[i];
    const float* HWY_RESTRICT weighted = scratch.weighted + i * padded_dim(dim);
    for (std::size_t e = 0; e < dim; ++e) out[e] = weighted[e] * inverse;
    lse = empty ? kEmptyLse
                : static_cast<float>(double{scratch.max[i]} + std::log(double{scratch.sum[i]}));
  }
}

template <typename T>
void attend_typed(const ManyRun& run, const ManyRows& rows, float* memory) {
  const Scratch scratch = place_scratch(*run.layout, memory);
  start_rows(run, rows, scratch);
  TileTokens tile;
  TileReader reader(*run.layout, *rows.task, rows.head);
  while (reader.next(tile)) {
    // Rows before the first that sees a token of this tile have nothing to do with it.
    std::size_t first_row = 0;
    while (first_row < rows.rows && row_position(run, rows, first_row) < tile.first_position) {
      ++first_row;
    }
    if (first_row == rows.rows) continue;
    load_tile<T>(*run.layout, tile, scratch);
    attend_tile(run, rows, tile, first_row, scratch);
  }
  finish_rows(run, rows, scratch);
}

}  // namespace

void attend_many_rows(const ManyRun& run, const ManyRows& rows, float* scratch) {
  switch (run.layout->dtype()) {
    case DType::kF16: return attend_typed<hwy::float16_t>(run, rows, scratch);
    case DType::kBF16: return attend_typed<hwy::bfloat16_t>(run, rows, scratch);
    case DType::kF32: return attend_typed<float>(run, rows, scratch);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace kvtier
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvtier {

HWY_EXPORT(attend_many_rows);

void attend_many(const ManyRun& run, const ManyRows& rows, float* scratch) {
  HWY_DYNAMIC_DISPATCH(attend_many_rows)(run, rows, scratch);
}

}  // namespace kvtier
#endif  // HWY_ONCE
