#include "kernels/simd_targets.h"

#include "kernels/simd_config.h"
#include "memory/check.h"

#include <hwy/highway.h>

#include <cstdint>

namespace kvtier {

std::vector<std::string> simd_targets() {
  std::vector<std::string> names;
  const auto usable = static_cast<std::uint64_t>(hwy::SupportedTargets() & (HWY_TARGETS));
  // Highway gives better targets lower bits.
  for (int bit = 0; bit < 63; ++bit) {
    const std::uint64_t target = std::uint64_t{1} << bit;
    if (usable & target) names.emplace_back(hwy::TargetName(static_cast<std::int64_t>(target)));
  }
  return names;
}

ScopedSimdTarget::ScopedSimdTarget(const std::string& name) {
  for (int bit = 0; bit < 63; ++bit) {
    const auto target = static_cast<std::int64_t>(std::uint64_t{1} << bit);
    if ((hwy::SupportedTargets() & (HWY_TARGETS)&target) == 0) continue;
    if (name != hwy::TargetName(target)) continue;
    hwy::SetSupportedTargetsForTest(target);
    hwy::GetChosenTarget().Update(target);
    return;
  }
  KVTIER_CHECK(false, "no instruction set '{}' in this build on this machine", name);
}

ScopedSimdTarget::~ScopedSimdTarget() {
  hwy::SetSupportedTargetsForTest(0);
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
}

}  // namespace kvtier
