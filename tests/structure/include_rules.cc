#include "tests/structure/include_rules.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <optional>
#include <regex>
#include <set>
#include <sstream>

namespace kvtier {
namespace {

namespace fs = std::filesystem;

// Who may include whom: a folder sees the folders listed behind it, and nothing else of ours.
const std::map<std::string, std::set<std::string>> kMayInclude = {
    {"memory", {"memory"}},
    {"kernels", {"kernels", "memory"}},
    {"transfer", {"transfer", "kernels", "memory"}},
    {"selectors", {"selectors", "kernels", "memory"}},
    {"runtime", {"runtime", "selectors", "transfer", "kernels", "memory"}},
    {"tools", {"tools", "runtime", "selectors", "transfer", "kernels", "memory"}},
    {"tests", {"tests", "tools", "runtime", "selectors", "transfer", "kernels", "memory"}},
};

// Moving bytes needs to pack, unpack and verify them; scoring and attention are not its business.
const std::set<std::string> kKernelsSeenByTransfer = {"kernels/gather_blocks.h",
                                                      "kernels/checksum.h"};

struct ThirdParty {
  const char* prefix;
  const char* home;
};
// A home of "" is every folder. Matched in this order, by the beginning of the included path.
constexpr ThirdParty kThirdParty[] = {
    {"fmt/", ""},
    {"hwloc", "memory"},
    {"tbb/", "kernels"},
    {"oneapi/", "kernels"},
    {"hwy/", "kernels"},
    {"xxhash", "kernels"},
    {"sanitizer/", "kernels"},
    {"cuda", "kernels"},
    {"cub/", "kernels"},
    {"liburing", "transfer"},
    {"CLI/", "tools"},
    {"nlohmann/", "tools"},
    {"openssl/", "transfer"},
    {"simdjson", "tools"},
    {"zstd", "tools"},
    {"gtest/", "tests"},
    {"gmock/", "tests"},
};

// Exceptions: JSON that the library itself writes, for engines that ask for text.
const std::set<std::string> kJsonWriters = {"runtime/c_api_report.cc", "runtime/timeline_json.cc"};

// Headers of the system: C++'s own have neither dot nor slash.
bool is_system_header(const std::string& path) {
  static const std::set<std::string> kFiles = {
      "aio.h",     "arm_neon.h", "cpuid.h",   "dirent.h",    "dlfcn.h",  "emmintrin.h",
      "errno.h",   "fcntl.h",    "getopt.h",  "immintrin.h", "limits.h", "poll.h",
      "pthread.h", "sched.h",    "spawn.h",   "termios.h",   "signal.h", "stdint.h",
      "stdlib.h",  "string.h",   "syscall.h", "time.h",      "unistd.h", "x86intrin.h"};
  if (path.find_first_of("./") == std::string::npos || kFiles.count(path) > 0) return true;
  return path.starts_with("sys/") || path.starts_with("linux/") || path.starts_with("asm/");
}

const ThirdParty* find_third_party(const std::string& path) {
  const auto* found =
      std::find_if(std::begin(kThirdParty), std::end(kThirdParty),
                   [&](const ThirdParty& row) { return path.starts_with(row.prefix); });
  return found == std::end(kThirdParty) ? nullptr : found;
}

std::string folder_of(const std::string& path) { return path.substr(0, path.find('/')); }

struct Include {
  int line;
  std::string path;
};

// Lines of a file without what stands behind `//`.
std::vector<std::string> code_lines(const std::string& text) {
  std::vector<std::string> lines;
  std::istringstream stream(text);
  for (std::string line; std::getline(stream, line);) {
    lines.push_back(line.substr(0, line.find("//")));
  }
  return lines;
}

std::vector<Include> includes_of(const std::string& text) {
  static const std::regex kPattern(R"(^\s*#\s*include\s*["<]([^">]+)[">])");
  std::vector<Include> includes;
  int number = 0;
  for (const std::string& line : code_lines(text)) {
    ++number;
    std::smatch match;
    // Most lines are none, and the expression is slow.
    if (line.find("include") == std::string::npos) continue;
    if (std::regex_search(line, match, kPattern)) includes.push_back({number, match[1]});
  }
  return includes;
}

using IncludeGraph = std::map<std::string, std::vector<Include>>;

std::optional<std::string> why_not(const std::string& file, const std::string& included) {
  const std::string folder = folder_of(file);
  if (const ThirdParty* third = find_third_party(included)) {
    if (*third->home == '\0' || folder == third->home || folder == "tests") return std::nullopt;
    if (included.starts_with("nlohmann/") && kJsonWriters.count(file) > 0) return std::nullopt;
    return fmt::format("includes {}, whose only home is {}/", included, third->home);
  }
  if (is_system_header(included)) return std::nullopt;
  const std::string target = folder_of(included);
  if (kMayInclude.count(target) == 0) {
    return fmt::format(
        "includes {}, which is neither of ours by its path from the root nor a third "
        "party with a home",
        included);
  }
  const std::set<std::string>& allowed = kMayInclude.at(folder);
  if (allowed.count(target) == 0) {
    return fmt::format("includes {}, but {}/ may include only {}", included, folder,
                       fmt::join(allowed, ", "));
  }
  if (folder == "transfer" && target == "kernels" && kKernelsSeenByTransfer.count(included) == 0) {
    return fmt::format("includes {}, but transfer/ may use only {}", included,
                       fmt::join(kKernelsSeenByTransfer, ", "));
  }
  return std::nullopt;
}

// The third-party headers, fmt apart, that including `header` pulls in, by way of our own headers.
void collect_third_party(const IncludeGraph& graph, const std::string& header,
                         std::set<std::string>& visited, std::set<std::string>& found) {
  if (!visited.insert(header).second) return;
  const auto includes = graph.find(header);
  if (includes == graph.end()) return;
  for (const Include& include : includes->second) {
    const ThirdParty* third = find_third_party(include.path);
    if (third != nullptr && *third->home != '\0') found.insert(include.path);
    collect_third_party(graph, include.path, visited, found);
  }
}

// A header that another folder includes is public: it must not force a third party on that folder.
std::optional<std::string> why_not_public(const IncludeGraph& graph, const std::string& file,
                                          const std::string& included) {
  const std::string folder = folder_of(file);
  if (folder == "tests" || folder_of(included) == folder) return std::nullopt;
  std::set<std::string> visited;
  std::set<std::string> found;
  collect_third_party(graph, included, visited, found);
  if (found.empty()) return std::nullopt;
  return fmt::format("includes {}, which brings {} along", included, fmt::join(found, ", "));
}

void check_words(const std::string& path, const std::string& text,
                 std::vector<std::string>& broken) {
  static const std::regex kEnvironment(R"(\b(secure_)?getenv\b|\benviron\b)");
  const std::string folder = folder_of(path);
  if (folder == "tools" || folder == "tests") return;
  int number = 0;
  for (const std::string& line : code_lines(text)) {
    ++number;
    if (line.find("env") != std::string::npos && std::regex_search(line, kEnvironment)) {
      broken.push_back(
          fmt::format("{}:{}: reads the environment, which only tools/ may", path, number));
    }
  }
}

}  // namespace

SourceTree read_source_tree(const std::string& root) {
  static const std::set<std::string> kExtensions = {".h", ".cc", ".cu", ".cuh"};
  SourceTree tree;
  for (const auto& [folder, allowed] : kMayInclude) {
    for (const auto& entry : fs::recursive_directory_iterator(fs::path(root) / folder)) {
      if (!entry.is_regular_file() || kExtensions.count(entry.path().extension().string()) == 0) {
        continue;
      }
      std::ifstream file(entry.path(), std::ios::binary);
      tree[fs::relative(entry.path(), root).generic_string()] =
          std::string(std::istreambuf_iterator<char>(file), {});
    }
  }
  return tree;
}

std::vector<std::string> broken_rules(const SourceTree& tree) {
  IncludeGraph graph;
  for (const auto& [path, text] : tree) graph[path] = includes_of(text);
  std::vector<std::string> broken;
  for (const auto& [path, text] : tree) {
    if ((path.ends_with(".cu") || path.ends_with(".cuh")) && folder_of(path) != "kernels") {
      broken.push_back(fmt::format("{}:1: CUDA outside kernels/", path));
    }
    for (const Include& include : graph[path]) {
      auto reason = why_not(path, include.path);
      if (!reason) reason = why_not_public(graph, path, include.path);
      if (reason) broken.push_back(fmt::format("{}:{}: {}", path, include.line, *reason));
    }
    check_words(path, text, broken);
  }
  return broken;
}

}  // namespace kvtier
