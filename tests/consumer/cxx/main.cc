// The least that a C++ program does with the installed static library.
#include "runtime/runtime.h"
#include "selectors/registry.h"

#include <cstdio>

int main() {
  kvtier::SteadyClock clock;
  kvtier::HostDevice device(1);
  const auto link = kvtier::make_memory_link();
  kvtier::RuntimeOptions options;
  options.tokens_max = 256;
  const auto needs = kvtier::Runtime::needs(options);
  if (!needs.ok()) return 1;
  options.device_capacity_bytes = needs->device_bytes;
  options.host_capacity_bytes = needs->host_bytes + needs->extent_bytes_total;
  auto runtime =
      kvtier::Runtime::open(options, {.clock = &clock, .device = &device, .link = link.get()});
  if (!runtime.ok()) {
    std::fprintf(stderr, "%s\n", runtime.status().message().c_str());
    return 1;
  }
  auto sequence = (*runtime)->create_sequence({.high = 1, .low = 2});
  if (!sequence.ok() || !(*sequence)->close().ok() || !(*runtime)->close().ok()) return 1;
  std::printf("%zu selectors\n", kvtier::known_selectors().size());
  return 0;
}
