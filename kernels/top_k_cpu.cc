#include "kernels/top_k.h"

#include "memory/check.h"

#include <algorithm>
#include <array>
#include <bit>

namespace kvtier {
namespace {

/// Maps a score to an integer of the same order. Both zeros map to one key: they are equal scores.
std::uint32_t key_of(float score) {
  const auto bits = std::bit_cast<std::uint32_t>(score + 0.0f);
  return (bits & 0x80000000u) ? ~bits : bits | 0x80000000u;
}

/// Counts of keys by 11 bits of them, twice over: neighbours often have equal digits, and two
/// counters do not wait for each other's stores.
struct DigitCounts {
  std::array<std::array<std::uint32_t, 2048>, 2> counts{};

  void add(std::size_t i, std::uint32_t digit) { ++counts[i % 2][digit]; }
  /// The digit of the k-th largest key; takes those of larger digits off `k`.
  std::uint32_t digit_of(std::size_t& k) const {
    std::uint32_t digit = 2047;
    for (;; --digit) {
      const std::size_t count = std::size_t{counts[0][digit]} + counts[1][digit];
      if (count >= k) return digit;
      k -= count;
    }
  }
};

/// Places of the `k` largest scores to the start of `order`, in no order; of equal ones the first.
///
/// The first digit of the keys is counted over all scores. Those above the k-th largest's digit are
/// in; those that share it, few of many, become candidates at the end of `order`, and only they are
/// looked at again. Both together are never more than there are scores.
void collect_largest(std::span<const float> scores, std::size_t k, std::span<std::uint32_t> order) {
  const std::size_t n = scores.size();
  DigitCounts first;
  for (std::size_t i = 0; i < n; ++i) first.add(i, key_of(scores[i]) >> 21);
  std::size_t left = k;
  std::uint32_t digit = first.digit_of(left);
  std::uint32_t cut = digit << 21;
  std::size_t taken = 0;
  std::size_t kept = 0;
  for (std::size_t i = 0; i < n; ++i) {
    const std::uint32_t key = key_of(scores[i]) >> 21;
    // Without branches, which nobody could predict: a place that does not count is written again.
    order[n - 1 - kept] = order[taken] = static_cast<std::uint32_t>(i);
    kept += key == digit ? 1 : 0;
    taken += key > digit ? 1 : 0;
  }
  const std::span candidates = order.subspan(n - kept, kept);
  std::ranges::reverse(candidates);
  for (const int shift : {10, 0}) {
    // The last digit has a bit less; the one above it is the same in all that are counted.
    const std::uint32_t above = ~0u << (shift + (shift > 0 ? 11 : 10));
    DigitCounts counts;
    for (std::size_t i = 0; i < kept; ++i) {
      const std::uint32_t key = key_of(scores[candidates[i]]);
      if ((key & above) == cut) counts.add(i, key >> shift & (~above >> shift));
    }
    digit = counts.digit_of(left);
    cut |= digit << shift;
  }
  // In ascending order, and never written to before it is read.
  for (std::size_t i = 0; i < kept; ++i) {
    const std::uint32_t place = candidates[i];
    const std::uint32_t key = key_of(scores[place]);
    if (key < cut || (key == cut && left == 0)) continue;
    if (key == cut) --left;
    order[taken++] = place;
  }
}

}  // namespace

std::span<std::uint32_t> best_places(std::span<const float> scores, std::size_t k,
                                     std::span<std::uint32_t> order) {
  KVTIER_CHECK(order.size() >= scores.size(), "scratch of {} for {} scores", order.size(),
               scores.size());
  k = std::min(k, scores.size());
  if (k == 0) return order.first(0);
  // Integers, so that the loop vectorises: what is not a number has bits above those of infinity.
  std::uint32_t largest = 0;
  for (const float score : scores) {
    largest = std::max(largest, std::bit_cast<std::uint32_t>(score) & 0x7fffffffu);
  }
  KVTIER_CHECK(largest <= 0x7f800000u, "a score is not a number");

  collect_largest(scores, k, order.first(scores.size()));
  return order.first(k);
}

std::span<std::uint32_t> top_k(std::span<const float> scores, std::size_t k,
                               std::span<std::uint32_t> order) {
  const std::span<std::uint32_t> best = best_places(scores, k, order);
  std::ranges::sort(best, [scores](std::uint32_t a, std::uint32_t b) {
    return scores[a] > scores[b] || (scores[a] == scores[b] && a < b);
  });
  return best;
}

}  // namespace kvtier
