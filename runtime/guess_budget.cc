#include "runtime/guess_budget.h"

#include <algorithm>

namespace kvtier {

void GuessBudget::begin_step(std::uint64_t used, std::uint64_t unused) {
  const std::uint64_t used_since = used - used_judged_;
  const std::uint64_t ended = used_since + (unused - unused_judged_);
  if (ended >= kJudged) {
    if (used_since * kHalvesBelow < ended && allowance_ > 1) {
      allowance_ /= 2;
      ++halvings_;
    } else if (used_since * kDoublesAbove > ended && allowance_ < full_) {
      allowance_ = std::min(full_, allowance_ * 2);
      ++doublings_;
    }
    used_judged_ = used;
    unused_judged_ = unused;
  }
  // What a step leaves over is not saved up, but for the parts of a unit that is not whole yet.
  credit_ = std::min(credit_ + allowance_, std::max(allowance_, kProbeSteps));
}

bool GuessBudget::spend() {
  if (credit_ < kProbeSteps) return false;
  credit_ -= kProbeSteps;
  return true;
}

}  // namespace kvtier
