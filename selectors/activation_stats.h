#pragma once

#include "selectors/selector_state.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace kvtier {

/// Running mean and variance of queries over windows, per channel of all heads in one row (ActQKV's
/// activation bias, code), and how unusual a query is against them.
struct ActivationStats {
  explicit ActivationStats(std::size_t channels) : mean(channels), variance(channels) {}

  /// A window's own mean and population variance, over `queries` queries. The update is ActQKV's;
  /// the first window is taken as it is.
  void add_window(std::span<const float> window_mean, std::span<const float> window_variance,
                  std::uint32_t queries) {
    constexpr std::uint32_t kWindowsMax = 1000;
    const double count = windows;
    const double part = 1.0 / queries;
    for (std::size_t i = 0; i < mean.size(); ++i) {
      if (windows == 0) {
        mean[i] = window_mean[i];
        variance[i] = window_variance[i];
        continue;
      }
      const double gap = double{window_mean[i]} - double{mean[i]};
      variance[i] =
          static_cast<float>((double{variance[i]} * (count - part) + double{window_variance[i]} +
                              gap * gap / (1.0 + 1.0 / count)) /
                             (count + 1.0 - part));
      mean[i] = static_cast<float>(double{mean[i]} + gap / (count + 1.0));
    }
    windows = std::min(windows + 1, kWindowsMax);
  }

  /// Mean over the channels of the squared deviation in units of the variance, a hundredth of the
  /// mean variance added to each. 1 while nothing is known.
  double deviation(std::span<const float> query) const {
    if (windows == 0) return 1.0;
    double floor = 0.0;
    for (float value : variance) floor += double{value};
    floor /= 100.0 * static_cast<double>(variance.size());
    double sum = 0.0;
    for (std::size_t i = 0; i < mean.size(); ++i) {
      const double gap = double{query[i]} - double{mean[i]};
      const double unit = double{variance[i]} + floor;
      sum += unit > 0.0 ? gap * gap / unit : 0.0;
    }
    return sum / static_cast<double>(mean.size());
  }

  std::vector<float> mean;
  std::vector<float> variance;
  std::uint32_t windows = 0;
};

/// The prompt's queries of one window, as they come.
struct ActivationWindow {
  explicit ActivationWindow(std::size_t channels) : sum(channels), squares(channels) {}

  void add(std::span<const float> query) {
    for (std::size_t i = 0; i < sum.size(); ++i) {
      sum[i] += double{query[i]};
      squares[i] += double{query[i]} * double{query[i]};
    }
    ++queries;
  }
  /// Adds the window, if there is one, to `stats`; `mean` and `variance` are scratch.
  void add_to(ActivationStats& stats, std::span<float> mean, std::span<float> variance) const {
    if (queries == 0) return;
    for (std::size_t i = 0; i < sum.size(); ++i) {
      const double average = sum[i] / queries;
      mean[i] = static_cast<float>(average);
      variance[i] = static_cast<float>(std::max(0.0, squares[i] / queries - average * average));
    }
    stats.add_window(mean, variance, queries);
  }
  void clear() {
    std::ranges::fill(sum, 0.0);
    std::ranges::fill(squares, 0.0);
    queries = 0;
  }

  std::vector<double> sum;
  std::vector<double> squares;
  std::uint32_t queries = 0;
};

}  // namespace kvtier
