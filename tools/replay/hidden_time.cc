#include "tools/replay/hidden_time.h"

#include "memory/check.h"

#include <algorithm>

namespace kvtier {
namespace {

double seconds(Duration duration) { return static_cast<double>(duration.count()) / 1e9; }

}  // namespace

HiddenTime measure_hidden_time(std::span<const TokenTime> without,
                               std::span<const TokenTime> with) {
  KVTIER_CHECK(without.size() == with.size(), "{} and {} tokens", without.size(), with.size());
  HiddenTime sums;
  for (std::size_t i = 0; i < with.size(); ++i) {
    const TokenTime& token = with[i];
    const double wait = seconds(without[i].disk_wait);
    const double work = seconds(token.own) + seconds(token.stand_in);
    const double extents = static_cast<double>(token.foreseen + token.unforeseen);
    const double known = extents > 0 ? static_cast<double>(token.foreseen) / extents : 0.0;
    sums.wait_without += wait;
    sums.wait_with += seconds(token.disk_wait);
    sums.own += seconds(token.own);
    sums.stand_in += seconds(token.stand_in);
    sums.hideable += std::min(wait, work);
    sums.hideable_foreseen += std::min(wait * known, work);
    sums.foreseen += token.foreseen;
    sums.unforeseen += token.unforeseen;
  }
  sums.hidden = sums.wait_without - sums.wait_with;
  return sums;
}

}  // namespace kvtier
