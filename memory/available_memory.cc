#include "memory/available_memory.h"

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <limits>
#include <optional>
#include <string_view>

namespace kvtier {
namespace {

constexpr std::size_t kUnbounded = std::numeric_limits<std::size_t>::max();

// What the two versions of control groups call the same three things.
struct GroupFiles {
  const char* limit;
  const char* usage;
  const char* inactive_cache;
  const char* active_cache;
};
constexpr GroupFiles kVersion1 = {"memory.limit_in_bytes", "memory.usage_in_bytes",
                                  "total_inactive_file", "total_active_file"};
constexpr GroupFiles kVersion2 = {"memory.max", "memory.current", "inactive_file", "active_file"};

// A file with one number; none when it is absent or says "max".
std::optional<std::size_t> read_number(const std::string& path) {
  std::ifstream file(path);
  std::size_t number = 0;
  if (!(file >> number)) return std::nullopt;
  return number;
}

// The number behind `name` in a file of "name number ..." lines.
std::optional<std::size_t> read_field(const std::string& path, std::string_view name) {
  std::ifstream file(path);
  std::string word;
  std::size_t number = 0;
  while (file >> word >> number) {
    if (word == name) return number;
    file.ignore(std::numeric_limits<std::streamsize>::max(), '\n');
  }
  return std::nullopt;
}

std::size_t left_in_group(const std::string& folder, const GroupFiles& files) {
  const auto limit = read_number(folder + "/" + files.limit);
  const auto usage = read_number(folder + "/" + files.usage);
  if (!limit || !usage) return kUnbounded;
  const std::string details = folder + "/memory.stat";
  const std::size_t cache = read_field(details, files.inactive_cache).value_or(0) +
                            read_field(details, files.active_cache).value_or(0);
  const std::size_t taken = *usage - std::min(*usage, cache);
  return *limit - std::min(*limit, taken);
}

// A limit anywhere above the process binds it. In a container the path may be the host's, of which
// only the last folders, or none, are visible here: what is not there is passed over.
std::size_t left_in_groups(const std::string& mount, std::string path, const GroupFiles& files) {
  std::size_t left = kUnbounded;
  while (true) {
    left = std::min(left, left_in_group(mount + path, files));
    if (path.empty()) return left;
    path.resize(path.find_last_of('/'));
  }
}

}  // namespace

std::size_t available_memory_bytes(const MemoryAccounts& accounts) {
  std::size_t left = kUnbounded;
  if (const auto kib = read_field(accounts.proc + "/meminfo", "MemAvailable:")) left = *kib * 1024;

  // Lines are "hierarchy:controllers:path"; version 2 is the one without controllers.
  std::ifstream groups(accounts.proc + "/self/cgroup");
  for (std::string line; std::getline(groups, line);) {
    const std::size_t first = line.find(':');
    const std::size_t second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    std::string path = line.substr(second + 1);
    if (path.empty() || path.front() != '/') continue;
    if (path == "/") path.clear();
    if (controllers.empty()) {
      left = std::min(left, left_in_groups(accounts.control_groups, path, kVersion2));
    } else if (controllers == "memory") {
      left = std::min(left, left_in_groups(accounts.control_groups + "/memory", path, kVersion1));
    }
  }
  return left;
}

}  // namespace kvtier
