#include "tools/replay/machine.h"

#include "kernels/simd_targets.h"

#include <sys/utsname.h>

#include <fstream>

namespace kvtier {
namespace {

std::string cpu_name() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (!line.starts_with("model name")) continue;
    const std::size_t colon = line.find(": ");
    if (colon != std::string::npos) return line.substr(colon + 2);
  }
  // Kernels of other architectures name no model there.
  utsname names{};
  return uname(&names) == 0 ? names.machine : "unknown";
}

std::string build_kind() {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  return "with sanitizers: slow";
#elif !defined(__OPTIMIZE__)
  return "not optimised: slow";
#else
  return "optimised";
#endif
}

}  // namespace

MachineDescription describe_machine(unsigned threads) {
  const auto targets = simd_targets();
  return {.cpu = cpu_name(),
          .threads = threads,
          .simd = targets.empty() ? "none" : targets.front(),
          .build = build_kind()};
}

}  // namespace kvtier
