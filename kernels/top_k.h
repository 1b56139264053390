#pragma once

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

/// Full sort; for tests.
std::span<std::uint32_t> top_k_reference(std::span<const float> scores, std::size_t k,
                                         std::span<std::uint32_t> order);

}  // namespace kvtier
