#include "kernels/top_k.h"

#include "memory/check.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>

namespace kvtier {
namespace {

/// Maps a score to an integer of the same order. Both zeros map to one key: they are equal scores.
std::uint32_t key_of(float score) {
  const auto bits = std::bit_cast<std::uint32_t>(score + 0.0f);
  return (bits & 0x80000000u) ? ~bits : bits | 0x80000000u;
}

/// The k-th largest key and how many keys are larger, found digit by digit from the top:
/// three counting passes, whatever the scores are.
struct Cut {
  std::uint32_t key = 0;
  std::size_t larger = 0;
};

Cut find_cut(std::span<const float> scores, std::size_t k) {
  constexpr std::array<int, 3> kShifts = {21, 10, 0};
  constexpr std::array<std::uint32_t, 3> kDigits = {2048, 2048, 1024};
  Cut cut;
  std::uint32_t prefix_mask = 0;
  for (std::size_t pass = 0; pass < kShifts.size(); ++pass) {
    std::array<std::uint32_t, 2048> counts{};
    for (const float score : scores) {
      const std::uint32_t key = key_of(score);
      if ((key & prefix_mask) == cut.key) ++counts[(key >> kShifts[pass]) & (kDigits[pass] - 1)];
    }
    std::uint32_t digit = kDigits[pass] - 1;
    while (cut.larger + counts[digit] < k) cut.larger += counts[digit--];
    cut.key |= digit << kShifts[pass];
    prefix_mask |= (kDigits[pass] - 1) << kShifts[pass];
  }
  return cut;
}

}  // namespace

std::span<std::uint32_t> top_k(std::span<const float> scores, std::size_t k,
                               std::span<std::uint32_t> order) {
  KVTIER_CHECK(order.size() >= scores.size(), "scratch of {} for {} scores", order.size(),
               scores.size());
  k = std::min(k, scores.size());
  if (k == 0) return order.first(0);
  bool numbers = true;
  for (const float score : scores) numbers &= !std::isnan(score);
  KVTIER_CHECK(numbers, "a score is not a number");

  const Cut cut = find_cut(scores, k);
  std::size_t taken = 0;
  std::size_t ties_left = k - cut.larger;
  for (std::size_t i = 0; i < scores.size() && taken < k; ++i) {
    const std::uint32_t key = key_of(scores[i]);
    if (key < cut.key || (key == cut.key && ties_left == 0)) continue;
    if (key == cut.key) --ties_left;
    order[taken++] = static_cast<std::uint32_t>(i);
  }
  std::sort(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(k),
            [scores](std::uint32_t a, std::uint32_t b) {
              return scores[a] > scores[b] || (scores[a] == scores[b] && a < b);
            });
  return order.first(k);
}

}  // namespace kvtier
