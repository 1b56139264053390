#pragma once

#include <cstddef>
#include <string>

namespace kvtier {

/// Where the kernel's accounts are mounted; only tests have others.
struct MemoryAccounts {
  std::string proc = "/proc";
  std::string control_groups = "/sys/fs/cgroup";
};

/// Bytes this process can still fill with data of its own: the least that the system and each
/// control group above the process leave, counting file cache as free. An account that cannot be
/// read sets no bound. Reads a handful of small files; thread-safe.
///
/// Asking first is the only way to be told: Linux grants address space freely and ends the process
/// when it is filled.
std::size_t available_memory_bytes(const MemoryAccounts& accounts = {});

}  // namespace kvtier
