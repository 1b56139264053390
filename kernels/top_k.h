#pragma once

#include "kernels/gpu.h"
#include "memory/status.h"
#include "memory/stream_ref.h"

#include <cstddef>
#include <cstdint>
#include <span>

namespace kvtier {

/// The indices of the `k` largest scores, best first; equal scores in ascending index order, so the
/// answer is unique. NaN is a bug. Fewer than `k` scores: all of them.
///
/// `order` is scratch of at least `scores.size()` elements; the answer is its first part.
/// Cost: O(n + k log k), no allocation.
std::span<std::uint32_t> top_k(std::span<const float> scores, std::size_t k,
                               std::span<std::uint32_t> order);

/// The same set in no order that means anything (but always the same): without sorting.
std::span<std::uint32_t> best_places(std::span<const float> scores, std::size_t k,
                                     std::span<std::uint32_t> order);

/// Most that one call on the GPU picks from a list.
inline constexpr std::uint32_t kMaxTopK = 4096;

/// The same choice for many lists at once, one for each KV head of each sequence. Device memory.
struct TopKParams {
  const float* scores = nullptr;  ///< [lists, stride]; no NaN, which would count as the largest.
  std::size_t stride = 0;         ///< Elements from one list to the next.
  std::uint32_t lists = 0;        ///< Up to 65,535.
  /// [lists]: how many scores each list has; none: `count_max`.
  const std::uint32_t* counts = nullptr;
  std::uint32_t count_max = 0;  ///< The longest list that can come.
  std::uint32_t k = 0;          ///< Up to `kMaxTopK`.
  /// [lists, k]: best first, equal scores in ascending index order; `kNoIndex` behind a short list.
  std::uint32_t* indices = nullptr;
  std::byte* workspace = nullptr;  ///< `top_k_workspace_bytes`, 16-byte aligned, of any content.
};
inline constexpr std::uint32_t kNoIndex = 0xFFFFFFFFu;

std::size_t top_k_workspace_bytes(const Gpu& gpu, const TopKParams& params);

/// Enqueues the choice: exact, and the same on every run. Five kernels: three find the k-th largest
/// score digit by digit, one collects, one sorts. Scores are read four times, from the L2 cache
/// after the first. Allocates nothing, waits for nothing; may be captured in a graph.
Status top_k(const Gpu& gpu, const TopKParams& params, StreamRef stream);

/// Full sort; for tests.
std::span<std::uint32_t> top_k_reference(std::span<const float> scores, std::size_t k,
                                         std::span<std::uint32_t> order);

}  // namespace kvtier
