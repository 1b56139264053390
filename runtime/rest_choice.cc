#include "runtime/rest_choice.h"

#include "memory/check.h"

#include <algorithm>

namespace kvtier {
namespace {

constexpr std::uint32_t kFirstInterval = 8;
constexpr double kDecay = 0.5;

}  // namespace

RestChoice::RestChoice(std::uint32_t query_heads, std::uint32_t interval_max)
    : interval_max_(interval_max),
      interval_(std::min(kFirstInterval, interval_max)),
      without_(query_heads),
      with_(query_heads) {
  KVTIER_CHECK(interval_max > 0, "estimates are measured every {} steps", interval_max);
}

bool RestChoice::begin_step() {
  if (until_next_ > 0) {
    --until_next_;
    return false;
  }
  until_next_ = interval_ - 1;
  interval_ = std::min(interval_max_, 2 * interval_);
  return true;
}

void RestChoice::learn(std::span<const double> without, std::span<const double> with) {
  KVTIER_CHECK(without.size() == without_.size() && with.size() == with_.size(),
               "{} and {} errors of {} heads", without.size(), with.size(), with_.size());
  ++measurements_;
  for (std::size_t head = 0; head < with_.size(); ++head) {
    without_[head] = kDecay * without_[head] + without[head];
    with_[head] = kDecay * with_[head] + with[head];
  }
}

}  // namespace kvtier
