#include "kernels/simd_targets.h"

#include "kernels/simd_config.h"
#include "memory/check.h"

#include <hwy/highway.h>

#include <atomic>
#include <cstdint>

namespace kvtier {
namespace {

constexpr const char* kVnniName = "AVX3_VNNI";

/// False while a test asks for AVX3 without it. Part of Highway's choice, which is process-wide.
std::atomic<bool> vnni_allowed{true};

bool machine_has_vnni() {
#if HWY_ARCH_X86 && (HWY_COMPILER_GCC || HWY_COMPILER_CLANG)
  static const bool has = __builtin_cpu_supports("avx512vnni") != 0;
  return has;
#else
  return false;
#endif
}

}  // namespace

bool simd_vnni() { return vnni_allowed.load(std::memory_order_relaxed) && machine_has_vnni(); }

std::vector<std::string> simd_targets() {
  std::vector<std::string> names;
  const auto usable = static_cast<std::uint64_t>(hwy::SupportedTargets() & (HWY_TARGETS));
  // Highway gives better targets lower bits.
  for (int bit = 0; bit < 63; ++bit) {
    const std::uint64_t target = std::uint64_t{1} << bit;
    if (target == HWY_AVX3 && (usable & target) && machine_has_vnni()) names.push_back(kVnniName);
    if (usable & target) names.emplace_back(hwy::TargetName(static_cast<std::int64_t>(target)));
  }
  return names;
}

ScopedSimdTarget::ScopedSimdTarget(const std::string& name) {
  for (int bit = 0; bit < 63; ++bit) {
    const auto target = static_cast<std::int64_t>(std::uint64_t{1} << bit);
    if ((hwy::SupportedTargets() & (HWY_TARGETS)&target) == 0) continue;
    const bool vnni = target == HWY_AVX3 && name == kVnniName && machine_has_vnni();
    if (name != hwy::TargetName(target) && !vnni) continue;
    vnni_allowed.store(vnni, std::memory_order_relaxed);
    hwy::SetSupportedTargetsForTest(target);
    hwy::GetChosenTarget().Update(target);
    return;
  }
  KVTIER_CHECK(false, "no instruction set '{}' in this build on this machine", name);
}

ScopedSimdTarget::~ScopedSimdTarget() {
  vnni_allowed.store(true, std::memory_order_relaxed);
  hwy::SetSupportedTargetsForTest(0);
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
}

}  // namespace kvtier
