#pragma once

#include <string>
#include <vector>

namespace kvtier {

/// Names of the instruction sets that the kernels were compiled for and this machine has, best
/// first ("AVX3", "AVX2", ...). The kernels use the first unless a test says otherwise.
/// "AVX3_VNNI" is AVX3 on a machine that also has the integer dot products which few kernels use:
/// one more variant of those, and the same code in all others.
std::vector<std::string> simd_targets();

/// Whether code for AVX3 may use the instructions of AVX512_VNNI. Costs a load.
bool simd_vnni();

/// Makes the kernels use one instruction set while it lives, so that every variant can be tested
/// and measured by name. Process-wide: no kernel may run on another thread while one is made or
/// destroyed. For tests and benchmarks only. Aborts on a name that `simd_targets` does not list.
class ScopedSimdTarget {
 public:
  explicit ScopedSimdTarget(const std::string& name);
  ~ScopedSimdTarget();
  ScopedSimdTarget(const ScopedSimdTarget&) = delete;
  ScopedSimdTarget& operator=(const ScopedSimdTarget&) = delete;
};

}  // namespace kvtier
