#include "kernels/attention_plan.h"
#include "kernels/simd_config.h"

#include <algorithm>
#include <cmath>

// clang-format off
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/attend_chunks_cpu.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>
#include <hwy/cache_control.h>
#include "kernels/simd_rows-inl.h"
#include "kernels/simd_softmax-inl.h"
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace kvtier {
namespace HWY_NAMESPACE {
namespace {

/// One tile's tokens as addresses, so that the loops need not know about blocks.
template <typename T>
struct Tile {
  const AttentionChunk* chunk = nullptr;
  std::uint32_t tokens = 0;  ///< 0: there is no tile.
  bool first = false;        ///< First of its chunk: starts from an empty state.
  std::uint32_t last_position = 0;
  // Entries behind `tokens` repeat the last token: the loops may read four at a time.
  const T* keys[kTile];
  const T* values[kTile];
  std::uint32_t positions[kTile];  ///< Filled only when the task has query positions.
};

HWY_INLINE void prefetch_row(const void* row, std::size_t bytes) {
  const auto* at = static_cast<const std::byte*>(row);
  for (std::size_t offset = 0; offset < bytes; offset += 64) prefetch_line(at + offset);
}

/// Walks the tokens of a run's chunks, tile by tile. Tiles never cross a chunk's end.
///
/// Cutting a tile prefetches the first lines of its ranges. Blocks lie at random places, so each
/// begins with a miss of the address translation, and a prefetch holds up the processor until its
/// address is translated: next to each other these waits overlap, among the arithmetic every one
/// of them stops it.
template <typename T>
class TileCursor {
 public:
  explicit TileCursor(const AttentionRun& run) : layout_(*run.layout), chunks_(run.chunks) {
    open_chunk();
  }

  void next(Tile<T>& tile) {
    while (left_ == 0 && at_ < chunks_.size()) {
      ++at_;
      open_chunk();
    }
    tile.tokens = 0;
    if (at_ == chunks_.size()) return;
    const AttentionChunk& chunk = chunks_[at_];
    tile.chunk = &chunk;
    tile.first = left_ == chunk.tokens;
    tile.last_position = 0;
    const auto want = static_cast<std::uint32_t>(std::min<std::size_t>(left_, kTile));
    while (tile.tokens < want) take_range(want, tile);
    left_ -= want;
    for (std::size_t t = want; t < kTile; ++t) {
      tile.keys[t] = tile.keys[want - 1];
      tile.values[t] = tile.values[want - 1];
    }
  }

 private:
  void open_chunk() {
    if (at_ == chunks_.size()) return;
    left_ = chunks_[at_].tokens;
    range_ = chunks_[at_].first_range;
    skip_ = chunks_[at_].skip;
  }

  void take_range(std::uint32_t want, Tile<T>& tile) {
    const AttentionChunk& chunk = *tile.chunk;
    const std::uint32_t take = std::min(range_->tokens - skip_, want - tile.tokens);
    const std::uint32_t token = range_->first_token + skip_;
    const auto* key =
        reinterpret_cast<const T*>(range_->keys_begin() + layout_.key_offset(chunk.head, token));
    const auto* value =
        reinterpret_cast<const T*>(range_->block + layout_.value_offset(chunk.head, token));
    prefetch_line(key);
    prefetch_line(value);
    for (std::uint32_t t = 0; t < take; ++t) {
      tile.keys[tile.tokens + t] = key + std::size_t{t} * layout_.head_dim();
      tile.values[tile.tokens + t] = value + std::size_t{t} * layout_.value_dim();
    }
    if (!chunk.task->query_positions.empty() && take > 0) {
      for (std::uint32_t t = 0; t < take; ++t) {
        tile.positions[tile.tokens + t] = range_->position + skip_ + t;
      }
      tile.last_position = std::max(tile.last_position, range_->position + skip_ + take - 1);
    }
    tile.tokens += take;
    skip_ += take;
    if (skip_ == range_->tokens) {
      ++range_;
      skip_ = 0;
    }
  }

  const BlockLayout& layout_;
  std::span<const AttentionChunk> chunks_;
  std::size_t at_ = 0;
  std::uint32_t left_ = 0;
  const BlockRange* range_ = nullptr;
  std::uint32_t skip_ = 0;
};

/// logits[row][t] = dot(query, key) for the tile's tokens, rounded up to a multiple of four.
template <typename T>
void dot_tile(const Tile<T>& tile, const Tile<T>& ahead, std::size_t head_dim, float* logits) {
  const AttentionChunk& chunk = *tile.chunk;
  const std::size_t stride = padded_dim(head_dim);
  for (std::size_t t = 0; t < tile.tokens; t += 4) {
    for (std::size_t i = 0; i < 4; ++i) prefetch_row(ahead.keys[t + i], head_dim * sizeof(T));
    for (std::size_t row = 0; row < chunk.rows;) {
      const std::size_t rows = even_piece(chunk.rows - row, kRegisterRows);
      const QueryRows queries{chunk.queries + row * stride, stride};
      with_constant<kRegisterRows>(rows, [&](auto count) HWY_ATTR {
        dot_four_keys<T, count.value>(tile.keys + t, queries, head_dim, logits + row * kTile + t,
                                      kTile);
      });
      row += rows;
    }
  }
}

/// Tokens behind the row's query weigh nothing.
template <typename T>
void mask_row(const Tile<T>& tile, std::uint32_t query_position, float* logits) {
  for (std::size_t t = 0; t < tile.tokens; ++t) {
    if (tile.positions[t] > query_position) logits[t] = kEmptyLse;
  }
}

template <typename T>
void weigh_tile(const AttentionRun& run, const Tile<T>& tile, float* logits) {
  const AttentionChunk& chunk = *tile.chunk;
  const std::span<const std::uint32_t> query_positions = chunk.task->query_positions;
  const std::size_t value_stride = padded_dim(run.layout->value_dim());
  for (std::size_t row = 0; row < chunk.rows; ++row) {
    float* row_logits = logits + row * kTile;
    finish_logits(run.softmax, tile.tokens, row_logits);
    if (!query_positions.empty()) {
      const std::uint32_t position = query_positions[row / run.queries_per_kv_head];
      if (tile.last_position > position) mask_row(tile, position, row_logits);
    }
    const float shrink = weigh_row(row_logits, chunk.max[row], chunk.sum[row]);
    if (shrink != 1.0f) scale_row(shrink, value_stride, chunk.weighted + row * value_stride);
  }
}

/// weighted[row][at ..] += sum over the tile of weight * value, for `kRows` rows and `kVectors`
/// vectors of the value, all in registers. `tail`: the one vector is the row's half-full last.
template <typename T, std::size_t kRows, std::size_t kVectors>
HWY_INLINE void add_values(const Tile<T>& tile, const Tile<T>* ahead, std::size_t at, bool tail,
                           const float* HWY_RESTRICT weights, float* HWY_RESTRICT weighted,
                           std::size_t stride) {
  const FloatTag d;
  FloatVec sums[kRows][kVectors];
  HWY_UNROLL(8)
  for (std::size_t r = 0; r < kRows; ++r) {
    HWY_UNROLL(8)
    for (std::size_t v = 0; v < kVectors; ++v) {
      sums[r][v] = hn::Load(d, weighted + r * stride + at + v * kLanes);
    }
  }
  for (std::size_t t = 0; t < tile.tokens; ++t) {
    if (ahead != nullptr) prefetch_row(ahead->values[t] + at, kVectors * kLanes * sizeof(T));
    const T* HWY_RESTRICT row = tile.values[t] + at;
    FloatVec value[kVectors];
    HWY_UNROLL(8)
    for (std::size_t v = 0; v < kVectors; ++v) {
      value[v] = kNeedsTail && kVectors == 1 && tail ? load_tail_as_f32(row)
                                                     : load_as_f32(d, row + v * kLanes);
    }
    HWY_UNROLL(8)
    for (std::size_t r = 0; r < kRows; ++r) {
      const FloatVec weight = hn::Set(d, weights[r * kTile + t]);
      HWY_UNROLL(8)
      for (std::size_t v = 0; v < kVectors; ++v) {
        sums[r][v] = hn::MulAdd(value[v], weight, sums[r][v]);
      }
    }
  }
  HWY_UNROLL(8)
  for (std::size_t r = 0; r < kRows; ++r) {
    HWY_UNROLL(8)
    for (std::size_t v = 0; v < kVectors; ++v) {
      hn::Store(sums[r][v], d, weighted + r * stride + at + v * kLanes);
    }
  }
}

template <typename T, std::size_t kRows>
void add_value_rows(const Tile<T>& tile, const Tile<T>* ahead, std::size_t value_dim,
                    const float* weights, float* weighted) {
  const std::size_t stride = padded_dim(value_dim);
  std::size_t at = 0;
  for (; at + 4 * kLanes <= value_dim; at += 4 * kLanes) {
    add_values<T, kRows, 4>(tile, ahead, at, false, weights, weighted, stride);
  }
  for (; at < value_dim; at += kLanes) {
    add_values<T, kRows, 1>(tile, ahead, at, at + kLanes > value_dim, weights, weighted, stride);
  }
}

template <typename T>
void add_value_tile(const Tile<T>& tile, const Tile<T>& ahead, std::size_t value_dim,
                    const float* weights) {
  const AttentionChunk& chunk = *tile.chunk;
  for (std::size_t row = 0; row < chunk.rows;) {
    const std::size_t rows = even_piece(chunk.rows - row, kRegisterRows);
    with_constant<kRegisterRows>(rows, [&](auto count) HWY_ATTR {
      // The first pass over the values starts the loads of the next tile's.
      add_value_rows<T, count.value>(tile, row == 0 ? &ahead : nullptr, value_dim,
                                     weights + row * kTile,
                                     chunk.weighted + row * padded_dim(value_dim));
    });
    row += rows;
  }
}

template <typename T>
void attend_typed(const AttentionRun& run) {
  constexpr std::size_t kMaxRows = std::size_t{kMaxStepQueries} * kMaxGroupQueries;
  alignas(64) float logits[kMaxRows * kTile];
  Tile<T> tiles[2];
  TileCursor<T> cursor(run);
  Tile<T>* tile = &tiles[0];
  Tile<T>* next = &tiles[1];
  cursor.next(*tile);
  // Later tiles are prefetched while the tile before is attended; the first has none before it.
  for (std::size_t t = 0; t < tile->tokens; ++t) {
    prefetch_row(tile->keys[t], run.layout->head_dim() * sizeof(T));
    prefetch_row(tile->values[t], run.layout->value_dim() * sizeof(T));
  }
  while (tile->tokens > 0) {
    cursor.next(*next);
    const Tile<T>& ahead = next->tokens > 0 ? *next : *tile;
    const AttentionChunk& chunk = *tile->chunk;
    if (tile->first) {
      std::fill_n(chunk.weighted, chunk.rows * padded_dim(run.layout->value_dim()), 0.0f);
      std::fill_n(chunk.max, chunk.rows, kEmptyLse);
      std::fill_n(chunk.sum, chunk.rows, 0.0f);
    }
    dot_tile(*tile, ahead, run.layout->head_dim(), logits);
    weigh_tile(run, *tile, logits);
    add_value_tile(*tile, ahead, run.layout->value_dim(), logits);
    std::swap(tile, next);
  }
}

/// One row: weights of its chunks, their values' sum, then the division by all weights.
void fold_row(const AttentionFold& fold, std::size_t row, float* out, float& lse) {
  const FloatTag d;
  const std::size_t stride = padded_dim(fold.value_dim);
  float top = kEmptyLse;
  for (const AttentionChunk& chunk : fold.chunks) top = std::max(top, chunk.max[row]);
  std::fill_n(out, fold.value_dim, 0.0f);
  lse = kEmptyLse;
  if (top == kEmptyLse) return;
  alignas(64) float folded[padded_dim(kMaxAttentionDim)] = {};
  double sum = 0.0;
  for (const AttentionChunk& chunk : fold.chunks) {
    const float weight = std::exp(chunk.max[row] - top);
    if (weight == 0.0f) continue;
    sum += double{weight} * double{chunk.sum[row]};
    const FloatVec w = hn::Set(d, weight);
    const float* HWY_RESTRICT from = chunk.weighted + row * stride;
    for (std::size_t i = 0; i < stride; i += kLanes) {
      hn::Store(hn::MulAdd(w, hn::Load(d, from + i), hn::Load(d, folded + i)), d, folded + i);
    }
  }
  const auto inverse = static_cast<float>(1.0 / sum);
  for (std::size_t i = 0; i < fold.value_dim; ++i) out[i] = folded[i] * inverse;
  lse = static_cast<float>(double{top} + std::log(sum));
}

}  // namespace

void attend_run(const AttentionRun& run) {
  switch (run.layout->dtype()) {
    case DType::kF16: return attend_typed<hwy::float16_t>(run);
    case DType::kBF16: return attend_typed<hwy::bfloat16_t>(run);
    case DType::kF32: return attend_typed<float>(run);
  }
}

void fold_run(const AttentionFold& fold) {
  const AttentionChunk& first = fold.chunks.front();
  const AttentionTask& task = *first.task;
  const std::size_t group = fold.queries_per_kv_head;
  for (std::size_t row = 0; row < first.rows; ++row) {
    const std::size_t query = row / group;
    const std::size_t head = first.head * group + row % group;
    fold_row(fold, row, task.out + query * task.out_stride + head * fold.value_dim,
             task.lse[query * task.lse_stride + head]);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace kvtier
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvtier {

HWY_EXPORT(attend_run);
HWY_EXPORT(fold_run);

void attend_chunks(const AttentionRun& run) { HWY_DYNAMIC_DISPATCH(attend_run)(run); }
void fold_chunks(const AttentionFold& fold) { HWY_DYNAMIC_DISPATCH(fold_run)(fold); }

}  // namespace kvtier
#endif  // HWY_ONCE
